# SPDX-License-Identifier: Apache-2.0
"""What the masks of many prompts say together: rates, how often a layer goes, how they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

CONSTANT = 1e-9  # difference of skip rates that rounding alone makes


def to_bits(keep: Sequence[Sequence[bool]]) -> list[str]:
    """Write masks [prompts, layers] as text, one a prompt; 1 = the layer ran."""
    return ["".join("1" if kept else "0" for kept in row) for row in keep]


def from_bits(rows: Sequence[str]) -> np.ndarray:
    """Read what `to_bits` wrote: keep [prompts, layers]."""
    return np.array([[kept == "1" for kept in row] for row in rows])


def describe_rates(rates: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """Describe skip rates [prompts]; the mean is over `weights`, where any are above 0."""
    low, high = np.percentile(rates, [5, 95])
    some = weights is not None and weights.any()
    return {
        "mean": float(np.average(rates, weights=weights if some else None)),
        "std": float(rates.std()),
        "p5": float(low),
        "p95": float(high),
    }


def describe_masks(keep: np.ndarray) -> dict[str, Any]:
    """Describe masks [prompts, layers].

    Returns:
        layer_skip_share [layers]; distinct_masks; commonest_mask_share; mask_entropy, in bits: 0
        where all prompts have one mask, log2(prompts) where each has its own.
    """
    counts = Counter(map(tuple, keep.tolist()))
    shares = np.array(list(counts.values())) / len(keep)
    return {
        "layer_skip_share": [round(x, 4) for x in (~keep).mean(0).tolist()],
        "distinct_masks": len(counts),
        "commonest_mask_share": float(shares.max()),
        "mask_entropy": float(-(shares * np.log2(shares)).sum()) + 0.0,
    }


def layer_length_correlations(keep: np.ndarray, lengths: Sequence[int]) -> list[float | None]:
    """Return for each layer the correlation of its being skipped with prompts' length.

    `keep` is [prompts, layers]. None for a layer with one answer, or where lengths are constant.
    """
    return [length_correlation((1 - layer).tolist(), lengths) for layer in keep.T.astype(float)]


def length_correlation(rates: Sequence[float], lengths: Sequence[int]) -> float | None:
    """Return Pearson's correlation of skip rates with the logarithm of prompts' tokens.

    None where either is constant.
    """
    logs = np.log(lengths)
    if np.ptp(rates) < CONSTANT or np.ptp(logs) == 0:
        return None
    return float(np.corrcoef(rates, logs)[0, 1])
