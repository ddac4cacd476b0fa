# SPDX-License-Identifier: Apache-2.0
"""`firstlm bench`: what skipped layers are worth on the clock, and in memory.

What skipped layers could save at best is their share of the bytes that a step reads, and of a
prompt's compute. Beside it what a user would pick instead (`peers`), in the same run.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from firstlm.cells import Cell, evenly, make_cells, measure, prompts, timed
from firstlm.command_config import BenchConfig
from firstlm.config import RouterConfig
from firstlm.decisions import RoutingState
from firstlm.errors import FirstError, kind_and_line
from firstlm.model import FirstModel
from firstlm.peers import Peer, PeerMaker, ours
from firstlm.policies import RouterPolicy
from firstlm.pretrained import dtype_name, gguf_file, load_base, resolve_device, resolve_dtype
from firstlm.probes import synchronize
from firstlm.results import check_file, provenance, to_json, write_json

DRAWS = 2000  # of the bootstrap


def run(options: BenchConfig) -> int:
    """Measure as the options say; the last line of stdout is one JSON object."""
    check_file(options.output)
    model = load(options)
    cells = make_cells(model, options)
    measure(model, cells, options)
    bytes_per_s = bandwidth(model.device)
    rows = [row_of(cell, cells, options, bytes_per_s) for cell in cells]
    report = {
        "rows": rows,
        "router_overhead": router_overhead(model, options),
        "bandwidth_gb_s": bytes_per_s / 1e9,
        "rounds": options.rounds,
        "prompt_tokens": options.prompt_tokens,
        "threads": torch.get_num_threads(),
        "provenance": provenance(options.seed),
    }
    if options.output:
        write_json(options.output, report)  # peers are others' code, and may end this process
    if options.peers:
        rows += race(model, options)
        if options.output:
            write_json(options.output, report)
    show(rows)
    print(to_json(report))
    return 0


def load(options: BenchConfig) -> FirstModel:
    """Return the model with untrained routers: what it says does not matter here."""
    if options.random_init:
        base = random_model(options)
        return FirstModel.from_base(base.eval(), RouterConfig())
    base, tokenizer = load_base(options.model, dtype=options.dtype, device=options.device)
    return FirstModel.from_base(base.eval(), RouterConfig(), tokenizer)


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


def random_model(options: BenchConfig) -> Any:
    """Return a Llama of a known shape whose weights are random, made where it will run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    device = resolve_device(options.device)
    config = LlamaConfig(**SHAPES[str(options.random_init)], max_position_embeddings=8192)
    before = torch.get_default_dtype()
    torch.set_default_dtype(resolve_dtype(options.dtype, device))
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def row_of(
    cell: Cell, cells: Sequence[Cell], options: BenchConfig, bytes_per_s: float
) -> dict[str, Any]:
    """Return a row of the report; ratios and what was saved are of pairs within a round."""
    full = next(c for c in cells if c.is_like(cell, "by", "weights", "batch"))
    alike = [c for c in cells if c.is_like(cell, "by", "weights", "batch", "asked")]
    tpot = statistics.median(cell.steps)
    dtype = dtype_name(cell.model.plain_base.dtype) if cell.weights == "same" else cell.weights
    roofline = (cell.step_bytes - cell.skipped_bytes) / bytes_per_s
    row: dict[str, Any] = {
        "engine": cell.engine,
        "dtype": dtype,
        "batch": cell.batch,
        "masks": cell.masks,
        "skip_rate_asked": cell.asked,
        "skip_rate": 1 - float(cell.keep.float().mean()),
        "ttft_ms": 1e3 * statistics.median(cell.ttft),
        "tpot_ms": 1e3 * tpot,
        "tpot_ms_quartiles": [1e3 * x for x in _quartiles(cell.steps)],
        "tokens_per_s": cell.batch / tpot,
        "kv_bytes": cell.kv_bytes,
        "peak_bytes": cell.peak_bytes,
        "layer_calls": cell.layer_calls,
        "step_mb": (cell.step_bytes - cell.skipped_bytes) / 1e6,
        "roofline_ms": 1e3 * roofline,
        "roofline_share": roofline / tpot,
    }
    pairs: dict[str, tuple[Sequence[float], Sequence[float]] | None] = {
        "tpot_ratio": (cell.steps, full.steps) if cell is not full else None,
        "ttft_ratio": (cell.ttft, full.ttft) if cell is not full else None,
        "tpot_over_cut": None,
        "tpot_over_shared": None,
    }
    if cell.masks == "mixed":
        shared = ((cell.steps, c.steps) for c in alike if c.masks == "shared")
        pairs["tpot_over_shared"] = next(shared)
    elif cell.engine != "cut":
        cuts = ((cell.steps, c.steps) for c in alike if c.engine == "cut")
        pairs["tpot_over_cut"] = next(cuts, None)
    for name, pair in pairs.items():
        row |= spread(
            name, [a / b for a, b in zip(*pair, strict=True)] if pair else [], options.seed
        )
    steps = _saved(full.steps, cell.steps, cell.skipped_bytes / cell.step_bytes)
    row |= spread("realised_over_ideal", steps, options.seed)
    prompt = _saved(full.ttft, cell.ttft, cell.skipped_compute)
    return row | spread("ttft_realised_over_ideal", prompt, options.seed)


