# SPDX-License-Identifier: Apache-2.0
"""The distance to the full depth: what is measured, and that routers learn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from training import config, make_examples, make_model

from firstlm.adapters import add_lora
from firstlm.config import TrainConfig
from firstlm.data import Collator
from firstlm.losses import FullDepth, answer_divergence, answer_pass, state_distance
from firstlm.model import FirstModel
from firstlm.phases import train_lora, train_routers, work_folder
from firstlm.policies import FixedMask, RunAll


def test_distance_is_relative_to_the_wanted_states_and_leaves_padding_out() -> None:
    wanted = torch.tensor([[[100.0, 100.0], [3.0, 4.0], [0.0, 2.0]]])
    states = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]])
    mask = torch.tensor([[0, 1, 1]])
    assert state_distance(states, wanted, mask).item() == pytest.approx((1 / 25 + 4 / 4) / 2)


def test_divergence_is_that_of_answer_tokens() -> None:
    wanted = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    logits = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log() + 3.0
    found = answer_divergence(logits, wanted)
    both = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert found.item() == pytest.approx(both / 2)


def test_the_full_depth_has_no_dropout_and_leaves_the_mode_as_it_was(tmp_path: Path) -> None:
    model, inputs = skipping(1), Collator(0)(make_examples(4, seed=1))
    add_lora(model, config(tmp_path, lora_dropout=0.5))
    with torch.no_grad():
        for weight in (p for name, p in model.named_parameters() if "lora_B" in name):
            weight.fill_(0.1)
    first, again = (FullDepth.of(model.train(), inputs) for _ in range(2))
    assert torch.equal(first.states, again.states)
    assert not first.states.requires_grad
    assert not first.logits.requires_grad
    assert model.training


def log_of(settings: TrainConfig, phase: str) -> list[dict]:
    lines = (work_folder(settings) / f"log_{phase}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def skipping(layer: int) -> FirstModel:
    """Return a model whose routers skip one layer for every prompt."""
    model = make_model()
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.bias.fill_(-5.0 if i == layer else 5.0)
    return model


@torch.no_grad()
def test_the_full_depth_is_all_layers_and_far_from_fewer() -> None:
    model, inputs = skipping(1), Collator(0)(make_examples(4, seed=1))
    full = FullDepth.of(model, inputs)
    found = []
    for policy in (RunAll(), FixedMask([True, False] + [True] * (model.layer_count - 2))):
        state = model.new_state(inputs["prompt_mask"], policy)
        output, _ = answer_pass(model, inputs, state, output_hidden_states=True)
        states, logits = output.hidden_states[-1], output.logits
        found.append(full.distance(states, logits, inputs["attention_mask"]).item())
    assert found[0] == 0.0
    assert found[1] > 0.01


def learnt(tmp_path: Path, **changes) -> torch.Tensor:
    model = skipping(1)
    # Of one length, so that means over tokens are means over rows, however batches are cut.
    examples = [e for e in make_examples(1024, seed=1) if len(e.prompt_ids) == 8][:64]
    plain = {"router_steps": 4, "max_grad_norm": 1e9}
    train_routers(model, examples, examples[:16], config(tmp_path, **{**plain, **changes}))
    return torch.stack([router.weight.detach() for router in model.routers])


def test_lora_is_taught_by_the_model_as_it_was_with_all_layers(tmp_path: Path) -> None:
    """What is taught stays closer to that model, whose own LoRA learns along otherwise."""
    examples, found, states = make_examples(64, seed=1), [], []
    held = Collator(0)(make_examples(16, seed=2))
    for weight in (0.0, 20.0):
        model = skipping(1)
        plain = config(tmp_path / "plain", stage="lora", skip_rate=0.0, lora_steps=20)
        train_lora(model, examples, examples[:16], plain)
        settings = config(tmp_path / str(weight), lora_steps=30, teach=weight)
        before = FullDepth.of(model, held)
        record = train_lora(model, examples, examples[:16], settings)
        state = model.new_state(held["prompt_mask"])
        with torch.no_grad():
            output, _ = answer_pass(model, held, state, output_hidden_states=True)
        last = output.hidden_states[-1]
        found.append(before.distance(last, output.logits, held["attention_mask"]).item())
        states.append(before.states)
        assert ("distance" in log_of(settings, "lora")[-1]) == (weight > 0)
        assert record["steps"] == 30
    assert torch.equal(*states)  # both were taught by the same
    assert found[1] < 0.7 * found[0]


def test_the_teacher_stands_still(tmp_path: Path, monkeypatch) -> None:
    model, examples, seen = skipping(1), make_examples(32, seed=1), []
    plain = config(tmp_path / "plain", stage="lora", skip_rate=0.0, lora_steps=2)
    train_lora(model, examples, examples[:16], plain)
    settings = config(tmp_path / "taught", lora_steps=4, teach=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}

    def noted(cls, first, inputs):
        seen.append({n: p.detach().clone() for n, p in first.named_parameters() if n in before})
        return measure(first, inputs)

    measure = FullDepth.of
    monkeypatch.setattr(FullDepth, "of", classmethod(noted))
    train_lora(model, examples, examples[:16], settings)
    assert len(seen) == 4
    for weights in seen:
        assert all(torch.equal(weights[name], p) for name, p in before.items())
    now = dict(model.named_parameters())
    assert not all(torch.equal(now[name], p) for name, p in before.items())


def test_routers_learn_from_the_distance_too(tmp_path: Path) -> None:
    found = [learnt(tmp_path / str(weight), distill=weight) for weight in (0.0, 5.0)]
    assert not torch.allclose(*found)


def test_lora_learns_from_answers_alone(tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 5.0):
        model, examples = skipping(1), make_examples(32, seed=1)
        options = config(tmp_path / str(weight), distill=weight, lora_steps=2)
        train_lora(model, examples, examples[:8], options)
        found.append([p for name, p in model.named_parameters() if "lora_" in name])
    assert all(map(torch.equal, *found))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"grad_accum": 2}])
def test_the_distance_is_the_same_with_less_memory(tmp_path: Path, change: dict) -> None:
    """Two passes with decisions of their own; each must be replayed and scaled as its own."""
    plain = {"distill": 2.0, "skip_rate": None, "skip_rates": None}
    wanted = learnt(tmp_path / "wanted", **plain, batch_size=16)
    half = {"batch_size": 8} if "grad_accum" in change else {"batch_size": 16}
    found = learnt(tmp_path / "found", **plain, **half, **change)
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-5)


def test_the_distance_keeps_routers_off_layers_that_matter(tmp_path: Path) -> None:
    """With nothing but the penalty, layers go alike; with the distance, the costly ones stay."""
    examples = make_examples(64, seed=1)
    found = {}
    for weight in (0.0, 50.0):
        model = make_model()
        options = config(
            tmp_path / str(weight), distill=weight, skip_rate=None, alpha=0.5, router_steps=40
        )
        train_routers(model, examples, examples[:16], options)
        inputs = Collator(0)(examples[:16])
        full = FullDepth.of(model, inputs)
        state = model.new_state(inputs["prompt_mask"])
        with torch.no_grad():
            output, _ = answer_pass(model, inputs, state, output_hidden_states=True)
        found[weight] = full.distance(
            output.hidden_states[-1], output.logits, inputs["attention_mask"]
        ).item()
    assert found[50.0] < 0.9 * found[0.0]
