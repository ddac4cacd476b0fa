# SPDX-License-Identifier: Apache-2.0
"""`firstlm bench`: what skipped layers are worth on the clock, and in memory.

Every cell (engine, weights, batch, skip rate) decodes the same prompts, one step each in turn, in
an order that is shuffled every round; so what else the machine does meets all of them alike. What
skipped layers could save at best is their share of the bytes that a step reads.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from firstlm.command_config import BenchConfig
from firstlm.config import RouterConfig
from firstlm.decisions import RoutingState
from firstlm.engine import DecodeEngine
from firstlm.errors import ConfigError
from firstlm.generate import Decoding, decode_step, prefill
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, RouterPolicy
from firstlm.pretrained import load_base, resolve_device, resolve_dtype
from firstlm.probes import synchronize
from firstlm.results import check_file, provenance, to_json, write_json

WARMUP = 3  # rounds that do not count
DRAWS = 2000  # of the bootstrap


@dataclass
class Cell:
    """One way of decoding, and what was measured of it.

    Attributes:
        engine: "hf" or "fast".
        weights: number format of the linear layers, "same" as the model's or packed.
        batch: rows.
        asked: skip rate that was asked for.
        keep: [layers] bool, the mask of every row.
    """

    engine: str
    weights: str
    batch: int
    asked: float
    keep: torch.Tensor
    ttft: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    layer_calls: int = 0
    kv_bytes: int = 0
    step_bytes: float = 0.0
    skipped_bytes: float = 0.0

    def decoder(self, model: FirstModel) -> DecodeEngine | None:
        """Return the engine that decodes in transformers' place."""
        return model.engine_for(self.engine, self.weights, self.batch)

    def start(self, model: FirstModel, ids: torch.Tensor, room: int) -> Decoding:
        """Run the prompts [batch, tokens]."""
        return prefill(
            model,
            ids,
            policy=FixedMask(self.keep),
            max_new_tokens=room,
            engine=self.engine,
            weights=self.weights,
        )


