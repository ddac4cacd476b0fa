# SPDX-License-Identifier: Apache-2.0
"""What `firstlm bench` compares: ways of decoding the same prompts, timed a step each in turn.

The order is shuffled every round, so that what else the machine does meets all of them alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from firstlm.command_config import BenchConfig
from firstlm.config import RouterConfig
from firstlm.cut import cut
from firstlm.engine import DecodeEngine
from firstlm.errors import ConfigError
from firstlm.generate import Decoding, decode_step, prefill
from firstlm.inputs import kv_token_bytes
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Policy, RunAll
from firstlm.probes import peak_bytes, synchronize

WARMUP = 3  # rounds that do not count


@dataclass
class Cell:
    """One way of decoding, and what was measured of it.

    Attributes:
        model: what decodes; for "cut" a model that has only the layers of the mask.
        engine: "hf", "fast", or "cut": the fast engine on the model that was cut for good.
        weights: number format of the linear layers, "same" as the model's or packed.
        batch: rows.
        asked: skip rate that was asked for.
        keep: [batch, layers] bool, the mask of every row.
        masks: "shared" by all rows, or "mixed": one for each.
        ttft: seconds that prompts took.
        steps: seconds that decode steps took, one per round.
        layer_calls: layers that ran in a step.
        kv_bytes: allocated for keys and values.
        peak_bytes: most memory while a prompt and a step run; see `probes.peak_bytes`.
        step_bytes: that a step reads with all layers: weights, and keys and values so far.
        skipped_bytes: of them, those of skipped layers.
        skipped_compute: share of the prompt's compute that is in skipped layers.
    """

    model: FirstModel
    engine: str
    weights: str
    batch: int
    asked: float
    keep: torch.Tensor
    masks: str = "shared"
    ttft: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    layer_calls: int = 0
    kv_bytes: int = 0
    peak_bytes: int | None = None
    step_bytes: float = 0.0
    skipped_bytes: float = 0.0
    skipped_compute: float = 0.0

    @property
    def by(self) -> str:
        """Name of the engine as `generate` takes it."""
        return "hf" if self.engine == "hf" else "fast"

    def start(self, ids: torch.Tensor, room: int) -> Decoding:
        """Run the prompts [batch, tokens]."""
        policy: Policy = RunAll() if self.engine == "cut" else FixedMask(self.keep)
        options: dict[str, Any] = {"engine": self.by, "weights": self.weights}
        return prefill(self.model, ids, policy=policy, max_new_tokens=room, **options)

    def is_like(self, other: Cell, *names: str) -> bool:
        """Return whether both decode alike, as far as the named attributes go."""
        return all(getattr(self, name) == getattr(other, name) for name in names)


def evenly(count: int, layers: Sequence[int], total: int) -> torch.Tensor:
    """Return a mask [total] that skips `count` of some layers, evenly spaced, the ends last."""
    keep = torch.ones(total, dtype=torch.bool)
    inner = _inner(count, layers)
    chosen = [(2 * i + 1) * len(inner) // (2 * count) for i in range(count)]
    keep[[inner[i] for i in chosen]] = False
    return keep


def at_random(count: int, layers: Sequence[int], total: int, rows: int, seed: int) -> torch.Tensor:
    """Return masks [rows, total] that each skip `count` of some layers at random, the ends last."""
    rng = random.Random(seed)
    keep = torch.ones(rows, total, dtype=torch.bool)
    for row in keep:
        row[rng.sample(_inner(count, layers), count)] = False
    return keep


def _inner(count: int, layers: Sequence[int]) -> list[int]:
    return list(layers)[1:-1] if count <= len(layers) - 2 else list(layers)


def make_cells(model: FirstModel, options: BenchConfig) -> list[Cell]:
    """Return every combination; rate 0 of each comes first, as what others are compared with."""
    free, total = model.free_layers, model.layer_count
    short: dict[int, FirstModel] = {}
    cells = []
    for batch in options.batch_sizes:
        for engine in options.engines:
            for weights in ["same"] if engine == "hf" else options.weights:
                for rate in sorted({0.0, *options.skip_rates}):
                    count = round(rate * total)
                    if count > len(free):
                        raise ConfigError(f"--skip-rates {rate}: only {len(free)} layers are free.")
                    one = evenly(count, free, total)
                    what = (engine, weights, batch, rate)
                    cells.append(Cell(model, *what, one.expand(batch, -1)))
                    if "cut" in options.compare and engine == "fast" and count:
                        if count not in short:
                            base = cut(model.plain_base, model.routing.stack, one.tolist())
                            short[count] = FirstModel.from_base(base, RouterConfig())
                        what = ("cut", weights, batch, rate)
                        cells.append(Cell(short[count], *what, one.expand(batch, -1)))
                    if "mixed" in options.compare and batch > 1 and count:
                        mixed = at_random(count, free, total, batch, options.seed)
                        what = (engine, weights, batch, rate)
                        cells.append(Cell(model, *what, mixed, "mixed"))
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
                if cell.by == "fast" and engine_of(cell) is None:
                    raise ConfigError("The fast engine cannot run this model; use --engines hf.")
                _answer(cell, ids)
            for cell in mine:  # before caches of all of them are there
                cell.peak_bytes = peak_bytes(model.device, partial(_answer, cell, ids))
            for _ in range(options.prefill_rounds):
                for cell in rng.sample(mine, len(mine)):
                    cell.ttft.append(timed(model.device, cell.start, ids, 2))
                bar.update()
            room = WARMUP + options.rounds
            runs = [(cell, cell.start(ids, room)) for cell in mine]
            for turn in range(room):
                for cell, decoding in rng.sample(runs, len(runs)):
                    token = ids[:, turn % ids.shape[1]]
                    seconds = timed(model.device, decode_step, cell.model, decoding, token)
                    if turn >= WARMUP:
                        cell.steps.append(seconds)
                if turn >= WARMUP:
                    bar.update()
            for cell, decoding in runs:
                cell.layer_calls = decoding.state.layer_calls["decode"] // room
                cell.kv_bytes = decoding.cache.kv_bytes
                count_bytes(cell, model, options.prompt_tokens + options.rounds / 2)
                count_compute(cell, model, options.prompt_tokens)


def _answer(cell: Cell, ids: torch.Tensor) -> None:
    decode_step(cell.model, cell.start(ids, 2), ids[:, 0])


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


def engine_of(cell: Cell, model: FirstModel | None = None) -> DecodeEngine | None:
    """Return the engine that decodes in transformers' place; of another model if one is given."""
    return (model or cell.model).engine_for(cell.by, cell.weights, cell.batch)


