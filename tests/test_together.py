# SPDX-License-Identifier: Apache-2.0
"""What an artifact keeps over several tasks at once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from firstlm.metrics import means
from firstlm.scored import Arm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
try:
    from together import share, table
finally:
    sys.path.pop(0)


def scores(mean: float, count: int, seed: int):
    draws = np.random.default_rng(seed).normal(mean, 0.2, count)
    return means((draws - draws.mean() + mean).tolist())


def test_each_task_counts_by_its_own_reference():
    groups = [np.arange(200), np.arange(40)]
    base = [[scores(0.8, 200, 0)], [scores(0.4, 40, 1)]]
    ours = [[scores(0.6, 200, 2)], [scores(0.38, 40, 3)]]
    found = share(ours, base, groups)
    assert found.value == pytest.approx(100 * (0.75 + 0.95) / 2)
    assert found.low < found.value < found.high
    theirs = [[scores(0.64, 200, 2)], [scores(0.34, 40, 3)]]
    gain = share(ours, base, groups, minus=theirs)
    assert gain.value == pytest.approx(100 * (-0.05 + 0.1) / 2)
    worst = share(ours, base, groups, minus=theirs, over=np.min)
    assert worst.value == pytest.approx(75 - 80)
    # Paired: what items have in common is in neither, so the interval is narrow.
    assert gain.high - gain.low < (found.high - found.low) / 4


def test_seeds_are_paired_and_count_alike():
    groups = [np.arange(100)]
    base = [[scores(0.8, 100, 0)]]
    ours = [[scores(0.6, 100, 1), scores(0.4, 100, 2)]]
    theirs = [[scores(0.5, 100, 1), scores(0.3, 100, 2)]]
    gain = share(ours, base, groups, minus=theirs, paired=False)
    assert gain.value == pytest.approx(12.5)
    assert gain.high - gain.low < 2
    assert share(ours, base, groups, paired=False).value == pytest.approx(62.5)


class Scored(Arm):
    """An arm with scores that are known."""

    def __init__(self, runs: dict[str, dict[int, float]], rate: float) -> None:
        self.known, self.groups = runs, np.arange(50)
        self.task = SimpleNamespace(primary="f1")
        self.reports = {
            seed: {
                "runs": {
                    name: {"skip_rate": {"mean": rate * ("@" in name)}}
                    for name, by_seed in runs.items()
                    if seed in by_seed
                }
            }
            for seed in dict.fromkeys(seed for by_seed in runs.values() for seed in by_seed)
        }

    def scores(self, name: str) -> dict[str, dict]:
        known = self.known[name]
        return {"f1": {seed: scores(known[seed], 50, seed) for seed in self.runs(name)}}


def test_only_seeds_and_runs_that_all_tasks_have_are_compared():
    first = {0: 0.6, 1: 0.2, 2: 0.4}
    arms = [
        Scored({"router@0.3": first, "majority@0.3": {2: 0.3, 0: 0.5}, "router@0.4": first}, 0.2),
        Scored({"router@0.3": {2: 0.4, 0: 0.6}, "majority@0.3": {0: 0.5, 2: 0.3}}, 0.4),
    ]
    plain = [Scored({"run_all": {0: 0.8}}, 0.0), Scored({"run_all": {0: 0.8, 1: 0.1}}, 0.0)]
    rows = table(arms, plain)
    assert [row["run"] for row in rows] == ["router@0.3", "majority@0.3"]
    assert rows[0]["seeds"] == 2
    assert rows[0]["kept"] == pytest.approx(62.5)
    assert rows[0]["skip_rates"] == [0.2, 0.4]
    (gain,) = rows[0]["gains"]
    assert (gain["above"], gain["seeds"]) == ("majority@0.3", 2)
    assert gain["value"] == pytest.approx(12.5)
    assert rows[1]["gains"] == []


def test_references_of_the_same_seeds_are_paired():
    groups = [np.arange(100)]
    base = [[scores(0.8, 100, 1), scores(0.4, 100, 2)]]
    ours = [[scores(0.6, 100, 1), scores(0.3, 100, 2)]]
    found = share(ours, base, groups)
    assert found.value == pytest.approx(75)
    alone = share(ours, base, groups, paired=False)
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_references_that_lack_a_seed_are_drawn_for_themselves(monkeypatch):
    asked = []

    def noted(*args, **options):
        asked.append(options["paired"])
        return share(*args, **options)

    monkeypatch.setattr(sys.modules[table.__module__], "share", noted)
    arms = [Scored({"router@0.3": {0: 0.6, 1: 0.2}}, 0.2)]
    for seeds, paired in (([0, 1, 2], True), ([1, 2], False)):
        table(arms, [Scored({"run_all": dict.fromkeys(seeds, 0.8)}, 0.0)])
        assert set(asked) == {paired}
        asked.clear()
