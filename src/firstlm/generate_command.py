# SPDX-License-Identifier: Apache-2.0
"""`firstlm generate`: answers that stream, and base and routed answers side by side."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from firstlm.arms import Arms, Run, answer, follow, median
from firstlm.command_config import GenerateConfig
from firstlm.data import check_room, encode_prompt
from firstlm.errors import ConfigError, DataError
from firstlm.examples import load_examples
from firstlm.model import FirstModel
from firstlm.rows import check_sources, is_text

TIMED_TOKENS = 32  # per timed run
KEPT, SKIPPED = ("█", "·"), ("#", ".")  # in a strip of layers, and where these can't be shown


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids."""

    text: str
    ids: list[int]


class TextPieces:
    """Turns token ids into text as they come; half a character waits for its other half."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._shown = 0

    def push(self, token_id: int, last: bool = False) -> str:
        """Return the text that this token completes."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not last:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of token ids, special tokens left out."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def mask_strip(keep: torch.Tensor, file: TextIO | None = None) -> str:
    """Return one character per layer [layers]: whether it is kept, in letters that `file` shows."""
    try:
        "".join(KEPT).encode(getattr(file or sys.stdout, "encoding", None) or "utf-8")
        kept, skipped = KEPT
    except (UnicodeEncodeError, LookupError):
        kept, skipped = SKIPPED
    return "".join(kept if k else skipped for k in keep.tolist())


def run(options: GenerateConfig) -> int:
    """Answer prompts as the options say (`firstlm generate`)."""
    if options.compare and options.num_beams > 1:
        raise ConfigError("--compare streams greedy or sampled answers; leave --num-beams out.")
    texts = read_texts(options)
    hush()
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    model.policy_for(options.skip_rate, options.prefill)  # a rate it can't serve is refused now
    prompts = encode_prompts(texts, options, model)
    if options.compare:
        show_comparison(model, prompts, options)
        return 0
    model.merge_and_unload()
    engine = {"engine": options.engine, "weights": options.weights}
    if options.engine == "fast":
        print("Compiling the layers; less work the next time.", file=sys.stderr)
    # The first call of a process is slow.
    answer(model, prompts[0].ids[:8], max_new_tokens=2, eos_token_ids=(), **engine)
    for number, prompt in enumerate(prompts, start=1):
        if len(prompts) > 1:
            print(f"[{number}/{len(prompts)}] {shorten(prompt.text)}")
        _show_answer(model, prompt, options)
    return 0


