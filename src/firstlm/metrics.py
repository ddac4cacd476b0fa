# SPDX-License-Identifier: Apache-2.0
"""The metrics of question answering, translation and summarisation, with bootstrap intervals.

Every metric is held as statistics per item that add up to those of a corpus (`Scores`), so that
resampling items is one sum. Several references count by the best one. Knows nothing about models or
examples.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import regex

from firstlm.errors import ConfigError, DataError

BLOCK = 100  # draws that are held in memory at once
Groups = np.ndarray  # [items] of int: the number of the group that an item belongs to
ARTICLES = re.compile(r"\b(a|an|the)\b")
# A sign of a script that puts no blanks between words, with its marks; and words of any script.
UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
)
WORDS = regex.compile(r"[\p{L}\p{M}\p{N}]+")
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

    Signs of scripts without blanks between words count one by one. Where nothing is left after
    normalising, both sides must be empty to agree (SQuAD 2.0); the 1.1 script differs only there.
    """
    found = _tokens(prediction)
    return max(_overlap(found, _tokens(reference)) for reference in _some(references))


def _tokens(text: str) -> list[str]:
    """Return the words of a normalised text."""
    return UNSPACED.sub(r" \g<0> ", normalize(text)).split()


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
class Scores:
    """One metric over a corpus.

    Attributes:
        statistics: [items, k], which add up over items.
        combine: maps summed statistics [k] to the corpus score.
        items: each item's score by itself.
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray], float]
    items: tuple[float, ...]

    @property
    def value(self) -> float:
        """The corpus score."""
        return self.combine(self.statistics.sum(0))

    def estimate(
        self, *, groups: Groups | None = None, samples: int = 1000, seed: int = 0
    ) -> Estimate:
        """Return the corpus score, with the interval of the scores of resampled items.

        `groups` [items] names what items share; those of a group are drawn together.
        """
        return over_seeds([self], groups=groups, samples=samples, seed=seed)


def over_seeds(
    ours: Sequence[Scores],
    base: Sequence[Scores] | None = None,
    *,
    groups: Groups | None = None,
    paired: bool = True,
    difference: bool = False,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the mean score over seeds, or its share of the base's, with a `hierarchical` interval.

    Args:
        ours: one a seed, all over the same items.
        base: the base's, one a seed; None for the score itself. Of one that scores 0 the share is
            nan.
        groups: what items share [items], as for `Scores.estimate`.
        paired: the base's seeds are ours, in the same order, and are drawn together; False draws
            them for themselves.
        difference: return what it is above the base's instead of the share.
        samples: number of draws.
        seed: of the draws.
    """
    sides = [Side(ours)] if base is None else [Side(ours), Side(base, draw=0 if paired else 1)]
    share = base is not None and not difference

    def value(scores: Sequence[np.ndarray]) -> np.ndarray:
        first, *others = scores
        if not others:
            return first
        return shares(first, others[0]) if share else first - others[0]

    found = hierarchical(
        sides,
        value,
        groups=[groups],
        factors=share,
        samples=samples,
        seed=seed,
    )
    return found if difference else replace(found, low=max(found.low, 0.0))


class Side(NamedTuple):
    """One policy on one test set, of those that a value is made of.

    Attributes:
        seeds: its scores, one a seed.
        test_set: number of the test set; items of one are drawn together.
        draw: number of the draw of seeds that it takes part in. Those of one draw have the same
            seeds in the same order.
    """

    seeds: Sequence[Scores]
    test_set: int = 0
    draw: int = 0