def evenly(count: int, layers: Sequence[int], total: int) -> torch.Tensor:
    """Return a mask [total] that skips `count` of some layers, evenly spaced, the ends last."""
    keep = torch.ones(total, dtype=torch.bool)
    inner = list(layers)[1:-1] if count <= len(layers) - 2 else list(layers)
    chosen = [(2 * i + 1) * len(inner) // (2 * count) for i in range(count)]
    keep[[inner[i] for i in chosen]] = False
    return keep


def run(options: BenchConfig) -> int:
    """Measure as the options say; the last line of stdout is one JSON object."""
    check_file(options.output)
    model = load(options)
    cells = make_cells(model, options)
    measure(model, cells, options)
    rows = [row_of(cell, cells, options, model) for cell in cells]
    show(rows)
    report = {
        "rows": rows,
        "router_overhead": router_overhead(model, options),
        "bandwidth_gb_s": bandwidth(model.device) / 1e9,
        "rounds": options.rounds,
        "prompt_tokens": options.prompt_tokens,
        "threads": torch.get_num_threads(),
        "provenance": provenance(options.seed),
    }
    if options.output:
        write_json(options.output, report)
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


def make_cells(model: FirstModel, options: BenchConfig) -> list[Cell]:
    """Return every combination; rate 0 of each comes first, as what others are compared with."""
    rates = sorted({0.0, *options.skip_rates})
    formats = {"hf": ["same"], "fast": options.weights}
    free, total = model.free_layers, model.layer_count
    cells = []
    for batch in options.batch_sizes:
        for engine in options.engines:
            for weights in formats[engine]:
                for rate in rates:
                    count = round(rate * total)
                    if count > len(free):
                        raise ConfigError(f"--skip-rates {rate}: only {len(free)} layers are free.")
                    cells.append(Cell(engine, weights, batch, rate, evenly(count, free, total)))
    return cells


@torch.no_grad()
def measure(model: FirstModel, cells: Sequence[Cell], options: BenchConfig) -> None:
    """Fill in the cells' times, in turns; each batch size has a turn of its own."""
    rng = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    total = len(options.batch_sizes) * (options.rounds + options.prefill_rounds)
    with tqdm(total=total, unit="round", desc="measuring") as bar:
        for batch in options.batch_sizes:
            ids = prompts(model, batch, options.prompt_tokens, generator)
            mine = [cell for cell in cells if cell.batch == batch]
            for cell in mine:  # compiles, and warms up
                if cell.engine == "fast" and cell.decoder(model) is None:
                    raise ConfigError("The fast engine cannot run this model; use --engines hf.")
                decode_step(model, cell.start(model, ids, 2), ids[:, 0])
            for _ in range(options.prefill_rounds):
                for cell in rng.sample(mine, len(mine)):
                    cell.ttft.append(timed(model.device, cell.start, model, ids, 2))
                bar.update()
            room = WARMUP + options.rounds
            runs = [(cell, cell.start(model, ids, room)) for cell in mine]
            for turn in range(room):
                for cell, decoding in rng.sample(runs, len(runs)):
                    token = ids[:, turn % ids.shape[1]]
                    seconds = timed(model.device, decode_step, model, decoding, token)
                    if turn >= WARMUP:
                        cell.steps.append(seconds)
                if turn >= WARMUP:
                    bar.update()
            for cell, decoding in runs:
                calls = decoding.state.layer_calls
                cell.layer_calls = calls["decode"] // room
                cell.kv_bytes = decoding.cache.kv_bytes
                count_bytes(cell, model, options.prompt_tokens + options.rounds / 2)


def prompts(model: FirstModel, count: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return random token ids [count, tokens] on the model's device."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(5, vocab, (count, tokens), generator=generator).to(model.device)


def timed(device: torch.device, call: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Return how many seconds a call takes, work on a GPU included."""
    synchronize(device)
    start = time.perf_counter()
    call(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - start


def count_bytes(cell: Cell, model: FirstModel, tokens: float) -> None:
    """Note how many bytes a step reads with all layers: weights, and keys and values so far."""
    base = model.plain_base
    config = base.config.get_text_config(decoder=True)
    engine = cell.decoder(model)
    if engine is not None:
        layers = engine.layer_bytes()
        rest = engine.rest_bytes()
    else:
        layers = [
            sum(p.nbytes for p in module.parameters()) for module in model.routing.stack.modules
        ]
        rest = base.get_output_embeddings().weight.nbytes
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * heads * size * base.dtype.itemsize * tokens * cell.batch
    skipped = [i for i, kept in enumerate(cell.keep.tolist()) if not kept]
    cell.step_bytes = sum(layers) + rest + kv * len(layers)
    cell.skipped_bytes = sum(layers[i] for i in skipped) + kv * len(skipped)


def row_of(
    cell: Cell, cells: Sequence[Cell], options: BenchConfig, model: FirstModel
) -> dict[str, Any]:
    """Return a row of the report."""
    full = next(
        c
        for c in cells
        if (c.engine, c.weights, c.batch) == (cell.engine, cell.weights, cell.batch)
    )
    tpot = statistics.median(cell.steps)
    low, high = _quartiles(cell.steps)
    row: dict[str, Any] = {
        "engine": cell.engine,
        "dtype": str(model.plain_base.dtype).removeprefix("torch.")
        if cell.weights == "same"
        else cell.weights,
        "batch": cell.batch,
        "skip_rate_asked": cell.asked,
        "skip_rate": 1 - float(cell.keep.float().mean()),
        "ttft_ms": 1e3 * statistics.median(cell.ttft),
        "tpot_ms": 1e3 * tpot,
        "tpot_ms_quartiles": [1e3 * low, 1e3 * high],
        "tokens_per_s": cell.batch / tpot,
        "kv_bytes": cell.kv_bytes,
        "layer_calls": cell.layer_calls,
        "tpot_ratio": None,
        "tpot_ratio_ci95": None,
        "realised_over_ideal": None,
        "realised_over_ideal_ci95": None,
        "step_mb": (cell.step_bytes - cell.skipped_bytes) / 1e6,
    }
    if cell is not full:
        pairs = list(zip(full.steps, cell.steps, strict=True))
        ideal = statistics.median(full.steps) * cell.skipped_bytes / cell.step_bytes
        saved = [a - b for a, b in pairs]
        row["tpot_ratio"] = statistics.median(b / a for a, b in pairs)
        row["tpot_ratio_ci95"] = interval([b / a for a, b in pairs], options.seed)
        row["realised_over_ideal"] = statistics.median(saved) / ideal
        row["realised_over_ideal_ci95"] = [x / ideal for x in interval(saved, options.seed)]
    return row


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
            start = time.perf_counter()
            whole = super().observe(*args)
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


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table to look at."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("engine", "format", "batch", "skipped", "TTFT", "TPOT", "tokens/s", "ratio"):
        table.add_column(name, justify="left" if name in ("engine", "format") else "right")
    table.add_column("realised / ideal", justify="right")
    table.add_column("KV", justify="right")
    for row in rows:
        ratio, share = row["tpot_ratio"], row["realised_over_ideal"]
        spread = row["realised_over_ideal_ci95"]
        table.add_row(
            row["engine"],
            row["dtype"],
            str(row["batch"]),
            f"{row['skip_rate']:.1%}",
            f"{row['ttft_ms']:.1f} ms",
            f"{row['tpot_ms']:.2f} ms",
            f"{row['tokens_per_s']:.1f}",
            "" if ratio is None else f"{ratio:.3f}x",
            "" if share is None else f"{share:.2f} ({spread[0]:.2f} to {spread[1]:.2f})",
            f"{row['kv_bytes'] / 2**20:.2f} MiB",
        )
    Console(file=sys.stdout, highlight=False, width=120).print(table)
