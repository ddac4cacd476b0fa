# SPDX-License-Identifier: Apache-2.0
"""LoRA among a model's parameters, and weights that others take the place of for a moment."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_lora(name: str) -> bool:
    """Tell by its name whether a parameter is one of peft's LoRA matrices."""
    return "lora_" in name


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the LoRA matrices of a model by name."""
    return {name: p for name, p in module.named_parameters() if is_lora(name)}


def lora_layers(model: nn.Module) -> list[Any]:
    """Return the modules that have LoRA on a linear layer, or on another one."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@contextmanager
def swapped(pairs: Iterable[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Put other values in the place of weights; afterwards every bit is what it was."""
    pairs = list(pairs)
    before = [weight.data for weight, _ in pairs]
    try:
        for weight, values in pairs:
            weight.data = values
        yield
    finally:
        for (weight, _), values in zip(pairs, before, strict=True):
            weight.data = values


@contextmanager
def lora_left_out(model: nn.Module) -> Iterator[None]:
    """Let a model compute as if it had no LoRA; parameters keep their `requires_grad`."""
    # peft's own disable_adapter() turns LoRA on at the end, whatever it was before.
    # LoRA that is merged would be taken out of the weights.
    on = [m for m in lora_layers(model) if not (m.disable_adapters or m.merged)]
    for module in on:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in on:
            module._disable_adapters = False


def is_on_shared_weights(model: nn.Module) -> bool:
    """Tell whether active LoRA is on a weight that another module has, too (tied embeddings)."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    on = [m for m in lora_layers(model) if not (m.disable_adapters or m.merged)]
    return any(owners[id(p)] > 1 for m in on for p in m.get_base_layer().parameters())


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Hide that peft asks for a property that transformers 5.24 renamed: users can't mend it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield
