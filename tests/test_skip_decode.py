# SPDX-License-Identifier: Apache-2.0
"""SkipDecode: layers go as the answer grows, for good, and rates count tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import batch, make_model
from training import config, write_run

from firstlm import FirstModel, RouterConfig, cli
from firstlm.baselines import Baseline, SkipDecode
from firstlm.data import Collator, Encoded
from firstlm.errors import ConfigError
from firstlm.evaluate import decode_steps
from firstlm.losses import answer_logits
from firstlm.masks import describe_rates
from firstlm.train import run

ANSWERS = [0, 5, 9, 20, 30, 12, 4, 1]  # of which n take n decode steps
FAMILIES = ["llama", "mistral", "gemma3", "gpt2", "gpt_oss"]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.4, 0.6])
@pytest.mark.parametrize("layers", [12, 30])
def test_the_rate_is_met_over_all_tokens(layers: int, rate: float) -> None:
    policy = SkipDecode(layers, rate, ANSWERS)
    lives = [policy.lifetime(layer) for layer in range(layers)]
    ran = total = 0
    for steps, count in enumerate(ANSWERS):
        for step in range(steps):
            ran += count * sum(step < life for life in lives)
            total += count * layers
    assert 1 - ran / total == pytest.approx(rate, abs=0.02)
    assert lives[1:-1] == sorted(lives[1:-1])  # from below
    assert lives[0] == lives[-1] > 10**6


def test_locked_layers_stay() -> None:
    policy = SkipDecode(12, 0.3, ANSWERS, free=[2, 3, 5, 8, 11])
    assert [layer for layer in range(12) if policy.lifetime(layer) < 10**6] == [2, 3, 5, 8]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_computes_what_a_pass_over_the_whole_row_does(
    name: str, unit: str, cache: str
) -> None:
    first = FirstModel.from_base(make_model(name), RouterConfig(unit=unit))
    count = first.layer_count
    policy = Goes({1: 0, 2: 3}, count)
    ids, mask = batch((9, 4, 7), "left")
    new = 7
    out = first.generate(
        ids,
        attention_mask=mask,
        policy=policy,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        cache_implementation=cache,
        output_logits=True,
    )
    assert out.layer_calls == {"prefill": count, "decode": count * (new - 1) - (new - 1) - 3}
    assert out.keep.all()
    assert out.cache.state.skip_rates([new - 1, 2, 0]) == pytest.approx(
        [(new - 1 + new - 4) / (count * (new - 1)), 1 / count, 0]
    )
    kept = out.cache.state.keep_after([new - 1, 3, 0])
    assert [(~row).nonzero().flatten().tolist() for row in kept] == [[1, 2], [1], []]
    if unit != "mlp" and cache == "dynamic":
        assert out.cache.layers[1].keys is None
        assert out.cache.layers[2].keys is None
    whole = torch.cat([mask, torch.ones_like(out.sequences[:, ids.shape[1] :])], dim=1)
    prompt = whole.clone()
    prompt[:, ids.shape[1] :] = 0
    logits = first(out.sequences, whole, policy, prompt_mask=prompt)[0].logits
    for step, found in enumerate(out.hf.logits):
        wanted = logits[:, ids.shape[1] - 1 + step]
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-4)


class Goes(SkipDecode):
    """Layers with lifetimes that a test chooses."""

    def __init__(self, lives: dict[int, int], layers: int) -> None:
        super().__init__(layers, 0.1, ANSWERS)
        self._lives = lives


def test_losses_see_the_steps_of_each_row() -> None:
    """Rows of one batch whose answers begin at different places lose layers at their own steps."""
    first = FirstModel.from_base(make_model("llama"), RouterConfig())
    rows = [Encoded([5, 6, 7, 8], [9, 10, 11, 12]), Encoded([5, 6], [9, 10]), Encoded([4], [9] * 6)]
    policy = Goes({1: 0, 2: 2}, first.layer_count)

    def logits(rows: list[Encoded]) -> torch.Tensor:
        inputs = Collator(0)(rows)
        return answer_logits(first, inputs, first.new_state(inputs["prompt_mask"], policy))[0]

    parts = logits(rows).split([len(row.answer_ids) for row in rows])
    for row, part in zip(rows, parts, strict=True):
        torch.testing.assert_close(part, logits([row]))


def test_answers_are_counted_in_decode_steps() -> None:
    first = FirstModel.from_base(make_model("llama"), RouterConfig())
    first.base.generation_config.eos_token_id = [2, 3]
    new = torch.tensor([[9, 9, 9, 9], [9, 9, 3, 0], [9, 9, 0, 0], [2, 0, 0, 0], [9, 2, 0, 0]])
    # The first never ended, the third ended by its text; the others by an end token.
    steps = decode_steps(new, [False, False, True, False, False], first)
    assert steps == [3, 2, 1, 0, 1]
    rates = np.array([[0.5, 3], [0.2, 1], [0.0, 0]])
    assert describe_rates(*rates.T)["mean"] == 1.7 / 4
    assert describe_rates(*(rates * 0).T)["mean"] == 0  # answers of one token each


def test_lora_learns_under_it_and_eval_counts_tokens(
    tmp_path: Path, byte_tokenizer, capsys
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["completion"] = " " + "abc" * (1 + i % 4)
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = config(
        tmp_path, model=str(folder), data=str(data), lora_steps=2, policy="skip_decode",
        skip_rate=0.3,
    )  # fmt: skip
    assert run(settings) == 0
    model = FirstModel.from_pretrained(settings.output)
    assert model.baseline is not None
    assert model.baseline.name == "skip_decode"
    answers = model.baseline.answers
    assert sum(answers) == 54
    assert all(answers[n] for n in (4, 7, 10, 13))  # a space, letters, and the end, less one
    words = ["eval", settings.output, "--data", str(data), "--limit", "9", "--task", "qa"]
    words += ["--max-new-tokens", "5", "--output", str(tmp_path / "scores.json")]
    words += ["--policies", "skip_decode", "--skip-rates", "0.3", "0.15"]
    assert cli.main(words) == 0
    runs = json.loads((tmp_path / "scores.json").read_text())["runs"]
    for rate in (0.3, 0.15):
        found = runs[f"skip_decode@{rate}"]
        lives = [model.baseline.at(rate).lifetime(layer) for layer in range(6)]
        calls, steps = found["layer_calls"]["decode"], found["decode_steps"]
        # An untrained model seldom ends an answer, so the batch's steps are every row's.
        gone = sum(max(4 - life, 0) for life in lives) / (6 * 4)
        assert calls / (6 * steps) == pytest.approx(1 - gone)
        assert found["skip_rate"]["mean"] == pytest.approx(gone, abs=0.03)
        assert found["distinct_masks"] <= 4


def test_what_it_lacks_is_said(tmp_path: Path) -> None:
    model = FirstModel.from_base(make_model("llama"), RouterConfig())
    with pytest.raises(ConfigError, match="train --policy skip_decode"):
        model.baseline_for("skip_decode", 0.25)
    with pytest.raises(ConfigError, match="lengths of answers"):
        Baseline("skip_decode", 8, tuple(range(8)), 0.25)
    with pytest.raises(ConfigError, match="more than one token"):
        SkipDecode(8, 0.25, [4])
    with pytest.raises(ConfigError, match="only 6 lie in between"):
        SkipDecode(8, 0.8, ANSWERS)
