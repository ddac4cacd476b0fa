# SPDX-License-Identifier: Apache-2.0
"""Distillation from the full depth: what is measured, and that training brings it down."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training import config, make_examples, make_model

from firstlm.data import Collator
from firstlm.losses import Teacher, answer_divergence, state_distance
from firstlm.model import FirstModel
from firstlm.phases import add_lora, train_lora, train_routers
from firstlm.policies import RunAll


def test_distance_is_relative_to_the_wanted_states_and_leaves_padding_out() -> None:
    wanted = torch.tensor([[[100.0, 100.0], [3.0, 4.0], [0.0, 2.0]]])
    states = torch.tensor([[[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]]])
    mask = torch.tensor([[0, 1, 1]])
    assert state_distance(states, wanted, mask).item() == pytest.approx((1 / 25 + 4 / 4) / 2)


def test_divergence_is_that_of_answer_tokens() -> None:
    wanted = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]).log()[None]
    logits = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.5, 0.5]]).log()[None] + 3.0
    found = answer_divergence(logits, wanted, torch.tensor([[-100, -100, 1]]))
    assert found.item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))


def test_the_teacher_has_no_dropout_and_leaves_the_mode_as_it_was(tmp_path: Path) -> None:
    model, inputs = skipping(1), Collator(0)(make_examples(4, seed=1))
    add_lora(model, config(tmp_path, lora_dropout=0.5))
    for weight in lora_b(model).values():
        weight.fill_(0.1)
    teacher = Teacher(model.train())
    first, again = (teacher.answer(inputs)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert model.training


def skipping(layer: int) -> FirstModel:
    """Return a model whose routers skip one layer for every prompt."""
    model = make_model()
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.bias.fill_(-5.0 if i == layer else 5.0)
    return model


def trained(tmp_path: Path, **changes) -> FirstModel:
    model = skipping(1)
    # Of one length, so that means over tokens are means over rows, however batches are cut.
    examples = [e for e in make_examples(1024, seed=1) if len(e.prompt_ids) == 8][:64]
    options = config(tmp_path, skip_rate=None, skip_rates=None, **changes)
    train_lora(model, examples, examples[:16], options)
    return model


@torch.no_grad()
def last_states(model: FirstModel, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    output, _ = model(
        inputs["input_ids"],
        inputs["attention_mask"],
        prompt_mask=inputs["prompt_mask"],
        output_hidden_states=True,
        **options,
    )
    return output.hidden_states[-1]


def lora_b(model: FirstModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_B" in name}


def test_the_teacher_is_the_full_depth_as_it_was_and_takes_no_gradient(tmp_path: Path) -> None:
    model, inputs = skipping(1), Collator(0)(make_examples(4, seed=1))
    add_lora(model, config(tmp_path))
    at_first = last_states(model, inputs, policy=RunAll())
    teacher = Teacher(model)
    with torch.no_grad():
        for weight in lora_b(model).values():
            weight.fill_(0.1)
    now = last_states(model, inputs, policy=RunAll())
    found, logits = teacher.answer(inputs)
    assert torch.allclose(
        logits, model.plain_base.lm_head(at_first)[:, -logits.shape[1] :], atol=1e-5
    )
    torch.testing.assert_close(found, at_first)
    assert not torch.allclose(found, now)
    assert not torch.allclose(found, last_states(model, inputs))
    assert not found.requires_grad
    assert not logits.requires_grad
    torch.testing.assert_close(last_states(model, inputs, policy=RunAll()), now)


def test_a_teacher_in_bfloat16_leaves_no_weights_to_the_student(tmp_path: Path) -> None:
    """Autocast keeps its casts of a parameter; the teacher's must not serve the student."""
    found = []
    for distill in (0.0, 1e-9):
        model = skipping(1)
        model.base.to(torch.bfloat16)
        examples = make_examples(32, seed=1)
        more = {"skip_rate": None, "skip_rates": None, "lora_steps": 6, "distill": distill}
        train_lora(model, examples, examples[:8], config(tmp_path / str(distill), **more))
        found.append(lora_b(model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-4)


def test_distilling_from_a_base_that_has_not_learnt_the_task_is_said(tmp_path: Path, capsys):
    trained(tmp_path, distill=1.0, lora_steps=1)
    assert "Warning: distill" in capsys.readouterr().out
    trained(tmp_path, distill=0.0, lora_steps=1)
    assert "Warning" not in capsys.readouterr().out


def test_routers_learn_from_the_distance_too(tmp_path: Path) -> None:
    weights = {}
    for distill in (0.0, 5.0):
        model, examples = skipping(1), make_examples(64, seed=1)
        options = config(tmp_path / str(distill), distill=distill, router_steps=4)
        train_routers(model, examples, examples[:16], options)
        weights[distill] = torch.stack([router.weight.detach() for router in model.routers])
    assert not torch.allclose(weights[0.0], weights[5.0])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"grad_accum": 2}])
def test_distillation_is_the_same_with_less_memory(tmp_path: Path, change: dict) -> None:
    """Two passes with decisions of their own; each must be replayed and scaled as its own."""
    plain = {"distill": 2.0, "lora_steps": 3, "max_grad_norm": 1e9}
    wanted = lora_b(trained(tmp_path / "wanted", **plain, batch_size=16))
    half = {"batch_size": 8} if "grad_accum" in change else {"batch_size": 16}
    found = lora_b(trained(tmp_path / "found", **plain, **half, **change))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-3, atol=2e-5)


def test_distillation_brings_a_skipping_model_closer_to_the_full_depth_it_had(
    tmp_path: Path,
) -> None:
    inputs = Collator(0)(make_examples(16, seed=1))
    wanted = last_states(skipping(1), inputs, policy=RunAll())
    distances = {}
    for weight in (0.0, 5.0):
        model = trained(tmp_path / str(weight), distill=weight, lora_steps=30)
        found = last_states(model, inputs)
        distances[weight] = state_distance(found, wanted, inputs["attention_mask"]).item()
    assert distances[5.0] < 0.9 * distances[0.0]
