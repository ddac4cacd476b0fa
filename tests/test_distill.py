# SPDX-License-Identifier: Apache-2.0
"""Distillation from the full depth: what is measured, and that training brings it down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import config, make_examples, make_model

from firstlm.data import Collator
from firstlm.losses import full_depth_states, state_distance
from firstlm.train import train_lora


def test_distance_is_relative_to_the_wanted_states_and_leaves_padding_out() -> None:
    wanted = torch.tensor([[[100.0, 100.0], [3.0, 4.0], [0.0, 2.0]]])
    states = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]])
    mask = torch.tensor([[0, 1, 1]])
    assert state_distance(states, wanted, mask).item() == pytest.approx((1 / 25 + 4 / 4) / 2)


def test_full_depth_states_are_those_of_run_all_and_take_no_gradient() -> None:
    model = make_model()
    inputs = Collator(0)(make_examples(4, seed=1))
    with torch.no_grad():
        for router in model.routers:
            router.bias.fill_(-1.0)  # the routers would skip everything
    found = full_depth_states(model, inputs)
    with model.run_all():
        output, _ = model(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    torch.testing.assert_close(found, output.hidden_states[-1])
    assert not found.requires_grad


def test_distillation_brings_a_skipping_model_closer_to_full_depth(tmp_path: Path) -> None:
    distances = {}
    for weight in (0.0, 5.0):
        model = make_model()
        with torch.no_grad():
            for i, router in enumerate(model.routers):
                router.bias.fill_(-5.0 if i == 1 else 5.0)
        examples = make_examples(64, seed=1)
        options = config(
            tmp_path / str(weight), distill=weight, lora_steps=30, skip_rate=None, skip_rates=None
        )
        train_lora(model, examples, examples[:16], options)
        inputs = Collator(0)(examples[:16])
        with torch.no_grad():
            output, _ = model(
                inputs["input_ids"],
                inputs["attention_mask"],
                prompt_mask=inputs["prompt_mask"],
                output_hidden_states=True,
            )
        distances[weight] = state_distance(
            output.hidden_states[-1], full_depth_states(model, inputs), inputs["attention_mask"]
        ).item()
    assert distances[5.0] < 0.9 * distances[0.0]
