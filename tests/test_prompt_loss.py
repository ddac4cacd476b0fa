# SPDX-License-Identifier: Apache-2.0
"""Next-token loss on prompts: what it measures, and that LoRA learns from it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from training import config, make_model

from firstlm.data import Collator, Encoded
from firstlm.losses import (
    answer_logits,
    answer_pass,
    prompt_cross_entropy,
    prompt_positions,
)
from firstlm.phases import train_lora
from firstlm.policies import RunAll


def rows(count: int, seed: int = 0) -> list[Encoded]:
    """Prompts of two letters again and again, and answers that say nothing about them."""
    rng = random.Random(seed)
    return [Encoded([97, 98] * rng.randrange(2, 6), [120, 257]) for _ in range(count)]


@torch.no_grad()
def test_it_is_the_mean_over_tokens_of_prompts_and_nothing_else() -> None:
    model, inputs = make_model(), Collator(0)(rows(6))
    positions = prompt_positions(inputs)
    assert 0 < len(positions) <= 16
    state = model.new_state(inputs["prompt_mask"], RunAll())
    output, labels = answer_pass(model, inputs, state, also=positions)
    found = prompt_cross_entropy(output.logits[:, : len(positions)], inputs, positions)
    losses = []
    for row in rows(6):
        ids = torch.tensor([row.prompt_ids])
        logits = model.base(input_ids=ids).logits[0, :-1]
        longest = inputs["input_ids"].shape[1] - len(row.answer_ids)
        for place, loss in enumerate(F.cross_entropy(logits, ids[0, 1:], reduction="none")):
            if longest - len(row.prompt_ids) + place in positions.tolist():
                losses.append(loss.item())
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    state = model.new_state(inputs["prompt_mask"], RunAll())
    logits, known = answer_logits(model, inputs, state)
    assert torch.equal(known, labels)
    assert torch.allclose(output.logits[:, len(positions) :], logits, atol=1e-5)


def test_long_prompts_are_sampled_anew_each_time() -> None:
    inputs = Collator(0)([Encoded(list(range(97, 123)) * 2, [120, 257])])
    drawn = [prompt_positions(inputs).tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]
    for found in drawn:
        assert len(found) == 16
        assert found == sorted(set(found))
        assert max(found) < 51  # the last token of the prompt is followed by the answer


def test_lora_learns_prompts_too(tmp_path: Path) -> None:
    def prompt_ce(weight: float) -> float:
        model, folder = make_model(), tmp_path / str(weight)
        options = config(folder, lora_steps=60, skip_rate=0.0, stage="lora", prompt_loss=weight)
        train_lora(model, rows(256), rows(16, 1), options)
        log = (folder / "artifact-run" / "log_lora.jsonl").read_text().splitlines()
        assert ("prompt_ce" in json.loads(log[-1])) == (weight > 0)
        inputs = Collator(0)(rows(64, seed=2))
        with torch.no_grad():
            positions = prompt_positions(inputs)
            state = model.new_state(inputs["prompt_mask"], RunAll())
            output, _ = answer_pass(model, inputs, state, also=positions)
            return float(
                prompt_cross_entropy(output.logits[:, : len(positions)], inputs, positions)
            )

    assert prompt_ce(1.0) < prompt_ce(0.0) - 0.3


def test_prompts_of_one_token_have_none(tmp_path: Path) -> None:
    short = [Encoded([97 + i], [120, 257]) for i in range(8)]
    options = config(tmp_path, lora_steps=1, skip_rate=0.0, stage="lora", prompt_loss=1.0)
    assert train_lora(make_model(), short, short, options)["steps"] == 1
