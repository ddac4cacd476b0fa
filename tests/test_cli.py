# SPDX-License-Identifier: Apache-2.0
"""The command line: what it lists, its exit codes, and that users see messages, not tracebacks."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
import types
import warnings

import pytest

from firstlm import __version__, cli
from firstlm.errors import DataError, FirstWarning
from firstlm.model import FirstModel


def firstlm(*words):
    return subprocess.run(
        [sys.executable, "-m", "firstlm", *words], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def command(monkeypatch):
    """Put a function of this test in place of the work that `firstlm inspect` calls."""

    def put(run):
        module = types.ModuleType("firstlm_test_command")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        changed = cli.COMMANDS["inspect"]._replace(module=module.__name__)
        monkeypatch.setitem(cli.COMMANDS, "inspect", changed)

    return put


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_every_command_on_a_line(words):
    done = firstlm(*words)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for name, command in cli.COMMANDS.items():
        assert any(line.split()[:1] == [name] and command.help in line for line in lines)
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    done = firstlm(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: firstlm {name} ")
    assert "--config" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_work(name):
    module = __import__(cli.COMMANDS[name].module, fromlist=["run"])
    assert callable(module.run)


def test_version():
    assert firstlm("--version").stdout == f"firstlm {__version__}\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generat"], "did you mean generate"),
        (["zzz"], "expected one of train, generate"),
        (["train", "--skiprate", "0.2"], "did you mean --skip-rate"),
        (["train", "--skip-rate", "0.99"], "between 0 and 0.9"),
        (["train", "--skip-rate", "-1"], "between 0 and 0.9"),
        (["train", "--skip-rate", "nan"], "a number"),
        (["train", "--unit", "head"], "block, attention, mlp"),
        (["generate"], "ARTIFACT is missing"),
        (["inspect", "/nowhere/artifact"], "/nowhere/artifact"),
    ],
)
def test_wrong_words_end_with_one_message_and_exit_code_2(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = firstlm(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_work_and_its_number_is_the_exit_code(command):
    seen = []
    command(lambda options: seen.append(options) or 3)
    assert cli.main(["inspect", "here", "--json"]) == 3
    assert (seen[0].artifact, seen[0].json) == ("here", True)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (DataError("line 3 is broken"), 2, "error: line 3 is broken\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), 2, "/a/b: No space left. Make room, or"),
        (
            OSError(errno.EISDIR, "Is a directory", "/a"),
            2,
            "/a: Is a directory. Name another place",
        ),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_code(command, capsys, error, code, says):
    def run(options):
        raise error

    command(run)
    assert cli.main(["inspect", "here"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert says in shown.err
    assert "Traceback" not in shown.err


def test_a_full_disk_is_no_bug_for_safetensors_either(command, capsys):
    def run(options):
        import torch
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, "/nowhere/x.safetensors")
        return 0

    command(run)
    assert cli.main(["inspect", "here"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_bugs_keep_their_traceback(command):
    def run(options):
        raise ZeroDivisionError

    command(run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "here"])


def test_debug_shows_the_traceback(command, capsys, monkeypatch):
    def run(options):
        raise DataError("broken")

    command(run)
    monkeypatch.setenv("FIRSTLM_DEBUG", "1")
    assert cli.main(["inspect", "here"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m firstlm train --help | head -c 10", shell=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["eval", "calibrate", "diagnose", "balance", "generate"])
def test_data_that_cannot_be_read_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, command
):
    def load(*_args, **_more):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(FirstModel, "from_pretrained", load)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    for file, problem in ((broken, "broken JSON"), (tmp_path / "none.jsonl", "no such file")):
        asked = [command, "smollm2-qa", "--file" if command == "generate" else "--data", str(file)]
        if command == "balance":
            asked += [str(file)]
        if command in ("balance", "calibrate"):
            asked += ["--output", str(tmp_path / "out")]
        assert cli.main(asked) == 2
        assert problem in capsys.readouterr().err


def test_a_warning_of_ours_is_a_line_and_others_say_where_they_come_from(command, capsys):
    def run(options):
        warnings.warn("ours", FirstWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)
        return 0

    command(run)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *found: print(warnings.formatwarning(*found[:4]), end="")
        assert cli.main(["inspect", "smollm2-qa"]) == 0
    assert warnings.formatwarning is before
    ours, theirs, *_ = capsys.readouterr().out.splitlines()
    assert ours == "warning: ours"
    assert re.fullmatch(r".*test_cli\.py:\d+: UserWarning: theirs", theirs)