def count_bytes(cell: Cell, model: FirstModel, tokens: float) -> None:
    """Note how many bytes a step of the whole model reads, and how many of them a cell skips.

    Args:
        cell: is filled in.
        model: the whole model.
        tokens: that a row has so far.
    """
    base = model.plain_base
    engine = engine_of(cell, model)
    if engine is not None:
        layers, rest = engine.layer_bytes(), engine.rest_bytes()
    else:
        layers = [
            sum(p.nbytes for p in module.parameters()) for module in model.routing.stack.modules
        ]
        rest = base.get_output_embeddings().weight.nbytes
    kv = kv_token_bytes(base.config, base.dtype.itemsize) * tokens
    skipped = (~cell.keep).sum(0).tolist()  # rows, per layer
    cell.step_bytes = sum(layers) + rest + kv * cell.batch * len(layers)
    # Weights of a layer that a single row keeps are read.
    cell.skipped_bytes = kv * sum(skipped) + sum(
        size for size, rows in zip(layers, skipped, strict=True) if rows == cell.batch
    )


def count_compute(cell: Cell, model: FirstModel, tokens: int) -> None:
    """Note which share of a prompt's compute is in the layers that a cell skips.

    Compute goes by weights: a product of each with every token; with the vocabulary's for the last
    token only.
    """
    layers = [sum(p.numel() for p in m.parameters()) for m in model.routing.stack.modules]
    rest = model.plain_base.get_output_embeddings().weight.numel() / tokens
    skipped = (~cell.keep).float().mean(0).tolist()
    gone = sum(size * share for size, share in zip(layers, skipped, strict=True))
    cell.skipped_compute = gone / (sum(layers) + rest)
