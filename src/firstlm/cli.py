# SPDX-License-Identifier: Apache-2.0
"""The command `firstlm`: finds the work a command names, and turns errors into exit codes.

Owns no options (see `config.py`) and no work: each command is a module with `run(options) -> int`,
imported only when it is called.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from firstlm.errors import FirstError, FirstWarning


class Command(NamedTuple):
    """Where a command's work and options live, as dotted names."""

    module: str
    options: str
    help: str


COMMANDS = {
    "train": Command(
        "firstlm.train",
        "firstlm.config.TrainConfig",
        "train routers and LoRA, measure thresholds",
    ),
    "generate": Command(
        "firstlm.generate_command",
        "firstlm.command_config.GenerateConfig",
        "answer prompts with fewer layers",
    ),
    "inspect": Command(
        "firstlm.inspect_artifact",
        "firstlm.command_config.InspectConfig",
        "show what is in an artifact",
    ),
    "diagnose": Command(
        "firstlm.diagnose",
        "firstlm.command_config.DiagnoseConfig",
        "check that a routed model works",
    ),
    "calibrate": Command(
        "firstlm.calibration",
        "firstlm.command_config.CalibrateConfig",
        "measure thresholds for asked skip rates on your prompts",
    ),
    "balance": Command(
        "firstlm.balance",
        "firstlm.command_config.BalanceConfig",
        "let each of several tasks skip what its metric bears",
    ),
    "eval": Command(
        "firstlm.eval_command",
        "firstlm.command_config.EvalConfig",
        "score base and routed model on a task",
    ),
    "bench": Command(
        "firstlm.bench",
        "firstlm.command_config.BenchConfig",
        "measure what skipped layers save, in time and memory",
    ),
    "serve": Command(
        "firstlm.serve",
        "firstlm.command_config.ServeConfig",
        "serve an artifact by OpenAI's protocol, with a page to look at",
    ),
    "export": Command(
        "firstlm.export",
        "firstlm.command_config.ExportConfig",
        "write a plain smaller model with one mask for good",
    ),
    "experiment": Command(
        "firstlm.experiment",
        "firstlm.command_config.ExperimentConfig",
        "train and score whole matrices of policies, seeds and rates",
    ),
    "report": Command(
        "firstlm.report",
        "firstlm.command_config.ReportConfig",
        "draw results as a page to look at",
    ),
    "demo": Command(
        "firstlm.demo",
        "firstlm.command_config.DemoConfig",
        "see it work: generate, then train a short run",
    ),
}
OK, REFUSED, INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a plain terminal shows '?' instead of failing
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _warnings_as_lines():
            code = _dispatch(words)
        sys.stdout.flush()
        return code
    except FirstError as error:
        _report(f"error: {error}")
        return REFUSED
    except KeyboardInterrupt:
        _report("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if not _is_about_files(error):
            raise
        _report(f"error: {_about_files(error)}")
        return REFUSED


def _dispatch(words: list[str]) -> int:
    """Run one command line; `--help` ends argparse with SystemExit."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return OK
    if words[0] in ("-V", "--version"):
        import firstlm

        print(f"firstlm {firstlm.__version__}")
        return OK
    from firstlm.errors import ConfigError
    from firstlm.options import closest, resolve

    # What libraries call in each other under old names is not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")

    name, *rest = words
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(
            f"unknown command {name!r}{closest(name, COMMANDS)}; "
            f"expected one of {', '.join(COMMANDS)}. See 'firstlm --help'."
        )
    home, _, options_name = command.options.rpartition(".")
    options_class = getattr(import_module(home), options_name)
    try:
        options = resolve(options_class, rest, prog=f"firstlm {name}")
    except SystemExit as leave:  # --help
        return int(leave.code or OK)
    return import_module(command.module).run(options)


def _overview() -> str:
    """Return the list of commands, one line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: firstlm COMMAND [options]",
            "",
            "Any causal language model chooses, from the prompt, which of its layers to run.",
            "",
            "commands:",
            *lines,
            "",
            "'firstlm COMMAND --help' lists a command's options; FIRSTLM_DEBUG=1 shows tracebacks.",
        ]
    )


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Within this scope our own warnings are a line each; others say where they come from."""
    before = warnings.formatwarning

    def text(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if issubclass(category, FirstWarning):
            return f"warning: {message}\n"
        return before(message, category, *place)

    warnings.formatwarning = text
    try:
        yield
    finally:
        warnings.formatwarning = before


def _is_about_files(error: Exception) -> bool:
    """Tell whether a disk that is full or closed ended the command: the user's to mend, no bug."""
    if isinstance(error, OSError):
        return True
    kind = type(error)  # safetensors and torch have their own for writes that fail
    return kind.__name__ == "SafetensorError" or "PytorchStreamWriter failed" in str(error)


def _about_files(error: Exception) -> str:
    """Return which file could not be written or read, why, and what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}. {'Make room, or name' if full else 'Name'} another place."


def _report(message: str) -> None:
    """Say on stderr what ended the command; with FIRSTLM_DEBUG also where."""
    if os.environ.get("FIRSTLM_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    print(message, file=sys.stderr)
