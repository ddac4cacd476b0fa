# SPDX-License-Identifier: Apache-2.0
"""Masks that stay as they are while LoRA trains, and routers that learn to give them again.

LoRA moves the states that frozen routers read, and with them which layers a prompt runs: away from
those that it has just learnt to do without. So prompts keep the layers that routers gave them when
phase 2 began, and afterwards routers are fitted to the states that they read by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from firstlm import processes
from firstlm.lora import swapped
from firstlm.model import FirstModel
from firstlm.policies import Policy
from firstlm.probes import decide_all
from firstlm.router_fit import add, linear_fit, router_inputs

RIDGE = 0.01  # what is fitted is a linear map's answer: without noise


class HeldMasks:
    """What a model's routers say of prompts now, whatever LoRA learns later.

    Args:
        model: a routed model.
        lora: its parameters that are going to be trained.
        prefill: "skip" or "full".
        batch_size: prompts per forward pass.
    """

    def __init__(
        self, model: FirstModel, lora: Iterable[nn.Parameter], prefill: str, batch_size: int
    ) -> None:
        self.model, self.prefill, self.batch_size = model, prefill, batch_size
        self._then = [(parameter, parameter.detach().clone()) for parameter in lora]

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            with swapped(self._then):
                yield
        finally:
            self.model.train(training)

    @torch.no_grad()
    def of(self, prompts: Sequence[Sequence[int]], policy: Policy) -> torch.Tensor:
        """Return keep [prompts, layers], as a policy decided at first.

        Args:
            prompts: their token ids.
            policy: asks the model's routers, which have not changed.
        """
        with self._as_it_was():
            return decide_all(self.model, prompts, policy, self.prefill, self.batch_size)

    @torch.no_grad()
    def let_routers_follow(
        self, prompts: Sequence[Sequence[int]], policies: Sequence[Policy]
    ) -> None:
        """Fit routers such that they give the held masks from what they read by now.

        What a router's logits are off, under the masks of each policy, is regressed on its input
        and taken back; where LoRA moved nothing, that is nothing.

        Args:
            prompts: token ids of some hundreds of prompts.
            policies: one for each rate that was trained.
        """
        model = self.model
        before, now = [], []
        for policy in policies:
            keep = self.of(prompts, policy)
            with self._as_it_was():
                before.append(router_inputs(model, prompts, keep, self.prefill))
            now.append(router_inputs(model, prompts, keep, self.prefill))
        for layer, router in enumerate(model.routers):
            then, seen = (torch.cat([rate[layer] for rate in part]) for part in (before, now))
            gap = (router(then) - router(seen)).float().cpu()
            add(router, *processes.same(linear_fit(seen, gap, RIDGE)))
