# SPDX-License-Identifier: Apache-2.0
"""A plain, shorter model: the layers of one mask and nothing of ours.

What a fixed mask would be worth to someone who cut the model for good. Weights are shared with the
whole model, so that it costs no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights

from firstlm.errors import ConfigError, UnsupportedModelError, kind_and_line
from firstlm.layers import LayerStack

ALIKE = 1e-3  # relative difference of logits; the same layers give the same bits, on a GPU nearly


def cut(base: Any, stack: LayerStack, keep: Sequence[bool]) -> Any:
    """Return a model of the same class with only the layers that are kept.

    Args:
        base: a transformers model, out of peft's wrapper and without LoRA.
        stack: its layers.
        keep: per layer, True = it stays.

    Raises:
        ConfigError: `keep` is not for these layers, keeps none, or leaves out one that others need.
        UnsupportedModelError: layers that have moved up would not be, or compute, what they did.
    """
    if len(keep) != len(stack):
        raise ConfigError(f"keep is for {len(keep)} layers; the model has {len(stack)}.")
    kept = [i for i, runs in enumerate(keep) if runs]
    if not kept or not stack.locked <= set(kept):
        needed = ", ".join(map(str, sorted(stack.locked)))
        raise ConfigError(f"keep leaves no layer, or not those that others need ({needed}).")
    weights = renumbered(base.state_dict(), paths(base, stack), kept)
    try:
        with init_empty_weights(include_buffers=False):
            short = type(base)(_config(base.config, kept))
        short.load_state_dict(weights, assign=True)
    except Exception as error:  # each model has its own
        what = kind_and_line(error)
        raise _refusal(base, kept, f"cannot be built ({what})") from error
    short.tie_weights()
    device = base.get_input_embeddings().weight.device
    for buffer in short.buffers():  # those that are no weights
        if buffer.device != device:
            buffer.data = buffer.to(device)
    short.requires_grad_(False).eval()
    short.generation_config = copy.deepcopy(base.generation_config)
    difference = _difference(base, stack, keep, short)
    if not difference <= ALIKE:
        raise _refusal(base, kept, f"gives other logits (relative difference {difference:.4f})")
    return short


def _refusal(base: Any, kept: Sequence[int], what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(base).__name__} cut to its layers {', '.join(map(str, kept))} {what}: what a layer "
        "is goes by its number, or by how many there are. Leave out others, or use the whole model "
        "with this mask as its policy."
    )


@torch.no_grad()
def _difference(base: Any, stack: LayerStack, keep: Sequence[bool], short: Any) -> float:
    """Return how far a short model's logits are from those of the whole one with its mask."""
    device = base.get_input_embeddings().weight.device
    vocab = base.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(1, 11, device=device)[None] * 7919 % vocab
    hooks = [
        module.register_forward_hook(_bypass, with_kwargs=True)
        for module, runs in zip(stack.modules, keep, strict=True)
        if not runs
    ]
    was_training = base.training
    try:
        base.eval()
        wanted = base(input_ids=ids, use_cache=False).logits.double()
    finally:
        base.train(was_training)
        for hook in hooks:
            hook.remove()
    found = short(input_ids=ids, use_cache=False).logits.double()
    return ((found - wanted).norm() / wanted.norm()).item()


def _bypass(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Give back what a layer was given; a hook, because other policies may hold its forward."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def paths(base: Any, stack: LayerStack) -> list[str]:
    """Return what the names of each layer's weights begin with."""
    names = {id(module): name for name, module in base.named_modules()}
    return [f"{names[id(module)]}." for module in stack.modules]


def renumbered(
    weights: Mapping[str, Any], paths: Sequence[str], kept: Sequence[int]
) -> dict[str, Any]:
    """Return weights by the names that they have where only some layers are left.

    Args:
        weights: of the whole model, by name; or whatever else its modules have.
        paths: see `paths`.
        kept: the layers that stay.
    """
    moved = {paths[old]: paths[new] for new, old in enumerate(kept)}
    found = {}
    for name, value in weights.items():
        path = next((path for path in paths if name.startswith(path)), "")
        if not path or path in moved:
            found[moved.get(path, "") + name.removeprefix(path)] = value
    return found


def _config(config: Any, kept: Sequence[int]) -> Any:
    """Return a config for the layers that stay; lists with an entry per layer are cut, too."""
    short = copy.deepcopy(config)
    text = short.get_text_config(decoder=True)
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == count:
            setattr(text, name, [value[i] for i in kept])
    text.num_hidden_layers = len(kept)
    return short
