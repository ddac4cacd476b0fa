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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from firstlm.errors import ConfigError, DataError

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

    def estimate(
        self, *, groups: Groups | None = None, samples: int = 1000, seed: int = 0
    ) -> Estimate:
        """Return the corpus score, with the interval of the scores of resampled items.

        `groups` [items] names what items share; those of a group are drawn together.
        """
        count = len(self.items)
        drawn = [self.combine(total) for (total,) in _resampled([self], groups, samples, seed)]
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Estimate(self.combine(self.statistics.sum(0)), float(low), float(high), count)


def retention(
    ours: Scores,
    base: Scores,
    *,
    groups: Groups | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return our corpus score over the base's, both over the same items, resampled together.

    `groups` as for `Scores.estimate`.
    A base that scores 0 leaves nothing to retain: the value is nan.
    """
    if len(ours.items) != len(base.items):
        raise DataError(
            f"{len(ours.items)} scores against {len(base.items)} of the base: other items."
        )
    below = base.combine(base.statistics.sum(0))
    if not below:
        return Estimate(float("nan"), float("nan"), float("nan"), len(ours.items))
    drawn = []
    for mine, theirs in _resampled([ours, base], groups, samples, seed):
        whole = base.combine(theirs)
        if whole:  # a draw of items that the base all fails says nothing
            drawn.append(ours.combine(mine) / whole)
    low, high = np.percentile(drawn, [2.5, 97.5])
    value = ours.combine(ours.statistics.sum(0)) / below
    return Estimate(value, float(low), float(high), len(ours.items))


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
    """Return the mean score over seeds, or its share of the base's, with a hierarchical interval.

    Every draw takes groups of items with replacement, the same for all seeds, and adds by how much
    some draw of the seeds differs from all of them on the whole corpus: what training and what the
    test set leaves to chance are both in the interval. Draws of n seeds vary by (n - 1) / n of what
    seeds do, so their difference is stretched by the root of its inverse (Rao and Wu, 1988).
    Differences are factors for shares of the base's, which stay above 0. A single seed leaves this
    part out; where seeds differ by far more than items leave to chance, the interval over three
    holds the mean of all seeds in four of five cases only, over two in three of five.

    Args:
        ours: one a seed, all over the same items.
        base: the base's, one a seed; None for the score itself.
        groups: what items share [items], as for `Scores.estimate`.
        paired: the base's seeds are ours, in the same order, and are drawn together; False draws
            them for themselves.
        difference: return what it is above the base's instead of the share.
        samples: number of draws.
        seed: of the draws.
    """
    sides = [ours] if base is None else [ours, base]
    count = len(ours[0].items)
    if any(len(scores.items) != count for side in sides for scores in side):
        raise DataError("These scores are over different numbers of items.")
    if paired and len({len(side) for side in sides}) > 1:
        raise DataError(f"{len(ours)} seeds cannot be paired with {len(sides[1])} of the base.")
    share = base is not None and not difference

    def value(by_side: Sequence[np.ndarray]) -> np.ndarray:
        """Return the result from the scores [..., seeds] of each side."""
        first, *others = (scores.mean(-1) for scores in by_side)
        if not others:
            return first
        if difference:
            return first - others[0]
        nothing = np.full(np.broadcast_shapes(first.shape, others[0].shape), np.nan)
        return np.divide(first, others[0], out=nothing, where=others[0] != 0)

    def scored(times: np.ndarray) -> list[np.ndarray]:
        """Return each side's scores [draws, seeds] where items count so often [draws, items]."""
        return [
            np.stack([[one.combine(t) for t in times @ one.statistics] for one in side], axis=1)
            for side in sides
        ]

    whole = [scores[0] for scores in scored(np.ones((1, count)))]
    everything = float(value(whole))
    items, seeds = (np.random.default_rng([seed, i]) for i in range(2))
    drawn = value(scored(np.stack([drawn_items(items, count, groups) for _ in range(samples)])))
    drawing = sides[: 1 if paired else 2]
    picks = [[seeds.integers(0, len(side), len(side)) for side in drawing] for _ in range(samples)]
    for turn, picked in enumerate(zip(*picks, strict=True)):
        # Paired, both sides take one draw; otherwise each in turn, the other side whole.
        part = [
            scores[np.stack(picked)] if paired or side == turn else scores
            for side, scores in enumerate(whole)
        ]
        many = len(drawing[turn])
        stretch = math.sqrt(many / (many - 1)) if many > 1 else 0.0
        if not share:
            drawn = drawn + stretch * (value(part) - everything)
        elif everything:
            drawn = drawn * (value(part) / everything) ** stretch
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if not np.isnan(drawn).all() else (np.nan,) * 2
    if not difference:
        low = max(low, 0.0)
    return Estimate(everything, float(low), float(high), count)


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


def _resampled(
    scores: Sequence[Scores], groups: Groups | None, samples: int, seed: int
) -> Iterator[list[np.ndarray]]:
    """Yield each metric's summed statistics over the same items, drawn with replacement."""
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        times = drawn_items(generator, len(scores[0].items), groups)
        yield [times @ one.statistics for one in scores]


def drawn_items(generator: np.random.Generator, count: int, groups: Groups | None) -> np.ndarray:
    """Draw groups with replacement, and return how often each of `count` items is drawn so."""
    if groups is None:
        return np.bincount(generator.integers(0, count, count), minlength=count)
    number = int(groups.max()) + 1
    return np.bincount(generator.integers(0, number, number), minlength=number)[groups]


def grouped(names: Sequence[str]) -> Groups:
    """Return a number from 0 on for each item, the same where names are."""
    return np.unique(np.asarray(names, dtype=object), return_inverse=True)[1]
