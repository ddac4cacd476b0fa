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
from firstlm.inputs import pad_left
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Prompts, RouterPolicy, router_input
from firstlm.probes import decide_all
from firstlm.routers import Router

BATCH = 16
DEPTH = 1 / 3  # of the layers, before the one whose router's input tells groups apart
ROUNDS, RESTARTS = 50, 10  # of k-means, at most
RIDGE = 0.1  # on standardised inputs, of which a prompt's squared length is about 1


class _Recorder(FixedMask):
    """Obeys a mask, and keeps what routers would have read."""

    def __init__(self, keep: torch.Tensor, reads: str, layers: int) -> None:
        super().__init__(keep)
        self.reads = reads
        self.seen = [torch.empty(0)] * layers

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        self.seen[layer] = router_input(prompts, self.reads).float().cpu()
        return super().decide(layer, prompts)


@torch.no_grad()
def router_inputs(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    keep: torch.Tensor,
    prefill: str = "skip",
) -> list[torch.Tensor]:
    """Return what each router reads of prompts that run under masks, [prompts, width] a layer.

    Args:
        model: a routed model.
        prompts: their token ids.
        keep: [layers] for all, or [prompts, layers].
        prefill: "skip" or "full".
    """
    model.eval()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts: list[list[torch.Tensor]] = []
    for first in range(0, len(by_length), BATCH):
        picked = by_length[first : first + BATCH]
        mask = keep if keep.dim() == 1 else keep[picked]
        recorder = _Recorder(mask, model.routers.reads, model.layer_count)
        batch = pad_left([prompts[i] for i in picked], model.pad_id)
        model.decide(*batch, recorder, prefill=prefill)
        parts.append(recorder.seen)
    back = torch.tensor(by_length).argsort()
    return [torch.cat(layer)[back] for layer in zip(*parts, strict=True)]


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
        router, (weight, bias) = model.routers[layer], _ridge(states, wanted[:, layer])
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
        weight, bias = _ridge(states, wanted)
        router.fold()
        router.weight.add_(weight.to(router.weight.device))
        router.bias.add_(bias)


def _ridge(states: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return weight [width] and bias of the ridge regression of `wanted` [rows] on states.

    Args:
        states: [rows, width], what a router reads.
        wanted: [rows], what it is to say.
    """
    fresh = Router(states.shape[1])
    fresh.standardise(states.mean(0), states.std(0, correction=int(len(states) > 1)))
    assert fresh.center is not None
    assert fresh.scale is not None
    # In float64, which no autocast around it rounds to bfloat16.
    rows = ((states - fresh.center) * fresh.scale).double()
    width = rows.shape[1]
    alike = rows @ rows.T / width + RIDGE * torch.eye(len(rows), dtype=rows.dtype)
    wish = (wanted - wanted.mean()).double()
    fresh.weight.copy_(rows.T @ torch.linalg.solve(alike, wish) / width)
    fresh.bias.fill_(float(wanted.mean()))
    fresh.fold()
    return fresh.weight, float(fresh.bias)
