# SPDX-License-Identifier: Apache-2.0
"""Fit routers by regression: what they read of prompts, and weights that say what is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firstlm.inputs import pad_left
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Prompts, router_input
from firstlm.routers import Router

BATCH = 16
RIDGE = 0.1


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


def linear_fit(
    states: torch.Tensor, wanted: torch.Tensor, ridge: float = RIDGE
) -> tuple[torch.Tensor, float]:
    """Return weight [width] and bias of the ridge regression of `wanted` [rows] on states.

    Args:
        states: [rows, width], what a router reads.
        wanted: [rows], what it is to say.
        ridge: on standardised inputs, of which a prompt's squared length is about 1.
    """
    fresh = Router(states.shape[1])
    fresh.standardise(states.mean(0), states.std(0))
    assert fresh.center is not None
    assert fresh.scale is not None
    # In float64, which no autocast around it rounds to bfloat16.
    rows = ((states - fresh.center) * fresh.scale).double()
    width = rows.shape[1]
    alike = rows @ rows.T / width + ridge * torch.eye(len(rows), dtype=rows.dtype)
    wish = (wanted - wanted.mean()).double()
    fresh.weight.copy_(rows.T @ torch.linalg.solve(alike, wish) / width)
    fresh.bias.fill_(float(wanted.mean()))
    fresh.fold()
    return fresh.weight, float(fresh.bias)


@torch.no_grad()
def add(router: Router, weight: torch.Tensor, bias: float) -> None:
    """Let a router's logits grow by those of a fit."""
    router.fold()
    router.weight.add_(weight.to(router.weight.device))
    router.bias.add_(bias)
