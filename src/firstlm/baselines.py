# SPDX-License-Identifier: Apache-2.0
"""Policies to compare routers with: they look at no state, and meet a skip rate by counting.

A rate between two numbers of layers is met by giving some prompts one layer more; which ones, a
hash of the prompt says, so that a prompt always gets the same mask. That meets the rate on average
over all prompts there are; where those to come are known, `meeting` does for just these.
"""

from __future__ import annotations

import copy
import random
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from firstlm.config import BASELINES, UNMEASURED, check_skip_rate
from firstlm.errors import ConfigError
from firstlm.policies import Prompts, RunAll

KEPT = 1024  # masks that a policy remembers: of the batch that runs, but not of all that ever ran


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
        self._whole = int(rate * layers + 1e-9)  # layers that every prompt skips
        self._rest = rate * layers - self._whole  # share of prompts that skip one more
        self._bound = self._rest  # these have a place below it

    def meeting(self, keys: Sequence[int]) -> CountedSkip:
        """Return the policy that meets the rate over prompts with just these keys.

        Prompts that are the same have one key, and one mask: then it comes as near as it can.
        """
        other = copy.copy(self)
        other._masks = {}
        count = self._rest * len(keys)
        places = sorted(map(self._place, keys))
        bounds = dict.fromkeys([*places, 1.0])
        other._bound = min(bounds, key=lambda bound: abs(bisect_left(places, bound) - count))
        return other

    def _place(self, key: int) -> float:
        """Return a number in [0, 1); prompts where it is low skip one layer more."""
        return random.Random(f"{self.seed} count {key}").random()

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        """Return each prompt's mask at this layer."""
        return torch.tensor([self.mask(key)[layer] for key in prompts.keys])

    def mask(self, key: int) -> list[bool]:
        """Return the mask [layers] of the prompt with this key; True = the layer runs."""
        if key not in self._masks:
            more = self._place(key) < self._bound
            gone = set(self.skipped(self._whole + more, key))
            if len(self._masks) >= KEPT:
                self._masks.clear()
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

    def __init__(
        self, layers: int, rate: float, free: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        super().__init__(layers, rate, interior(layers, free), seed)

    def skipped(self, count: int, key: int) -> Sequence[int]:
        """Return `count` layers, evenly spaced."""
        size = len(self.free)
        return [self.free[(2 * i + 1) * size // (2 * count)] for i in range(count)]


class SkipDecode(RunAll):
    """Lets lower layers go one by one as the answer grows (SkipDecode, arXiv 2307.02628).

    The prompt runs all layers, and so do the first and the last layer always. The others go from
    below at an even pace, such that `rate` of the layers is skipped on average over all tokens of
    answers as long as those given.

    Args:
        layers: how many layers the model has.
        rate: share of them to skip, over all decode steps.
        answers: how many answers take n decode steps, for n = 0, 1, ...
        free: layers that may be skipped; default all.
    """

    def __init__(
        self, layers: int, rate: float, answers: Sequence[int], free: Sequence[int] | None = None
    ) -> None:
        self.layers, self.rate = layers, check_skip_rate(rate)
        self.order = interior(layers, free)
        if rate * layers > len(self.order):
            raise ConfigError(
                f"A skip rate of {rate} is {rate * layers:g} of {layers} layers, but only "
                f"{len(self.order)} lie in between and may be skipped."
            )
        if not sum(answers[1:]):
            raise ConfigError("SkipDecode needs answers of more than one token to set its pace by.")
        paces = (self._lifetimes(2.0 ** (power / 8)) for power in range(160, -160, -1))
        self._lives = min(paces, key=lambda lives: abs(self._expected(lives, answers) - rate))

    def _lifetimes(self, pace: float) -> dict[int, int]:
        """Return each layer's decode steps when `pace` layers go with every step."""
        return {layer: int((rank + 0.5) / pace) for rank, layer in enumerate(self.order)}

    def _expected(self, lives: dict[int, int], answers: Sequence[int]) -> float:
        steps = sum(n * count for n, count in enumerate(answers))
        gone = sum(
            count * sum(max(n - life, 0) for life in lives.values())
            for n, count in enumerate(answers)
            if count
        )
        return gone / (steps * self.layers)

    def lifetime(self, layer: int) -> int:
        """Return for how many decode steps the layer runs."""
        return self._lives.get(layer, sys.maxsize)


def interior(layers: int, free: Sequence[int] | None = None) -> list[int]:
    """Return the layers between the first and the last, of those that may be skipped."""
    return [i for i in range(1, layers - 1) if free is None or i in free]


def truncation(layers: int, free: Sequence[int] | None = None) -> list[int]:
    """Return the order of truncation (early exit): the last layers go first."""
    return sorted(range(layers) if free is None else free, reverse=True)


def random_order(layers: int, free: Sequence[int] | None = None, seed: int = 0) -> list[int]:
    """Return one draw of all layers, the same for every prompt."""
    free = list(range(layers)) if free is None else sorted(free)
    return random.Random(f"{seed} order").sample(free, len(free))


def check_name(name: str, *others: str) -> None:
    """Check that a policy's name is that of a baseline, or one of others.

    Raises:
        ConfigError: it is not.
    """
    if name not in (*others, *BASELINES):
        known = ", ".join((*others, *BASELINES))
        raise ConfigError(f"policy is {name!r}; expected one of {known}.")


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
        answers: how many answers of the training data take n decode steps, for skip_decode.
    """

    name: str
    layers: int
    free: tuple[int, ...]
    rate: float
    seed: int = 0
    orders: tuple[tuple[float, tuple[int, ...]], ...] = ()
    answers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.name == "skip_decode":
            if not self.answers:
                raise ConfigError("The policy 'skip_decode' needs the lengths of answers.")
        elif self.name not in UNMEASURED and not self.orders:
            raise ConfigError(f"The policy {self.name!r} needs an order of layers.")
        check_skip_rate(self.rate)

    def at(self, rate: float | None = None) -> CountedSkip | SkipDecode:
        """Return the policy that skips `rate` of the layers."""
        rate = self.rate if rate is None else rate
        layers, free, seed = self.layers, self.free, self.seed
        match self.name:
            case "random":
                return RandomSkip(layers, rate, free, seed)
            case "random_interior":
                return RandomSkip(layers, rate, interior(layers, free), seed)
            case "random_fixed":
                return OrderedSkip(random_order(layers, free, seed), layers, rate, seed)
            case "unified":
                return UnifiedSkip(layers, rate, free, seed)
            case "early_exit":
                return OrderedSkip(truncation(layers, free), layers, rate, seed)
            case "skip_decode":
                return SkipDecode(layers, rate, self.answers, free)
        order = min(self.orders, key=lambda pair: abs(pair[0] - rate))[1]
        return OrderedSkip([layer for layer in order if layer in free], layers, rate, seed)
