# SPDX-License-Identifier: Apache-2.0
"""Groups of prompts, and routers that start from a ranking for each group."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from training import LAYERS, config, make_model

from firstlm.clusters import group, router_inputs, start_from_orders
from firstlm.data import Encoded
from firstlm.importance import SPACING
from firstlm.phases import train_routers
from firstlm.policies import FixedMask, RouterPolicy

ORDERS = [[1, 2, 3, 4, 5, 6, 7, 0], [6, 5, 4, 3, 2, 1, 0, 7]]


def prompts(count: int, seed: int) -> tuple[list[list[int]], torch.Tensor]:
    """Return prompts in capitals or in small letters, and which of the two each is in."""
    rng = random.Random(seed)
    kinds = [rng.randrange(2) for _ in range(count)]
    found = [[rng.randrange(65 + 32 * kind, 91 + 32 * kind) for _ in range(12)] for kind in kinds]
    return found, torch.tensor(kinds)


def test_router_inputs_are_those_under_the_masks_in_the_order_of_the_prompts():
    model, (rows, _) = make_model(), prompts(5, 0)
    rows = [row[: 4 + 2 * i] for i, row in enumerate(reversed(rows))]
    keep = torch.rand(5, LAYERS, generator=torch.Generator().manual_seed(0)) > 0.4
    found = router_inputs(model, rows, keep)
    for i, row in enumerate(rows):
        seen: list[torch.Tensor] = []

        class Looking(FixedMask):
            def decide(self, layer, prompts, seen=seen):
                seen.append(prompts.mean)
                return super().decide(layer, prompts)

        ids = torch.tensor([row])
        model.decide(ids, torch.ones_like(ids), Looking(keep[i]))
        for layer in range(LAYERS):
            assert torch.allclose(found[layer][i], seen[layer][0], atol=1e-5)


def test_groups_are_found_and_numbered_without_gaps():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(3, 40, generator=generator)
    kinds = torch.randint(3, (90,), generator=generator)
    rows = centres[kinds] + torch.randn(90, 40, generator=generator)
    labels = group(rows, 3)
    assert len({(a, b) for a, b in zip(labels.tolist(), kinds.tolist(), strict=True)}) == 3
    alike = group(torch.ones(5, 4), 3)
    assert alike.tolist() == [0] * 5


@torch.no_grad()
def test_unseen_prompts_get_the_layers_of_their_group():
    model, (rows, kinds) = make_model(), prompts(192, 1)
    start_from_orders(model, rows, kinds, ORDERS, skip_rate=0.25)
    unseen, wanted = prompts(48, 2)
    keep = model.decide(torch.tensor(unseen), torch.ones(48, 12), RouterPolicy(model.routers)).keep
    gone = [[layer for layer in range(LAYERS) if not row[layer]] for row in keep.tolist()]
    right = [g == sorted(ORDERS[kind][:2]) for g, kind in zip(gone, wanted.tolist(), strict=True)]
    assert sum(right) / len(right) > 0.75
    # A lower offset lets the next layers of each order go.
    fewer = RouterPolicy(model.routers, -SPACING)
    keep = model.decide(torch.tensor(unseen), torch.ones(48, 12), fewer).keep
    assert float((~keep).float().mean()) * LAYERS > 2.5


def test_a_group_of_one_prompt_is_no_failure() -> None:
    model, (rows, _) = make_model(), prompts(1, 0)
    start_from_orders(model, rows, torch.tensor([0]), ORDERS[:1], 0.25)
    keep = model.decide(torch.tensor(rows), torch.ones(1, 12), RouterPolicy(model.routers)).keep
    assert keep.tolist() == [[layer not in ORDERS[0][:2] for layer in range(LAYERS)]]


def test_training_starts_from_groups(tmp_path: Path):
    rows, kinds = prompts(120, 3)
    examples = [Encoded(row, [100, 257]) for row in rows]
    model = make_model()
    options = {"clusters": 2, "warm_start": 4, "skip_rate": 0.25, "router_steps": 0}
    record = train_routers(model, examples, examples[:8], config(tmp_path, **options))
    assert len(record["removal_orders"]) == 2
    assert sum(record["cluster_prompts"]) == 120
    low, high = sorted(record["cluster_prompts"])
    share = int(kinds.sum())
    assert abs(low - min(share, 120 - share)) <= 6
    assert high < 100