def hierarchical(
    sides: Sequence[Side],
    value: Callable[[Sequence[np.ndarray]], np.ndarray],
    *,
    groups: Sequence[Groups | None],
    factors: bool = False,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return a value of several mean scores over seeds, with its 95% interval over items and seeds.

    Every draw takes groups of items with replacement, the same for all seeds, and adds by how much
    some draw of the seeds differs from all of them on the whole corpus: what training and what the
    test set leaves to chance are both in the interval. Draws of n seeds vary by (n - 1) / n of what
    seeds do, so their difference is stretched by the root of its inverse (Rao and Wu, 1988). A
    single seed leaves this part out; where seeds differ by far more than items leave to chance, the
    interval over three holds the mean of all seeds in four of five cases only, over two in three of
    five.

    Args:
        sides: what the value is made of.
        value: of the sides' mean scores, arrays [draws] or single numbers.
        groups: of each test set, what its items share; None where each is by itself.
        factors: differences of seeds are factors, as for shares, which stay above 0.
        samples: number of draws.
        seed: of the draws.
    """
    counts, numbers = dict[int, int](), dict[int, int]()  # items of a test set, seeds of a draw
    for side in sides:
        count = counts.setdefault(side.test_set, len(side.seeds[0].items))
        if {len(one.items) for one in side.seeds} != {count}:
            raise DataError("These scores are over different numbers of items.")
        number = numbers.setdefault(side.draw, len(side.seeds))
        if len(side.seeds) != number:
            raise DataError(f"{number} seeds cannot be paired with {len(side.seeds)}.")

    def scored(times: Mapping[int, np.ndarray]) -> list[np.ndarray]:
        """Return scores [draws, seeds] of each side, from how often items count [draws, items]."""
        return [
            np.stack([_combined(one, times[side.test_set]) for one in side.seeds], axis=1)
            for side in sides
        ]

    def valued(scores: Sequence[np.ndarray]) -> np.ndarray:
        return value([one.mean(-1) for one in scores])

    whole = [one[0] for one in scored({s: np.ones((1, count)) for s, count in counts.items()})]
    everything = float(valued(whole))
    items, seeds = (np.random.default_rng([seed, i]) for i in range(2))
    blocks = []
    for first in range(0, samples, BLOCK):
        times = [
            [drawn_items(items, count, groups[s]) for s, count in counts.items()]
            for _ in range(min(BLOCK, samples - first))
        ]
        of_sets = map(np.stack, zip(*times, strict=True))
        blocks.append(valued(scored(dict(zip(counts, of_sets, strict=True)))))
    found = np.concatenate(blocks)
    picks = [[seeds.integers(0, n, n) for n in numbers.values()] for _ in range(samples)]
    for (draw, n), picked in zip(numbers.items(), zip(*picks, strict=True), strict=True):
        part = [
            scores[np.stack(picked)] if side.draw == draw else scores
            for side, scores in zip(sides, whole, strict=True)
        ]
        stretch = math.sqrt(n / (n - 1)) if n > 1 else 0.0
        if not factors:
            found = found + stretch * (valued(part) - everything)
        elif everything:
            found = found * (valued(part) / everything) ** stretch
    low, high = np.nanpercentile(found, [2.5, 97.5]) if not np.isnan(found).all() else (np.nan,) * 2
    return Estimate(everything, float(low), float(high), sum(counts.values()))


def _combined(scores: Scores, times: np.ndarray) -> list[float]:
    """Return the corpus score where items count so often, for each draw [draws, items]."""
    return [scores.combine(total) for total in times @ scores.statistics]


def shares(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return scores over the base's; nan where the base scores 0, which leaves nothing to share."""
    nothing = np.full(np.broadcast_shapes(scores.shape, base.shape), np.nan)
    return np.divide(scores, base, out=nothing, where=base != 0)


def means(values: Sequence[float], scale: float = 100.0) -> Scores:
    """Return scores whose corpus score is the mean of the items', times `scale`."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise DataError("there are no scores to average; expected one number or more.")
    statistics = np.stack([scale * array, np.ones_like(array)], axis=1)
    return Scores(statistics, _ratio, tuple(array.tolist()))


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Scores:
    """Return perplexity per answer token, from each item's summed loss in nats and its tokens."""
    statistics = np.stack([np.asarray(losses, float), np.asarray(tokens, float)], axis=1)
    return Scores(statistics, _exp_ratio, tuple(map(_exp_ratio, statistics)))


def score_qa(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Scores]:
    """Return exact match (em) and F1 (f1), in percent."""
    pairs = paired(predictions, references)
    return {
        "em": means([exact_match(*pair) for pair in pairs]),
        "f1": means([f1(*pair) for pair in pairs]),
    }


def score_translation(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: str = "13a"
) -> dict[str, Scores]:
    """Return sacrebleu's BLEU (bleu), chrF (chrf) and BLEU of single words (bleu1), in percent.

    Args:
        predictions: one a sentence.
        references: one or more a sentence.
        tokenize: sacrebleu's tokenizer for BLEU; zh for Chinese.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    paired(predictions, references)
    metrics = {
        "bleu": BLEU(tokenize=tokenize, force=True),
        "chrf": CHRF(),
        "bleu1": BLEU(tokenize=tokenize, max_ngram_order=1, force=True),
    }
    return {
        name: _sacrebleu_scores(metric, predictions, references) for name, metric in metrics.items()
    }


def _sacrebleu_scores(
    metric: Any, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Scores:
    """Take a sacrebleu metric apart as its own paired tests do: statistics, then their sum."""
    longest = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(longest)]
    statistics = np.array(metric._extract_corpus_statistics(list(predictions), streams), float)

    def combine(total: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(total.tolist()).score)

    return Scores(statistics, combine, tuple(map(combine, statistics)))


def score_summaries(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Scores]:
    """Return ROUGE-1, ROUGE-2 and ROUGE-L (F1, in percent) by rouge-score.

    Its own words are stems of ASCII letters, and accents part them. Where most letters of the
    references are others, texts are taken apart by `Words`, without stemming.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    letters = [c for refs in references for ref in _some(refs) for c in ref if c.isalpha()]
    other = 2 * sum(not c.isascii() for c in letters) > len(letters)
    scorer = RougeScorer(names, use_stemmer=True, tokenizer=Words() if other else None)
    found = [scorer.score_multi(refs, text) for text, refs in paired(predictions, references)]
    return {name: means([item[name].fmeasure for item in found]) for name in names}


class Words:
    """Takes texts of any script apart, for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text; signs of scripts without blanks are words by themselves."""
        return WORDS.findall(UNSPACED.sub(r" \g<0> ", text.lower()))


def tokenizer_for(language: str | None) -> str:
    """Return sacrebleu's tokenizer for a target language, such as de, zh or zh-CN.

    Raises:
        ConfigError: it would need a package that is not installed.
    """
    code = re.split(r"[-_]", (language or "").lower())[0]
    if code in ("th", "tha", "lo", "lao", "km", "khm", "my", "mya"):
        return "char"
    if code in ("ja", "jpn", "ko", "kor"):
        raise ConfigError(
            f"BLEU in {language!r} needs a word segmenter that firstlm does not bring; expected "
            "another target language."
        )
    return "zh" if code in ("zh", "zho", "chi", "cmn", "yue") else "13a"


def paired(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[tuple[str, Sequence[str]]]:
    """Return each prediction with its references, of which there must be one or more."""
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} items.")
    if not predictions:
        raise DataError("there are no predictions to score; expected one or more.")
    return [(text, _some(refs)) for text, refs in zip(predictions, references, strict=True)]


def _ratio(total: np.ndarray) -> float:
    return float(total[0] / total[1])


def _exp_ratio(total: np.ndarray) -> float:
    return float(np.exp(total[0] / total[1]))


def drawn_items(generator: np.random.Generator, count: int, groups: Groups | None) -> np.ndarray:
    """Draw groups with replacement, and return how often each of `count` items is drawn so."""
    if groups is None:
        return np.bincount(generator.integers(0, count, count), minlength=count)
    number = int(groups.max()) + 1
    return np.bincount(generator.integers(0, number, number), minlength=number)[groups]


def grouped(names: Sequence[str]) -> Groups:
    """Return a number from 0 on for each item, the same where names are."""
    return np.unique(np.asarray(names, dtype=object), return_inverse=True)[1]
