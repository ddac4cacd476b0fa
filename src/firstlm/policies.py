# SPDX-License-Identifier: Apache-2.0
"""Policies: what decides which layers a prompt runs.

A policy has one method, `decide`. Everything that generates, trains or measures takes any policy
and names none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from firstlm.errors import ConfigError
from firstlm.routers import Routers


class Prompts(Protocol):
    """What a policy may look at when it decides about a layer."""

    @property
    def count(self) -> int:
        """Number of prompts in the batch."""
        ...

    @property
    def mean(self) -> torch.Tensor:
        """Mean over each prompt's own tokens of the states entering the layer [prompts, hidden]."""
        ...

    @property
    def keys(self) -> list[int]:
        """A number per prompt that depends on its tokens alone."""
        ...

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each prompt [prompts]."""
        ...


class Policy(Protocol):
    """Decides, once per prompt and layer, whether the layer runs."""

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        """Return [prompts]: bool (True = the layer runs), or float logits (>= 0 runs)."""
        ...


@runtime_checkable
class SteppedPolicy(Policy, Protocol):
    """Lets layers go as the answer grows; one that has gone does not come back.

    So no token needs keys and values that an earlier one did not leave.
    """

    def lifetime(self, layer: int) -> int:
        """Return for how many decode steps the layer runs; the prompt comes before all of them."""
        ...


class RunAll:
    """Every layer runs."""

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        """Keep the layer for all prompts."""
        return torch.ones(prompts.count, dtype=torch.bool)


class FixedMask:
    """The given mask, whatever the prompt says.

    Args:
        keep: [layers] for all prompts, or [batch, layers]; True = the layer runs.
    """

    def __init__(self, keep: torch.Tensor | Sequence[bool] | Sequence[Sequence[bool]]) -> None:
        try:
            keep = torch.as_tensor(keep)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"keep is no mask ({error}); expected [layers] or [batch, layers] of bool."
            ) from error
        if keep.dtype != torch.bool:
            raise ConfigError(f"keep has dtype {keep.dtype}; expected bool, True = the layer runs.")
        if keep.dim() not in (1, 2):
            raise ConfigError(
                f"keep has shape {tuple(keep.shape)}; expected [layers] or [batch, layers]."
            )
        self.keep = keep.detach().cpu()

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        """Return the mask's column for this layer."""
        if self.keep.dim() == 1:
            return self.keep[layer].expand(prompts.count)
        if self.keep.shape[0] != prompts.count:
            raise ConfigError(
                f"keep has {self.keep.shape[0]} rows for {prompts.count} prompts; give one row per "
                "prompt, or a single mask of shape [layers]."
            )
        return self.keep[:, layer]

    def of(self, rows: Sequence[int]) -> FixedMask:
        """Return the mask for some rows of a batch."""
        return self if self.keep.dim() == 1 else FixedMask(self.keep[list(rows)])

    def check(self, layers: int, locked: frozenset[int] = frozenset()) -> None:
        """Raise `ConfigError` unless the mask fits a model with these layers and locked layers."""
        if self.keep.shape[-1] != layers:
            raise ConfigError(
                f"keep is for {self.keep.shape[-1]} layers, but the model has {layers}."
            )
        barred = [i for i in sorted(locked) if not bool(self.keep[..., i].all())]
        if barred:
            raise ConfigError(
                f"Layers {barred} cannot be skipped: later layers read their keys and values."
            )


def router_input(prompts: Prompts, reads: str) -> torch.Tensor:
    """Return what routers read of prompts [prompts, width]; see `config.READS`."""
    if reads == "length":
        return prompts.lengths.to(prompts.mean.device).float().log().unsqueeze(1)
    return prompts.mean


class RouterPolicy:
    """The trained routers; `offset` shifts all their logits to skip more (negative) or fewer.

    Args:
        routers: `routers[i]` maps what it reads of prompts [prompts, width] to logits [prompts].
        offset: added to every logit. 0 is the paper's threshold rho = 0.5.
    """

    def __init__(self, routers: Routers, offset: float = 0.0) -> None:
        self.routers = routers
        self.offset = offset

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        """Return the router's logits plus the offset."""
        logits = self.routers[layer](router_input(prompts, self.routers.reads))
        return logits + self.offset if self.offset else logits
