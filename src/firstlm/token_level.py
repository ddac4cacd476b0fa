# SPDX-License-Identifier: Apache-2.0
"""Routing token by token, to compare with: what one decision for a whole sequence costs or saves.

Every token's own state decides, layer by layer, in the prompt's mean's place. A layer's output is
dropped for tokens that skip it, but the layer runs for all: later tokens that keep the layer look
at keys and values of every token before them, so those of tokens that skipped it have to be
computed anyway. How many these are is counted, and no time is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from firstlm.errors import ConfigError
from firstlm.policies import RunAll
from firstlm.routers import Routers

ROUNDS = 12  # of halving the interval in which the offset lies
SPAN = 30.0  # logits: the offset lies between minus and plus this


class TokenLevel(RunAll):
    """Lets routers decide about each token by itself, within `applied`.

    Args:
        routers: trained on means over prompts.
        layers: the decoder layers, of which each output may be dropped.
        locked: layers that always run.
        rate: share of all (token, layer) pairs to skip, met by `fit`.
    """

    def __init__(
        self, routers: Routers, layers: Sequence[nn.Module], locked: frozenset[int], rate: float
    ) -> None:
        if routers.reads != "states":
            raise ConfigError("token_level needs routers that read states; these read lengths.")
        if routers.untrained:
            raise ConfigError(
                "token_level needs trained routers; these say the same of all tokens."
            )
        self.routers, self.layers, self.locked = routers, layers, locked
        self.rate, self.offset = rate, 0.0
        self._seen: list[list[torch.Tensor]] = [[] for _ in layers]

    @contextmanager
    def applied(self) -> Iterator[TokenLevel]:
        """Drop what layers compute for tokens that skip them, within this scope."""
        handles = [
            layer.register_forward_hook(partial(self._drop, i), with_kwargs=True)
            for i, layer in enumerate(self.layers)
            if i not in self.locked
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _drop(self, layer: int, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Put a layer's input in the place of its output for tokens that skip it."""
        hidden = args[0] if args else kwargs["hidden_states"]
        logits = self.routers[layer](hidden.flatten(0, 1)).view(hidden.shape[:2])
        keep = logits + self.offset >= 0
        self._seen[layer].append(keep.cpu())
        whole = output if isinstance(output, torch.Tensor) else output[0]
        mixed = torch.where(keep.unsqueeze(-1), whole, hidden)
        return mixed if isinstance(output, torch.Tensor) else (mixed, *output[1:])

    def fit(self, run: Callable[[], object], mask: torch.Tensor) -> None:
        """Find the offset of logits that meets the rate; `run` passes prompts [rows, tokens].

        `mask` is that of the prompts, False on padding. Routers see what earlier ones left, so
        every offset that is tried is a pass.
        """
        low, high = -SPAN, SPAN  # a higher offset skips less
        steps, best = [0] * len(mask), (math.inf, 0.0)
        for _ in range(ROUNDS):
            self.offset = (low + high) / 2
            with self.applied():
                run()
            _, rates, _ = self.take(mask, steps)
            weights = mask.sum(1).tolist()
            rate = sum(r * w for r, w in zip(rates, weights, strict=True)) / sum(weights)
            best = min(best, (abs(rate - self.rate), self.offset))
            low, high = (low, self.offset) if rate < self.rate else (self.offset, high)
        self.offset = best[1]

    def take(
        self, mask: torch.Tensor, steps: Sequence[int]
    ) -> tuple[torch.Tensor, list[float], list[float]]:
        """Return what was decided since the last call.

        Args:
            mask: of the prompts [rows, tokens], False on padding.
            steps: decode steps of each row's own answer; later ones are left out.

        Returns:
            keep [rows, layers] for most of a row's tokens, and what `usage` says of each row.
        """
        keep = self._decisions()
        later = torch.arange(keep.shape[1] - mask.shape[1]) < torch.tensor(steps).unsqueeze(1)
        own = torch.cat([mask.bool().cpu(), later], 1)
        counts = (keep & own.unsqueeze(-1)).sum(1)
        return counts * 2 >= own.sum(1, keepdim=True), *usage(keep, own)

    def _decisions(self) -> torch.Tensor:
        """Return keep [rows, tokens, layers] of the tokens seen since the last call."""
        like = next(seen for seen in self._seen if seen)
        columns = [
            torch.cat(seen, 1) if seen else torch.ones_like(torch.cat(like, 1))
            for seen in self._seen
        ]
        self._seen = [[] for _ in self.layers]
        return torch.stack(columns, -1)


def usage(keep: torch.Tensor, own: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return each row's skip rate over its own tokens, and the share of it that is recomputed.

    Args:
        keep: [rows, tokens, layers].
        own: [rows, tokens], False on padding.

    Returns:
        Skipped (token, layer) pairs over all pairs, and, of the skipped ones, the share whose keys
        and values a later token of the row needs.
    """
    skipped = ~keep & own.unsqueeze(-1)
    runs = keep & own.unsqueeze(-1)
    after = runs.flip(1).cumsum(1).flip(1) - runs.int()  # runs of the layer at later tokens
    needed = skipped & (after > 0)
    pairs = own.sum(1) * keep.shape[-1]
    gone = skipped.sum((1, 2))
    rates = gone / pairs
    again = needed.sum((1, 2)) / gone.clamp_min(1)
    return rates.tolist(), again.tolist()
