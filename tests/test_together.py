# SPDX-License-Identifier: Apache-2.0
"""What an artifact keeps over several tasks at once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from firstlm.metrics import means

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
try:
    from together import kept
finally:
    sys.path.pop(0)


def scores(mean: float, count: int, seed: int):
    draws = np.random.default_rng(seed).normal(mean, 0.2, count)
    return means((draws - draws.mean() + mean).tolist())


def test_each_task_counts_by_its_own_reference():
    groups = [np.arange(200), np.arange(40)]
    base = [[scores(0.8, 200, 0)], [scores(0.4, 40, 1)]]
    ours = [[scores(0.6, 200, 2)], [scores(0.38, 40, 3)]]
    found = kept(ours, base, groups)
    assert found.value == pytest.approx(100 * (0.75 + 0.95) / 2)
    assert found.low < found.value < found.high
    theirs = [[scores(0.64, 200, 2)], [scores(0.34, 40, 3)]]
    gain = kept(ours, base, groups, above=theirs)
    assert gain.value == pytest.approx(100 * (-0.05 + 0.1) / 2)
    # Paired: what items have in common is in neither, so the interval is narrow.
    assert gain.high - gain.low < (found.high - found.low) / 4


def test_seeds_are_paired_and_count_alike():
    groups = [np.arange(100)]
    base = [[scores(0.8, 100, 0)]]
    ours = [[scores(0.6, 100, 1), scores(0.4, 100, 2)]]
    theirs = [[scores(0.5, 100, 1), scores(0.3, 100, 2)]]
    gain = kept(ours, base, groups, above=theirs)
    assert gain.value == pytest.approx(12.5)
    assert gain.high - gain.low < 2
    assert kept(ours, base, groups).value == pytest.approx(62.5)
