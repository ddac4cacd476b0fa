# SPDX-License-Identifier: Apache-2.0
"""Prompts of a kind get layers of their own: where routers start from when tasks are mixed.

Gradients of gates hardly find masks that differ from prompt to prompt. So groups of prompts are
found by what a router a third of the way up reads, layers are ranked for each group by itself, and
router weights are fitted such that every prompt's logits are those of its group's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firstlm.importance import order_logits
from firstlm.model import FirstModel
from firstlm.policies import RouterPolicy
from firstlm.probes import decide_all
from firstlm.router_fit import BATCH, add, linear_fit, router_inputs

DEPTH = 1 / 3  # of the layers, before the one whose router's input tells groups apart
ROUNDS, RESTARTS = 50, 10  # of k-means, at most


def group(inputs: torch.Tensor, count: int, seed: int = 0) -> torch.Tensor:
    """Return each row's group, by k-means++ on the directions of standardised rows.

    Args:
        inputs: [rows, width]; of `DEPTH` of the layers, where what a prompt asks for shows best.
        count: number of groups.
        seed: of the first centres.

    Returns:
        [rows] from 0 on, without gaps; groups may be fewer where rows are alike.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-6)
    rows = torch.nn.functional.normalize(rows, dim=1)
    found = [_k_means(rows, count, generator) for _ in range(RESTARTS)]
    return min(found, key=lambda pair: pair[0])[1].unique(return_inverse=True)[1]


def _k_means(
    rows: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[float, torch.Tensor]:
    """Return the summed squared distance to centres, and labels [rows]."""
    picked = [int(torch.randint(len(rows), (1,), generator=generator))]
    while len(picked) < min(count, len(rows)):
        far = torch.cdist(rows, rows[picked]).amin(1).square() + 1e-12
        picked.append(int(torch.multinomial(far, 1, generator=generator)))
    centres, labels = rows[picked], torch.empty(0)
    for _ in range(ROUNDS):
        before, labels = labels, torch.cdist(rows, centres).argmin(1)
        if torch.equal(before, labels):
            break
        known = [rows[labels == i] for i in range(len(centres))]
        centres = torch.stack(
            [r.mean(0) if len(r) else c for r, c in zip(known, centres, strict=True)]
        )
    return float(torch.cdist(rows, centres).amin(1).square().sum()), labels


@torch.no_grad()
def start_from_orders(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    labels: torch.Tensor,
    orders: Sequence[Sequence[int]],
    skip_rate: float,
    prefill: str = "skip",
) -> None:
    """Fit routers such that a prompt's logits are those of its group's order.

    Ridge regression, on the states that prompts have under their group's mask.

    Args:
        model: a routed model.
        prompts: token ids.
        labels: the group of each prompt [prompts].
        orders: of each group, the layers to skip first in front.
        skip_rate: at which logits are negative for the layers that go.
        prefill: "skip" or "full".
    """
    wanted = torch.stack([order_logits(o, model.layer_count, skip_rate) for o in orders])[labels]
    for layer, states in enumerate(router_inputs(model, prompts, wanted >= 0, prefill)):
        router, (weight, bias) = model.routers[layer], linear_fit(states, wanted[:, layer])
        router.fold()
        router.weight.copy_(weight)
        router.bias.fill_(bias)


@torch.no_grad()
def shift_groups(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    labels: torch.Tensor,
    shifts: Sequence[float],
    prefill: str = "skip",
) -> None:
    """Add a number of its group's own to all logits of a prompt, fitted as in `start_from_orders`.

    Args:
        model: a routed model.
        prompts: token ids.
        labels: the group of each prompt [prompts].
        shifts: of each group; above 0, its prompts run more layers.
        prefill: "skip" or "full".
    """
    keep = torch.ones(len(prompts), model.layer_count, dtype=torch.bool)
    for i, shift in enumerate(shifts):
        policy = RouterPolicy(model.routers, shift)
        picked = (labels == i).nonzero().flatten()
        rows = [prompts[row] for row in picked.tolist()]
        keep[picked] = decide_all(model, rows, policy, prefill, BATCH)
    wanted = torch.tensor(shifts)[labels]
    seen = router_inputs(model, prompts, keep, prefill)
    for router, states in zip(model.routers, seen, strict=True):
        add(router, *linear_fit(states, wanted))
