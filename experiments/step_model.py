# SPDX-License-Identifier: Apache-2.0
"""A model of what a step takes, and how far it is from what `firstlm bench` measured.

A layer that any row keeps reads its weights, and the keys and values of the rows that keep it, and
computes for those rows. It takes the longer of the two where reading and computing overlap, and
their sum where they do not, and a fixed time for being called at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from firstlm import cells

Row = Mapping[str, Any]
BENCH_SEED = 0  # of the masks that `firstlm bench` draws for rows of other masks
RANGE = 3.0  # factors above and below a first guess among which the best speeds are looked for


@dataclass(frozen=True)
class Shape:
    """What a model's layers hold and compute.

    Attributes:
        layers: how many.
        layer_bytes: weights of one layer.
        rest_bytes: weights that every step reads besides: the vocabulary matrix.
        kv_bytes: keys and values of one token in one layer.
        layer_flops: of one layer for one token, attention's sums left out.
        attention_flops: of one layer for one token, for each token that it looks at.
        rest_flops: of the vocabulary matrix for one token.
        total_bytes: all weights, in memory.
    """

    layers: int
    layer_bytes: float
    rest_bytes: float
    kv_bytes: float
    layer_flops: float
    attention_flops: float
    rest_flops: float
    total_bytes: float


def llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    number_bytes: float = 2,
    tied: bool = False,
) -> Shape:
    """Return the shape of a Llama; norms are left out.

    Args:
        layers: how many.
        hidden: width of a token's state.
        intermediate: width within an MLP.
        heads: of queries; a head is hidden / heads wide.
        kv_heads: of keys, and of values.
        vocab: tokens that there are.
        number_bytes: of a weight, and of a number in the KV cache.
        tied: the embedding is the vocabulary matrix.
    """
    kv = hidden // heads * kv_heads
    weights = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate
    rest = vocab * hidden
    return Shape(
        layers=layers,
        layer_bytes=weights * number_bytes,
        rest_bytes=rest * number_bytes,
        kv_bytes=2 * kv * number_bytes,
        layer_flops=2 * weights,
        attention_flops=4 * hidden,
        rest_flops=2 * rest,
        total_bytes=(layers * weights + (1 if tied else 2) * rest) * number_bytes,
    )


@dataclass(frozen=True)
class Machine:
    """How fast one replica is, in what it reaches, not in what its maker states.

    Attributes:
        bandwidth: bytes a second from memory.
        flops: floating-point operations a second.
        layer_overhead: seconds for each layer that a step visits.
        step_overhead: seconds for each step.
        overlap: reading and computing go on at once.
        partial: factor on the time of a layer that some rows of a step run and others do not.
    """

    bandwidth: float
    flops: float
    layer_overhead: float = 0.0
    step_overhead: float = 0.0
    overlap: bool = True
    partial: float = 1.0


def step_seconds(
    shape: Shape,
    machine: Machine,
    tokens: np.ndarray,
    context: np.ndarray,
    pairs: np.ndarray,
    answered: int,
    all_tokens: int,
) -> float:
    """Return what a step takes, in seconds.

    Args:
        shape: of the model.
        machine: that runs it.
        tokens: [layers] that run each layer.
        context: [layers] tokens whose keys and values each layer reads.
        pairs: [layers] pairs of tokens that attention looks at.
        answered: rows whose next token is chosen, which is what the vocabulary matrix is for.
        all_tokens: of the step, whichever layers they run.
    """
    runs = tokens > 0
    read = (shape.layer_bytes * runs + shape.kv_bytes * context) / machine.bandwidth
    compute = (shape.layer_flops * tokens + shape.attention_flops * pairs) / machine.flops
    layers = _together(machine, read, compute) + machine.layer_overhead * runs
    layers = np.where(tokens < all_tokens, machine.partial * layers, layers)
    rest = _together(
        machine,
        np.array(shape.rest_bytes / machine.bandwidth),
        np.array(shape.rest_flops * answered / machine.flops),
    )
    return float(layers.sum() + rest) + machine.step_overhead


def _together(machine: Machine, read: np.ndarray, compute: np.ndarray) -> np.ndarray:
    return np.maximum(read, compute) if machine.overlap else read + compute


def decode_seconds(
    shape: Shape, machine: Machine, keep: np.ndarray, lengths: Sequence[float]
) -> float:
    """Return what one decode step takes, in seconds.

    Args:
        shape: of the model.
        machine: that runs it.
        keep: [rows, layers] bool.
        lengths: tokens of each row so far, the newest included.
    """
    context = np.asarray(lengths) @ keep
    return step_seconds(shape, machine, keep.sum(0), context, context, len(keep), len(keep))


# Next to what was measured


def smollm2(rows: Sequence[Row]) -> tuple[Shape, float]:
    """Return SmolLM2-135M's shape as the fast engine packed it, and the tokens a row had.

    Bytes come from what the report counted for batch 1 with all layers and with fewer: packed
    weights have scales. Operations do not depend on how weights are packed.

    Args:
        rows: of one engine and number format.
    """
    plain = llama(30, 576, 1536, 9, 3, 49152, tied=True)
    whole, less = (row for row in rows if row["batch"] == 1 and row["skip_rate_asked"] in (0, 0.25))
    four = next(r for r in rows if r["batch"] == 4 and not r["skip_rate"])
    kv = 1e6 * (four["step_mb"] - whole["step_mb"]) / 3  # three rows more
    one = 1e6 * (whole["step_mb"] - less["step_mb"]) / (whole["layer_calls"] - less["layer_calls"])
    layer = one - kv / plain.layers
    rest = 1e6 * whole["step_mb"] - plain.layers * one
    shape = replace(plain, layer_bytes=layer, rest_bytes=rest)
    return shape, kv / plain.layers / plain.kv_bytes


def fit(rows: Sequence[Row], overlap: bool) -> tuple[Shape, float, Machine]:
    """Return the speeds under which the model is closest to the steps that run all layers.

    Closest is the least sum of squared relative errors. Bandwidth is at most what the report's
    machine reads of a large array. Without overlap a layer's overhead cannot be told apart from
    its weights' bandwidth, as both are the same for any batch: it is then zero.

    Args:
        rows: of one engine and number format, each with its report's `bandwidth_gb_s`.
        overlap: reading and computing go on at once.
    """
    shape, length = smollm2(rows)
    whole = [row for row in rows if not row["skip_rate"]]
    fastest = 1e9 * whole[0]["bandwidth_gb_s"]
    times = np.array([row["tpot_ms"] / 1e3 for row in whole])
    bandwidths = fastest * np.geomspace(1 / RANGE, 1, 121)
    flops = 2 * 135e6 * 16 / times[-1] * np.geomspace(1 / RANGE, RANGE, 241)
    best: tuple[float, Machine] | None = None
    for speeds in itertools.product(bandwidths, flops):
        machine = Machine(float(speeds[0]), float(speeds[1]), overlap=overlap)
        # All layers alike: one layer stands for them, which is a lot faster.
        found = np.array([_whole(shape, machine, row["batch"], length) for row in whole])
        if overlap:
            weights = shape.layers / times
            overhead = float((weights * (1 - found / times)).sum() / (weights**2).sum())
            machine = replace(machine, layer_overhead=max(overhead, 0.0))
            found = found + shape.layers * machine.layer_overhead
        error = float(((found / times - 1) ** 2).sum())
        if best is None or error < best[0]:
            best = error, machine
    assert best is not None
    return shape, length, best[1]


def _whole(shape: Shape, machine: Machine, batch: int, length: float) -> float:
    """Return the seconds of a step in which all rows run all layers."""
    context = batch * length
    read = (shape.layer_bytes + shape.kv_bytes * context) / machine.bandwidth
    compute = (shape.layer_flops * batch + shape.attention_flops * context) / machine.flops
    rest = shape.rest_bytes / machine.bandwidth, shape.rest_flops * batch / machine.flops
    if machine.overlap:
        return shape.layers * (max(read, compute) + machine.layer_overhead) + max(rest)
    return shape.layers * (read + compute + machine.layer_overhead) + sum(rest)


def evenly(skipped: int, layers: int) -> np.ndarray:
    """Return a mask [layers] as `firstlm bench` makes it for all rows."""
    return cells.evenly(skipped, range(layers), layers).numpy()


def at_random(skipped: int, layers: int, rows: int, seed: int) -> np.ndarray:
    """Return masks [rows, layers] as `firstlm bench` draws them for rows of other masks."""
    return cells.at_random(skipped, range(layers), layers, rows, seed).numpy()


def validation(report: Mapping[str, Any], overlap: bool) -> list[dict[str, Any]]:
    """Return a row a measured one of the fast engine: its time ratio, as predicted and measured.

    The model's speeds are fitted, by number format, to the steps of all layers alone. Those rows
    have `over_measured`, the fitted time over the measured one; the others have `predicted`.

    Args:
        report: of `firstlm bench`.
        overlap: reading and computing go on at once.
    """
    found = []
    fast = [row for row in report["rows"] if row["engine"] == "fast"]
    for dtype in dict.fromkeys(row["dtype"] for row in fast):
        more = {"bandwidth_gb_s": report["bandwidth_gb_s"]}
        rows = [row | more for row in fast if row["dtype"] == dtype]
        shape, length, machine = fit(rows, overlap)
        for row in rows:
            batch, skipped = row["batch"], round(row["skip_rate"] * shape.layers)
            if row["masks"] == "mixed":
                keep = at_random(skipped, shape.layers, batch, BENCH_SEED)
            else:
                keep = np.tile(evenly(skipped, shape.layers), (batch, 1))
            seconds = decode_seconds(shape, machine, keep, [length] * batch)
            whole = _whole(shape, machine, batch, length)
            line = {name: row[name] for name in ("dtype", "batch", "masks", "skip_rate")}
            line |= {"layers_run": int(keep.any(0).sum()), "measured_layers": row["layer_calls"]}
            line["machine"] = machine
            if skipped:
                line |= {"predicted": seconds / whole, "measured": row["tpot_ratio"]}
            else:
                line["over_measured"] = 1e3 * seconds / row["tpot_ms"]
            found.append(line)
    return found
