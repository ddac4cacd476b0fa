# SPDX-License-Identifier: Apache-2.0
"""Exact match and F1 as SQuAD defines them, and means with bootstrap intervals.

Scores are between 0 and 1 per item; several references count by the best one. Knows nothing about
models or examples.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from firstlm.errors import DataError

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower the case, drop ASCII punctuation, then articles, then surplus blanks."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the normalised prediction equals a normalised reference, else 0."""
    found = normalize(prediction)
    return float(any(found == normalize(reference) for reference in _some(references)))


def f1(prediction: str, references: Sequence[str]) -> float:
    """Return the best token overlap F1 over the references.

    Where nothing is left after normalising, both sides must be empty to agree (SQuAD 2.0); the
    1.1 script differs only there.
    """
    found = normalize(prediction).split()
    return max(_overlap(found, normalize(reference).split()) for reference in _some(references))


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted))


def _some(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise DataError(f"references are {references!r}; expected a list of one text or more.")
    return references


@dataclass(frozen=True)
class Estimate:
    """A value over a corpus with its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class QaScores:
    """Exact match and F1 of each item, in order."""

    em: tuple[float, ...]
    f1: tuple[float, ...]

    def summary(self, seed: int = 0) -> dict[str, Estimate]:
        """Return the corpus means in percent."""
        return {
            "em": mean([100 * v for v in self.em], seed=seed),
            "f1": mean([100 * v for v in self.f1], seed=seed),
        }


def score_qa(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> QaScores:
    """Score each prediction against its own references."""
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} items.")
    pairs = list(zip(predictions, references, strict=True))
    return QaScores(tuple(exact_match(*p) for p in pairs), tuple(f1(*p) for p in pairs))


def mean(values: Sequence[float], *, samples: int = 1000, seed: int = 0) -> Estimate:
    """Return the mean over items, with the interval of means of resampled items."""
    array = _array(values)
    drawn = [array[index].mean() for index in _resample(len(array), samples, seed)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high), len(array))


def retention(
    values: Sequence[float], base: Sequence[float], *, samples: int = 1000, seed: int = 0
) -> Estimate:
    """Return mean(values) / mean(base), both over the same items, resampled together.

    A base that scores 0 leaves nothing to retain: the value is nan.
    """
    ours, theirs = _array(values), _array(base)
    if len(ours) != len(theirs):
        raise DataError(f"{len(ours)} scores against {len(theirs)} of the base: other items.")
    if not theirs.any():
        return Estimate(float("nan"), float("nan"), float("nan"), len(ours))
    drawn = []
    for index in _resample(len(ours), samples, seed):
        below = theirs[index].sum()
        if below:  # a draw of items that the base all fails says nothing
            drawn.append(ours[index].sum() / below)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(float(ours.sum() / theirs.sum()), float(low), float(high), len(ours))


def _array(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise DataError("there are no scores to average; expected one number or more.")
    return array


def _resample(count: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    return (generator.integers(0, count, count) for _ in range(samples))
