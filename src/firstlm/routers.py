# SPDX-License-Identifier: Apache-2.0
"""Routers: one linear layer per decoder layer (arXiv 2410.12513, equation 1).

`rho_i = sigmoid(w_i . mean_t(h_{i-1,t}) + b_i)`; the layer runs where rho_i >= 0.5, which is where
the logit is >= 0. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from firstlm import processes


class Router(nn.Module):
    """Scores one layer from the mean of the prompt's hidden states.

    While it trains, its input may be standardised (`standardise`), because hidden states of deep
    layers are hundreds of times larger than those of early ones. `fold` puts that affine map into
    weight and bias, so that a finished router is the plain linear layer of the paper.
    """

    center: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(self, width: int, init_bias: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.tensor([float(init_bias)]))  # FSDP2 shards no scalars
        self.register_buffer("center", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        """Map what is read of prompts [prompts, width] to logits [prompts], in float32."""
        mean = mean.to(self.weight.device, torch.float32)
        if self.center is not None and self.scale is not None:
            mean = (mean - self.center) * self.scale
        # Autocast would take a matmul to bfloat16; and for few prompts a sum is faster.
        return (mean * self.weight.float()).sum(-1) + self.bias.float()

    @torch.no_grad()
    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Read the input as (x - mean) / std from now on; the logits stay the same.

        `mean` and `std` are [width].
        """
        self.fold()
        # A floor keeps features that hardly vary over prompts from being blown up into noise.
        self.center = mean.float()
        self.scale = 1.0 / std.float().clamp_min(0.1 * float(std.median()) + 1e-6)
        self.bias.add_((self.weight * self.center).sum())
        self.weight.div_(self.scale)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the standardisation into weight and bias; the logits stay the same."""
        if self.center is None or self.scale is None:
            return
        weight = processes.whole(self.weight) * self.scale
        bias = processes.whole(self.bias) - (weight * self.center).sum()
        processes.put(self.weight, weight)
        processes.put(self.bias, bias)
        self.center = self.scale = None


class Routers(nn.ModuleList):
    """The routers of a model; `routers[i]` decides about layer i, from what `reads` names."""

    def __init__(
        self, layers: int, width: int, init_bias: float = 2.0, reads: str = "states"
    ) -> None:
        super().__init__(Router(width, init_bias) for _ in range(layers))
        self.reads = reads

    if TYPE_CHECKING:  # what an nn.ModuleList holds is not known to type checkers

        def __iter__(self) -> Iterator[Router]: ...

        def __getitem__(self, idx: int) -> Router: ...  # type: ignore[override]

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the weights of an artifact: `{i}.weight` [width] and `{i}.bias` []."""
        for i, router in enumerate(self):
            router.weight.copy_(tensors[f"{i}.weight"])
            router.bias.copy_(tensors[f"{i}.bias"])

    @property
    def untrained(self) -> bool:
        """Whether no router has learnt to look at a prompt yet."""
        return not any(bool(router.weight.any()) for router in self)

    def squared_norm(self) -> torch.Tensor:
        """Return the sum of squared router weights, the L2 term of the paper's loss."""
        return torch.stack([router.weight.float().square().sum() for router in self]).sum()

    def fold(self) -> None:
        """Fold the standardisation of every router."""
        for router in self:
            router.fold()