def hush() -> None:
    """Keep transformers' loading bars and remarks out of a command's output."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_texts(options: GenerateConfig) -> list[str] | None:
    """Return the prompts that are plain text, from options, a text file or stdin; None for rows."""
    file = options.file
    rows = file is not None and file.endswith((".jsonl", ".jsonl.gz"))
    if options.template is not None and not rows:
        raise ConfigError("--template is for the rows of a .jsonl file; name one with --file.")
    if options.limit is not None and file is None:
        raise ConfigError("--limit is for the prompts of a file; name one with --file.")
    if file is None:
        texts = options.prompt or [_read_stdin()]
    elif not Path(file).is_file():
        what = "this is a folder; name a file." if Path(file).is_dir() else "there is no such file."
        raise DataError(f"{file}: {what}")
    elif rows:
        check_sources(file)
        return None
    else:
        try:
            texts = [line for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text ({error.reason}).") from error
        texts = texts[: options.limit]
    where = file or ("--prompt" if options.prompt else "stdin")
    if not texts or not all(text.strip() for text in texts):
        raise DataError(f"{where}: the prompt is empty; give it some text.")
    if not all(map(is_text, texts)):
        raise DataError(f"{where}: the prompt is not UTF-8 text.")
    return texts


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("Prompt (Ctrl-D on a new line ends it):", file=sys.stderr)
    return sys.stdin.read().rstrip("\n")


def encode_prompts(
    texts: list[str] | None, options: GenerateConfig, model: FirstModel
) -> list[Prompt]:
    """Return prompts with their ids; those that leave no room for an answer are refused."""
    tokenizer = model.need_tokenizer()
    sources: Sequence[Any] = texts or ()
    if texts is None:
        sources = load_examples(
            str(options.file),
            template=options.template,
            tokenizer=tokenizer,
            limit=options.limit,
            answers=False,
        )
    prompts = []
    for number, source in enumerate(sources, start=1):
        text = source if isinstance(source, str) else source.prompt
        ids = encode_prompt(source, tokenizer)
        where = getattr(source, "where", "") or f"prompt {number}"
        if not ids:
            raise DataError(f"{where}: no token in it.")
        check_room(ids, options.max_new_tokens, model.context_length, where)
        prompts.append(Prompt(text, ids))
    return prompts


def _show_answer(model: FirstModel, prompt: Prompt, options: GenerateConfig) -> None:
    """Stream one answer to stdout, then a line with what it took."""
    if options.num_beams > 1:
        found = _beams(model, prompt, options)
        print(decode(model.tokenizer, found.ids))
    else:
        found = Run()
        pieces = TextPieces(model.tokenizer)
        for token_id in follow(model, prompt.ids, found, **_stream_options(options)):
            print(
                pieces.push(token_id, last=len(found.ids) == options.max_new_tokens),
                end="",
                flush=True,
            )
        print()
    print(describe(found), flush=True)


def _beams(model: FirstModel, prompt: Prompt, options: GenerateConfig) -> Run:
    """Answer by beam search, which can't stream."""
    ids = torch.tensor([prompt.ids], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        torch.manual_seed(options.seed)
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    out = model.generate(
        ids,
        torch.ones_like(ids),
        skip_rate=options.skip_rate,
        prefill=options.prefill,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        **sampling,
    )
    new = out.sequences[0, ids.shape[1] :].tolist()
    share = out.decode_s / max(len(new) - 1, 1)
    seconds = [out.ttft_s + i * share for i in range(len(new))]
    return Run(new, seconds, out.keep[0], out.layer_calls, out.kv_bytes)


def _stream_options(options: GenerateConfig) -> dict[str, Any]:
    names = ("skip_rate", "prefill", "max_new_tokens", "temperature", "top_p", "seed")
    names += ("engine", "weights")
    return {name: getattr(options, name) for name in names}


def describe(run: Run) -> str:
    """Return one line: skip rate, strip of layers, times, tokens per second, memory."""
    return "  ".join(
        [
            f"skipped {run.skip_rate:.1%}",
            mask_strip(run.keep),
            f"TTFT {_ms(run.ttft)}",
            f"TPOT {_ms(run.tpot)}",
            f"{run.tokens_per_second:.1f} tokens/s",
            f"KV {_bytes(run.kv_bytes)}",
        ]
    )


def show_comparison(model: FirstModel, prompts: Sequence[Prompt], options: GenerateConfig) -> None:
    """Print base and routed answers side by side with their layers and times, prompt by prompt.

    The times are of runs of their own, in turns, all of the same number of tokens, whereas the
    answers shown end where they end.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    arms = Arms(model)
    shown = _stream_options(options)
    timed = {name: shown[name] for name in shown if name not in ("skip_rate", "max_new_tokens")}
    tokens = min(TIMED_TOKENS, options.max_new_tokens)
    all_times: list[tuple[list[Run], list[Run]]] = []
    for number, prompt in enumerate(prompts, start=1):
        console.print(Text(f"[{number}/{len(prompts)}] {shorten(prompt.text)}", style="bold"))
        answers = arms.answers(prompt.ids, **shown)
        times = arms.timings(prompt.ids, options.skip_rate, tokens, **timed)
        all_times.append(times)
        console.print(comparison(model.tokenizer, answers, times))
    note = (
        "base: the model as it was, all layers. routed: its LoRA, and layers skipped. Times are "
        f"medians over runs of {tokens} tokens, base and routed in turns."
    )
    if len(prompts) > 1:
        rates = sorted(run.skip_rate for _, routed in all_times for run in routed)
        average = sum(rates) / len(rates)
        # Of each prompt's ratio, whose runs took turns: the machine may get slower meanwhile.
        ratio = [
            _times(statistics.median(_ratio(*times, what) for times in all_times))
            for what in ("ttft", "tpot", "tokens_per_second")
        ]
        console.print(
            Text(
                f"{len(prompts)} prompts: skipped {average:.1%} "
                f"({rates[0]:.1%} to {rates[-1]:.1%}); routed to base: "
                f"TTFT {ratio[0]}, TPOT {ratio[1]}, tokens/s {ratio[2]}."
            )
        )
    console.print(Text(note, style="dim"))


def comparison(tokenizer: Any, answers: Sequence[Run], times: Sequence[list[Run]]) -> Any:
    """Return the table of one prompt: base and routed, and what routed is to base."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name, ratio in (("", None), *((name, 1) for name in Arms.NAMES), ("ratio", None)):
        table.add_column(name, ratio=ratio, overflow="fold", no_wrap=ratio is None)

    def row(name: str, cells: Sequence[str], ratio: str = "") -> None:
        table.add_row(name, *(Text(cell) for cell in cells), ratio)  # Text: [brackets] stay

    base, routed = times
    last = [runs[-1] for runs in times]
    row("answer", [decode(tokenizer, run.ids).strip() for run in answers])
    row("layers", [mask_strip(run.keep) for run in answers])
    row("skipped", [f"{run.skip_rate:.1%}" for run in answers])
    row("TTFT", [_ms(median(runs, "ttft")) for runs in times], _times(_ratio(base, routed, "ttft")))
    row("TPOT", [_ms(median(runs, "tpot")) for runs in times], _times(_ratio(base, routed, "tpot")))
    speeds = [f"{median(runs, 'tokens_per_second'):.1f}" for runs in times]
    row("tokens/s", speeds, _times(_ratio(base, routed, "tokens_per_second")))
    sizes = [run.kv_bytes for run in last]
    row("KV", [_bytes(size) for size in sizes], f"{sizes[1] / max(sizes[0], 1):.2f}x")
    return table


def _ratio(base: Sequence[Run], routed: Sequence[Run], what: str) -> float:
    return median(routed, what) / median(base, what)


def _times(value: float) -> str:
    return f"{value:.2f}x" if value == value else "-"


def shorten(text: str, width: int = 70) -> str:
    """Return the text on one line, its middle left out where it is long."""
    line = " ".join(text.split())
    half = (width - 5) // 2
    return line if len(line) <= width else f"{line[:half]} ... {line[-half:]}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds == seconds else "-"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
