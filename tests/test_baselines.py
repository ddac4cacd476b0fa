# SPDX-License-Identifier: Apache-2.0
"""Policies to compare with: exact rates, the same mask for the same prompt, layers as promised."""

from __future__ import annotations

import pytest
import torch
from training import make_examples, make_model

from firstlm.baselines import OrderedSkip, RandomSkip, UnifiedSkip, random_order, truncation
from firstlm.data import pad_left
from firstlm.errors import ConfigError
from firstlm.losses import mean_loss

LAYERS = 8


def policies(rate: float) -> dict:
    return {
        "ordered": OrderedSkip([3, 1, 4, 0, 5], LAYERS, rate),
        "random": RandomSkip(LAYERS, rate),
        "interior": RandomSkip(LAYERS, rate, free=range(1, LAYERS - 1)),
        "unified": UnifiedSkip(LAYERS, rate),
        "truncation": OrderedSkip(truncation(LAYERS), LAYERS, rate),
        "one draw": OrderedSkip(random_order(LAYERS), LAYERS, rate),
    }


@pytest.mark.parametrize("name", list(policies(0.25)))
@pytest.mark.parametrize("rate", [0.0, 0.25, 0.3, 0.5])
def test_rates_are_met_with_two_numbers_of_layers_at_most(name: str, rate: float) -> None:
    policy = policies(rate)[name]
    counts = [policy.mask(key).count(False) for key in range(4000)]
    assert sum(counts) / len(counts) / LAYERS == pytest.approx(rate, abs=0.005)
    assert set(counts) <= {int(rate * LAYERS), -int(-rate * LAYERS // 1)}


@pytest.mark.parametrize("name", list(policies(0.25)))
def test_a_prompt_has_one_mask_alone_batched_and_padded(name: str) -> None:
    model, policy = make_model(), policies(0.3)[name]
    prompts = [row.prompt_ids for row in make_examples(12, 0)]
    ids, mask = pad_left(prompts, 0)
    batched = model.decide(ids, mask, policy).keep
    right = torch.zeros_like(ids)
    for i, row in enumerate(prompts):
        right[i, : len(row)] = torch.tensor(row)
        alone = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)
        assert torch.equal(model.decide(*alone, policies(0.3)[name]).keep[0], batched[i])
        made = model.generate(alone[0], policy=policy, max_new_tokens=2, do_sample=False)
        assert torch.equal(made.keep[0], batched[i])
    sides = model.decide(right, mask.flip(1).sort(1, descending=True).values, policy).keep
    assert torch.equal(sides, batched)


def test_which_layers_go() -> None:
    assert OrderedSkip([3, 1, 4], LAYERS, 0.25).mask(0) == [True, False, True, False] + [True] * 4
    assert OrderedSkip(truncation(LAYERS), LAYERS, 0.25).mask(7) == [True] * 6 + [False] * 2
    unified = {
        tuple(i for i, kept in enumerate(UnifiedSkip(LAYERS, count / LAYERS).mask(0)) if not kept)
        for count in (1, 2, 3)
    }
    assert unified == {(4,), (2, 5), (2, 4, 6)}
    drawn = {tuple(RandomSkip(LAYERS, 0.25).mask(key)) for key in range(300)}
    assert len(drawn) == 28  # all pairs of eight
    inner = [RandomSkip(LAYERS, 0.25, free=range(1, LAYERS - 1)).mask(key) for key in range(300)]
    assert all(mask[0] and mask[-1] for mask in inner)


def test_seeds_draw_other_layers_and_other_prompts() -> None:
    masks = [[RandomSkip(LAYERS, 0.25, seed=s).mask(key) for key in range(50)] for s in (0, 1)]
    assert masks[0] != masks[1]
    assert random_order(LAYERS, seed=0) != random_order(LAYERS, seed=1)
    counts = [
        [OrderedSkip([1, 2, 3], LAYERS, 0.3, seed=s).mask(key).count(False) for key in range(50)]
        for s in (0, 1)
    ]
    assert counts[0] != counts[1]


def test_losses_are_measured_under_them() -> None:
    model, rows = make_model(), make_examples(16, 0)
    loss, keep = mean_loss(model, rows, RandomSkip(LAYERS, 0.5), 4)
    assert loss > 0
    assert keep.sum(1).tolist() == [4] * 16
    assert len(keep.unique(dim=0)) > 4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OrderedSkip([1, 1], LAYERS, 0.1), "different layers below 8"),
        (lambda: OrderedSkip([9], LAYERS, 0.1), "different layers below 8"),
        (lambda: OrderedSkip([1], LAYERS, 0.5), "only 1 may be skipped"),
        (lambda: UnifiedSkip(LAYERS, 0.875).mask(0), "only 6 lie in between"),
        (lambda: RandomSkip(LAYERS, float("nan")), "skip_rate is nan"),
    ],
)
def test_what_cannot_be_skipped_is_refused(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()
