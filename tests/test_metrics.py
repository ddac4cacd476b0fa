# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from firstlm.errors import DataError
from firstlm.metrics import exact_match, f1, mean, normalize, retention, score_qa


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Cat!", "cat"),
        ("an apple a day", "apple day"),
        ("U.S.", "us"),
        ("theatre and Anna", "theatre and anna"),  # articles are whole words
        ("the-cat", "thecat"),  # punctuation goes first, so no article is left to drop
        (" \n", ""),
        ("Ärzte … 3", "ärzte … 3"),  # only ASCII punctuation goes
    ],
)
def test_normalize(text: str, wanted: str) -> None:
    assert normalize(text) == wanted


def test_exact_match_takes_any_reference() -> None:
    assert exact_match(" the Cat.", ["dog", "cat"]) == 1
    assert exact_match("cats", ["dog", "cat"]) == 0


@pytest.mark.parametrize(
    ("prediction", "references", "wanted"),
    [
        ("the cat sat", ["cat sat down"], 2 * 2 / (2 + 3)),
        ("cat cat", ["cat"], 2 * 1 / (2 + 1)),  # a word counts as often as it is in both
        ("cat cat dog", ["cat cat"], 2 * 2 / (3 + 2)),
        ("cat", ["cat cat dog"], 2 * 1 / (1 + 3)),
        ("down sat cat", ["cat sat down"], 1.0),
        ("blue", ["red", "light blue", "sky"], 2 / 3),  # the best reference
        ("blue", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("the", ["a"], 1.0),  # both empty once normalised
    ],
)
def test_f1(prediction: str, references: list[str], wanted: float) -> None:
    assert f1(prediction, references) == pytest.approx(wanted, abs=1e-12)


def test_score_qa_pairs_items() -> None:
    scores = score_qa(["a cat", "red dog", "x"], [["cat"], ["dog"], ["y"]])
    assert scores.em == (1, 0, 0)
    assert scores.f1 == pytest.approx((1, 2 / 3, 0))
    summary = scores.summary()
    assert summary["em"].value == pytest.approx(100 / 3)
    assert summary["f1"].value == pytest.approx(500 / 9)
    with pytest.raises(DataError, match="2 predictions for 1 items"):
        score_qa(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="expected a list"):
        score_qa(["a"], ["a"])


def test_mean_interval_is_that_of_the_binomial() -> None:
    estimate = mean([1.0] * 300 + [0.0] * 700, samples=4000)
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (estimate.value, estimate.count) == (pytest.approx(0.3), 1000)
    assert estimate.low == pytest.approx(0.3 - spread, abs=0.003)
    assert estimate.high == pytest.approx(0.3 + spread, abs=0.003)
    assert mean([0.0, 1.0, 1.0], seed=5) == mean([0.0, 1.0, 1.0], seed=5)
    same = mean([0.5, 0.5])
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)
    with pytest.raises(DataError, match="no scores"):
        mean([])


def test_retention_is_paired() -> None:
    base = [0.0, 1.0, 0.5, 0.8] * 25
    kept = retention([0.9 * v for v in base], base)
    assert kept.value == pytest.approx(0.9)
    assert kept.low == pytest.approx(0.9)  # item by item 90%: no draw can differ
    assert kept.high == pytest.approx(0.9)
    assert math.isnan(retention([1.0], [0.0]).value)
    with pytest.raises(DataError, match="other items"):
        retention([1.0], [1.0, 1.0])
