# SPDX-License-Identifier: Apache-2.0
"""Policies to compare routers with: they look at no state, and meet a skip rate exactly.

A rate between two numbers of layers is met by giving some prompts one layer more; which ones, a
hash of the prompt says, so that a prompt always gets the same mask.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firstlm.config import BASELINES, DRAWN, check_skip_rate
from firstlm.errors import ConfigError
from firstlm.policies import Prompts


class CountedSkip:
    """Skips `rate` of the layers on average; subclasses say which ones.

    Args:
        layers: how many layers the model has.
        rate: share of them to skip.
        free: layers that may be skipped; default all.
        seed: of what is drawn by prompt.
    """

    def __init__(
        self, layers: int, rate: float, free: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        self.layers, self.seed = layers, seed
        self.rate = check_skip_rate(rate)
        self.free = list(range(layers)) if free is None else sorted(free)
        if rate * layers > len(self.free):
            raise ConfigError(
                f"A skip rate of {rate} is {rate * layers:g} of {layers} layers, but only "
                f"{len(self.free)} may be skipped here."
            )
        self._masks: dict[int, list[bool]] = {}

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        """Return each prompt's mask at this layer."""
        return torch.tensor([self.mask(key)[layer] for key in prompts.keys])

    def mask(self, key: int) -> list[bool]:
        """Return the mask [layers] of the prompt with this key; True = the layer runs."""
        if key not in self._masks:
            wanted = self.rate * self.layers
            whole = int(wanted + 1e-9)
            more = random.Random(f"{self.seed} count {key}").random() < wanted - whole
            gone = set(self.skipped(whole + more, key))
            self._masks[key] = [layer not in gone for layer in range(self.layers)]
        return self._masks[key]

    def skipped(self, count: int, key: int) -> Sequence[int]:
        """Return `count` layers for the prompt with this key to skip."""
        raise NotImplementedError


class OrderedSkip(CountedSkip):
    """The first layers of a fixed order: truncation, static importance, a majority mask ...

    Args:
        order: layers, those to skip first in front.
        layers: how many layers the model has.
        rate: share of them to skip.
        seed: of which prompts skip one layer more.
    """

    def __init__(self, order: Sequence[int], layers: int, rate: float, seed: int = 0) -> None:
        self.order = list(order)
        if len(set(self.order)) != len(self.order) or not set(self.order) <= set(range(layers)):
            raise ConfigError(f"order is {self.order}; expected different layers below {layers}.")
        super().__init__(layers, rate, self.order, seed)

    def skipped(self, count: int, key: int) -> Sequence[int]:
        """Return the first `count` layers of the order."""
        return self.order[:count]


class RandomSkip(CountedSkip):
    """Layers drawn anew for each prompt, from a hash of the prompt and the seed."""

    def skipped(self, count: int, key: int) -> Sequence[int]:
        """Return `count` layers drawn for this prompt."""
        return random.Random(f"{self.seed} layers {key}").sample(self.free, count)


class UnifiedSkip(CountedSkip):
    """Evenly spaced layers between the first and the last, which run (arXiv 2404.06954)."""

    def skipped(self, count: int, key: int) -> Sequence[int]:
        """Return `count` layers, evenly spaced."""
        inner = [layer for layer in self.free if 0 < layer < self.layers - 1]
        if count > len(inner):
            raise ConfigError(f"{count} layers are to go, but only {len(inner)} lie in between.")
        return [inner[(2 * i + 1) * len(inner) // (2 * count)] for i in range(count)]


def truncation(layers: int, free: Sequence[int] | None = None) -> list[int]:
    """Return the order of truncation (early exit): the last layers go first."""
    return sorted(range(layers) if free is None else free, reverse=True)


def random_order(layers: int, free: Sequence[int] | None = None, seed: int = 0) -> list[int]:
    """Return one draw of all layers, the same for every prompt."""
    free = list(range(layers)) if free is None else sorted(free)
    return random.Random(f"{seed} order").sample(free, len(free))


@dataclass(frozen=True)
class Baseline:
    """A policy for every skip rate; what an artifact may have in place of routers.

    Attributes:
        name: one of `config.BASELINES`.
        layers: how many layers the model has.
        free: those that may be skipped.
        rate: skip rate where none is asked for.
        seed: of what is drawn.
        orders: (skip rate, layers to skip first in front) for static_importance and majority; a
            rate between takes the nearest one's.
    """

    name: str
    layers: int
    free: tuple[int, ...]
    rate: float
    seed: int = 0
    orders: tuple[tuple[float, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise ConfigError(f"policy is {self.name!r}; expected one of {', '.join(BASELINES)}.")
        if self.name not in DRAWN and not self.orders:
            raise ConfigError(f"The policy {self.name!r} needs an order of layers.")
        check_skip_rate(self.rate)

    def at(self, rate: float | None = None) -> CountedSkip:
        """Return the policy that skips `rate` of the layers."""
        rate = self.rate if rate is None else rate
        layers, free, seed = self.layers, self.free, self.seed
        match self.name:
            case "random":
                return RandomSkip(layers, rate, free, seed)
            case "random_interior":
                inner = [layer for layer in free if 0 < layer < layers - 1]
                return RandomSkip(layers, rate, inner, seed)
            case "random_fixed":
                return OrderedSkip(random_order(layers, free, seed), layers, rate, seed)
            case "unified":
                return UnifiedSkip(layers, rate, free, seed)
            case "early_exit":
                return OrderedSkip(truncation(layers, free), layers, rate, seed)
        order = min(self.orders, key=lambda pair: abs(pair[0] - rate))[1]
        return OrderedSkip([layer for layer in order if layer in free], layers, rate, seed)