def _saved(full: Sequence[float], less: Sequence[float], share: float) -> list[float]:
    """Return what each round saved, over the share of the full time that it could at best."""
    ideal = statistics.median(full) * share
    return [(a - b) / ideal for a, b in zip(full, less, strict=True)] if share else []


def spread(name: str, values: Sequence[float], seed: int) -> dict[str, Any]:
    """Return the median of values and its 95% interval under two names; None where are none."""
    if not values:
        return {name: None, f"{name}_ci95": None}
    return {name: statistics.median(values), f"{name}_ci95": interval(values, seed)}


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def interval(values: Sequence[float], seed: int) -> list[float]:
    """Return the 95% bootstrap interval of a median."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(DRAWS))
    return [medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS)]]


@torch.no_grad()
def router_overhead(model: FirstModel, options: BenchConfig) -> float:
    """Return pooling and deciding as a share of the prefill that does them, all layers kept."""
    spent = [0.0]

    class Timed(RoutingState):
        def observe(self, *args: Any) -> bool:
            synchronize(model.device)
            start = time.perf_counter()
            whole = super().observe(*args)
            synchronize(model.device)
            spent[0] += time.perf_counter() - start
            return whole

        def decide(self, *args: Any) -> None:
            spent[0] += timed(model.device, super().decide, *args)

    generator = torch.Generator().manual_seed(options.seed)
    ids = prompts(model, 1, options.prompt_tokens, generator)
    mask, shares = torch.ones_like(ids), []
    for turn in range(options.prefill_rounds + 2):
        state = Timed(RouterPolicy(model.routers, 1e6), mask, model.layer_count)
        spent[0] = 0.0
        with model.routing.tracing(state):
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            total = timed(model.device, model.base, **inputs, logits_to_keep=1)
        if turn >= 2:
            shares.append(spent[0] / total)
    return statistics.median(shares)


def bandwidth(device: torch.device, megabytes: int = 256, rounds: int = 7) -> float:
    """Return how many bytes a second the device reads of memory too large for its caches."""
    numbers = torch.ones(megabytes * 2**18, device=device)
    seconds = [timed(device, numbers.sum) for _ in range(rounds)]
    return numbers.nbytes / min(seconds)


def race(model: FirstModel, options: BenchConfig) -> list[dict[str, Any]]:
    """Let peers and the fast engine answer the same prompt in turns; returns a row per peer."""
    gguf = None if options.random_init else gguf_file(options.model)
    maker = PeerMaker(model.plain_base, model.routing.stack, gguf)
    runners: list[tuple[float, Peer]] = []
    for rate in sorted({0.0, *options.skip_rates}):
        total = model.layer_count
        keep = evenly(round(rate * total), model.free_layers, total)
        runners += [(rate, ours(model, keep, weights)) for weights in options.weights]
        for name in options.peers:
            try:
                runners += [(rate, peer) for peer in maker.make(name, keep)]
            except ImportError as error:
                print(f"{name} is left out ({error}); pip install 'firstlm[peers]'.")
            except Exception as error:
                _leave_out(name, rate, error)
    generator = torch.Generator().manual_seed(options.seed)
    ids = prompts(model, 1, options.prompt_tokens, generator)
    rng = random.Random(options.seed)
    for turn in tqdm(range(options.peer_rounds + 1), "racing", unit="round"):
        for runner in rng.sample(runners, len(runners)):
            rate, peer = runner
            try:
                seconds = peer.answer(ids, options.peer_tokens)
            except Exception as error:
                if peer.name == "fast":
                    raise
                _leave_out(peer.name, rate, error)
                runners = [other for other in runners if other is not runner]
                continue
            if turn:  # the first compiles
                peer.seconds.append(seconds)
    mine = [(rate, peer) for rate, peer in runners if peer.name == "fast"]
    return [_peer_row(rate, p, mine, options) for rate, p in runners if p.name != "fast"]


def _leave_out(name: str, rate: float, error: Exception) -> None:
    """Say that a peer is not measured; its own error must not cost what was."""
    why = str(error) if isinstance(error, FirstError) else kind_and_line(error)
    print(f"{name} is left out at a skip rate of {rate}: {why}")


def _peer_row(
    rate: float, peer: Peer, mine: Sequence[tuple[float, Peer]], options: BenchConfig
) -> dict[str, Any]:
    tpot = statistics.median(peer.seconds)
    unknown = ("ttft_ms", "kv_bytes", "peak_bytes", "layer_calls", "realised_over_ideal")
    return dict.fromkeys(unknown) | {
        "engine": peer.name,
        "dtype": peer.dtype,
        "batch": 1,
        "masks": "shared",
        "skip_rate_asked": rate,
        "skip_rate": 1 - float(peer.keep.float().mean()),
        "tpot_ms": 1e3 * tpot,
        "tpot_ms_quartiles": [1e3 * x for x in _quartiles(peer.seconds)],
        "tokens_per_s": 1 / tpot,
        "over_fast": [
            {"dtype": fast.dtype, "skip_rate_asked": asked}
            | spread(
                "tpot_ratio",
                [a / b for a, b in zip(peer.seconds, fast.seconds, strict=True)],
                options.seed,
            )
            for asked, fast in mine
        ],
    }


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{value:.2f}" for value in values)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table to look at."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("engine", "format", "batch", "skipped", "TTFT", "TPOT", "tokens/s", "ratio"):
        table.add_column(name, justify="left" if name in ("engine", "format") else "right")
    for name in ("realised / ideal", "KV", "peak", "roofline", "time / fast"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio, share = row.get("tpot_ratio"), row.get("realised_over_ideal")
        around = row.get("realised_over_ideal_ci95") or ()
        alike = [
            x for x in row.get("over_fast", ()) if x["skip_rate_asked"] == row["skip_rate_asked"]
        ]
        table.add_row(
            row["engine"] + (" (mixed masks)" if row["masks"] == "mixed" else ""),
            row["dtype"],
            str(row["batch"]),
            f"{row['skip_rate']:.1%}",
            "" if row["ttft_ms"] is None else f"{row['ttft_ms']:.1f} ms",
            f"{row['tpot_ms']:.2f} ms",
            f"{row['tokens_per_s']:.1f}",
            "" if ratio is None else f"{ratio:.3f}x",
            "" if share is None else f"{share:.2f} ({_range(around)})",
            *(
                "" if n is None else f"{n / 2**20:.2f} MiB"
                for n in (row["kv_bytes"], row["peak_bytes"])
            ),
            f"{row['roofline_share']:.0%}" if "roofline_share" in row else "",
            ", ".join(f"{x['tpot_ratio']:.2f}x {x['dtype']}" for x in alike),
        )
    Console(file=sys.stdout, highlight=False, width=160).print(table)
