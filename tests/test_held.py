# SPDX-License-Identifier: Apache-2.0
"""Masks while LoRA trains: held if options say so; no penalty moves them where a rate is met."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training import adaptive_model, config, make_examples

from firstlm.adapters import add_lora
from firstlm.errors import ConfigError
from firstlm.held import HeldMasks
from firstlm.lora import lora_parameters
from firstlm.model import FirstModel
from firstlm.phases import train_lora
from firstlm.policies import RouterPolicy
from firstlm.probes import decide_all

PROMPTS = [row.prompt_ids for row in make_examples(256, 1)]
UNSEEN = [row.prompt_ids for row in make_examples(64, 2)]


@torch.no_grad()
def move(model: FirstModel, by: float) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_parameters(model).values():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def test_held_masks_are_those_of_the_beginning_and_leave_the_model_as_it_is(tmp_path: Path) -> None:
    model = adaptive_model(tmp_path)
    add_lora(model, config(tmp_path, lora_dropout=0.5))
    policy = RouterPolicy(model.routers)
    before = decide_all(model, UNSEEN, policy)
    held = HeldMasks(model, lora_parameters(model).values(), "skip", 16)
    move(model, 0.3)
    moved = {name: p.clone() for name, p in lora_parameters(model).items()}
    assert not torch.equal(decide_all(model, UNSEEN, policy), before)
    model.train()
    assert torch.equal(held.of(UNSEEN, policy), before)
    assert model.training
    assert all(torch.equal(p, moved[name]) for name, p in lora_parameters(model).items())


@pytest.mark.parametrize("prefill", ["skip", "full"])
def test_routers_follow_what_lora_made_of_the_states(tmp_path: Path, prefill: str) -> None:
    model = adaptive_model(tmp_path)
    add_lora(model, config(tmp_path))
    policies = [RouterPolicy(model.routers, offset) for offset in (0.0, -0.2)]
    held = HeldMasks(model, lora_parameters(model).values(), prefill, 16)
    before = [decide_all(model, UNSEEN, policy, prefill) for policy in policies]
    move(model, 0.15)

    def flipped() -> list[float]:
        now = [decide_all(model, UNSEEN, policy, prefill) for policy in policies]
        return [float((a != b).float().mean()) for a, b in zip(now, before, strict=True)]

    drifted = flipped()
    held.let_routers_follow(PROMPTS, policies)
    assert min(drifted) > 0.1
    assert all(after < 0.4 * found for after, found in zip(flipped(), drifted, strict=True))


def test_where_lora_moved_nothing_routers_stay(tmp_path: Path) -> None:
    model = adaptive_model(tmp_path)
    add_lora(model, config(tmp_path))
    before = {name: p.clone() for name, p in model.routers.named_parameters()}
    held = HeldMasks(model, lora_parameters(model).values(), "skip", 16)
    held.let_routers_follow(PROMPTS, [RouterPolicy(model.routers)])
    for name, parameter in model.routers.named_parameters():
        assert torch.allclose(parameter, before[name], atol=1e-6)


def test_masks_hold_while_lora_trains(tmp_path: Path, monkeypatch) -> None:
    examples = make_examples(280, 0)

    def flipped(name: str) -> float:
        settings = config(tmp_path / name, lora_lr=0.003, hold_masks=True, skip_rate=0.5)
        model = adaptive_model(tmp_path)
        record = train_lora(model, examples[:256], examples[256:], settings)
        rates = {rate for _, rate in record["curve"]["eval_skip_rate"]}
        assert len(rates) == 1  # of held masks
        assert record["ce_after"] < record["ce_before"]
        return record["flipped"]

    followed = flipped("followed")
    monkeypatch.setattr(HeldMasks, "let_routers_follow", lambda *_: None)
    assert followed < 0.4 * flipped("drifted")


def lora_after(tmp_path: Path, alpha: float, **changes) -> dict[str, torch.Tensor]:
    examples, model = make_examples(48, 0), adaptive_model(tmp_path)
    settings = config(tmp_path / str(alpha), lora_steps=3, alpha=alpha, **changes)
    train_lora(model, examples[:32], examples[32:], settings)
    return {name: p.detach().clone() for name, p in lora_parameters(model).items()}


@pytest.mark.parametrize("rate", [0.25, None])
def test_the_penalty_moves_lora_only_where_nothing_else_meets_a_rate(
    tmp_path: Path, rate: float | None
) -> None:
    """Offsets hold an asked rate; a penalty beside them would only drive masks away."""
    without, weighed = (lora_after(tmp_path, alpha, skip_rate=rate) for alpha in (0.0, 3.0))
    same = all(torch.equal(part, weighed[name]) for name, part in without.items())
    assert same == (rate is not None)


@pytest.mark.parametrize(
    "changes", [{"policy": "random"}, {"skip_rate": 0.0}, {"stage": "joint"}, {"stage": "routers"}]
)
def test_masks_are_held_for_routers_that_lora_comes_after(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ConfigError, match="hold_masks"):
        config(tmp_path, hold_masks=True, **changes)
