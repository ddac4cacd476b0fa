# SPDX-License-Identifier: Apache-2.0
"""Find the decoder layers of a transformers model, and what can be switched inside them.

Knows nothing of routers or decisions. Models are never changed here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from firstlm.config import UNITS
from firstlm.errors import ConfigError, UnsupportedModelError

LIST_NAMES = ("layers", "h", "blocks", "block", "decoder_layers")
CACHE_ARGUMENTS = ("cache", "past_key_values")  # since transformers 5.24, and before
SUBMODULES = {
    "attention": ("self_attn", "attn", "attention", "self_attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "block_sparse_mlp"),
}


@dataclass
class LayerStack:
    """The decoder layers of one model, in order.

    Attributes:
        modules: the layer instances, `modules[i]` being the model's layer i.
        units: what is switched in each layer: the layer itself, its attention, or its mlp.
        hidden_size: width of the hidden states that enter a layer.
        tuple_sizes: per unit, the length of the tuple it returns, or 0 where it returns a tensor.
        adds_residual: whether the unit adds the residual itself (BLOOM, MPT), so that a skipped one
            must return it.
        locked: layers that must always run, because later layers read their keys and values.
        cache_argument: name under which the model and its `generate` take a KV cache.
    """

    modules: list[nn.Module]
    units: list[nn.Module]
    hidden_size: int
    tuple_sizes: list[int]
    adds_residual: bool = False
    locked: frozenset[int] = field(default_factory=frozenset)
    cache_argument: str = CACHE_ARGUMENTS[0]

    def __len__(self) -> int:
        return len(self.modules)


def decoder_layers(model: nn.Module, unit: str = "block") -> LayerStack:
    """Find the decoder layers of `model` (plain or wrapped by peft) and how they answer.

    Runs the model once on one token to see what its layers take and return.

    Args:
        model: a transformers causal language model.
        unit: what shall be switched: block, attention or mlp.

    Raises:
        UnsupportedModelError: encoder-decoder and state-space models, models that cannot generate,
            and models whose layers are not a plain stack over [batch, tokens, hidden].
    """
    if unit not in UNITS:
        raise ConfigError(f"unit is {unit!r}; expected one of {', '.join(UNITS)}.")
    unwrap = getattr(model, "get_base_model", None)  # peft
    base: Any = unwrap() if unwrap else model
    name = type(base).__name__
    config = getattr(base, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{name} is no transformers model: it has no config.")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; firstlm routes decoder-only models, "
            "where the prompt passes the same layers that generate."
        )
    text_config = config.get_text_config(decoder=True)
    if getattr(base, "_is_stateful", False) or _has_recurrent_layers(text_config):
        raise UnsupportedModelError(
            f"{name} keeps more than keys and values (a state-space, linear-attention or "
            "compressed state); its layers cannot be skipped per prompt. Those of models with "
            "plain attention can."
        )
    if not (hasattr(base, "can_generate") and base.can_generate()):
        raise UnsupportedModelError(
            f"{name} cannot generate text. Load it with AutoModelForCausalLM instead."
        )
    takes = inspect.signature(base.forward).parameters
    cache_argument = next((a for a in CACHE_ARGUMENTS if a in takes), None)
    if cache_argument is None:
        raise UnsupportedModelError(
            f"{name} takes no KV cache ({' or '.join(CACHE_ARGUMENTS)}), in which decisions would "
            "ride."
        )
    modules = _find_list(base, text_config.num_hidden_layers)
    if "prev_topk_indices" in inspect.signature(type(modules[0]).forward).parameters:
        raise UnsupportedModelError(
            f"Layers of {name} choose for later layers what these attend to; none can be skipped."
        )
    units = modules if unit == "block" else [_submodule(module, unit) for module in modules]
    hidden_size, tuple_sizes = _probe(base, modules, units)
    adds_residual = "residual" in inspect.signature(type(units[0]).forward).parameters
    locked = _kv_producers(text_config)
    return LayerStack(
        modules, units, hidden_size, tuple_sizes, adds_residual, locked, cache_argument
    )


def _has_recurrent_layers(config: object) -> bool:
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(
        kinds & {"conv", "linear_attention", "hybrid", "hybrid_sliding", "mamba", "recurrent"}
    )


def _find_list(base: Any, count: int) -> list[nn.Module]:
    root = base.get_decoder() if hasattr(base, "get_decoder") else base
    for start in (root, base):
        for path, module in (start or base).named_modules():
            named = path.rsplit(".", 1)[-1] in LIST_NAMES
            if named and isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    raise UnsupportedModelError(
        f"{type(base).__name__} has no list of {count} decoder layers under a usual name "
        f"({', '.join(LIST_NAMES)}); firstlm cannot route it."
    )


def _submodule(layer: nn.Module, unit: str) -> nn.Module:
    for name in SUBMODULES[unit]:
        found = getattr(layer, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModelError(
        f"{type(layer).__name__} has no {unit} module that can be switched by itself "
        f"(looked for {', '.join(SUBMODULES[unit])}). Use unit='block' for this model."
    )


def _probe(base: Any, modules: list[nn.Module], units: list[nn.Module]) -> tuple[int, list[int]]:
    """Return hidden size and, per unit, how long a tuple it returns (0: a bare tensor)."""
    shapes: dict[str, torch.Size] = {}
    sizes: dict[int, int] = {}

    def note_shape(key: str):
        def hook(_module, args, kwargs):
            hidden = args[0] if args else kwargs.get("hidden_states")
            shapes[key] = hidden.shape if isinstance(hidden, torch.Tensor) else torch.Size()

        return hook

    def note_size(layer: int):
        def hook(_module, _args, output):
            if isinstance(output, tuple) and any(isinstance(o, nn.Parameter) for o in output):
                raise UnsupportedModelError(
                    f"{type(base).__name__} adds a bias outside the module that is to be switched, "
                    "so it would not be skipped whole. Use unit='block' for this model."
                )
            if isinstance(output, tuple | torch.Tensor):
                sizes[layer] = len(output) if isinstance(output, tuple) else 0

        return hook

    hooks = [unit.register_forward_hook(note_size(i)) for i, unit in enumerate(units)]
    for kind, found in (("layer", modules), ("unit", units)):
        for i, module in enumerate(found):
            hook = note_shape(f"{kind} {i}")
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    was_training = base.training
    try:
        base.eval()
        device = base.get_input_embeddings().weight.device
        with torch.no_grad():
            base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        base.train(was_training)
        for hook in hooks:
            hook.remove()
    whole = len(shapes) == 2 * len(modules) and len(sizes) == len(modules)
    if not whole or any(len(shape) != 3 for shape in shapes.values()):
        raise UnsupportedModelError(
            f"{type(base).__name__} does not pass [batch, tokens, hidden] through each of its "
            f"{len(modules)} layers once; firstlm cannot route it."
        )
    return shapes["layer 0"][-1], [sizes[i] for i in range(len(modules))]


def _kv_producers(config: object) -> frozenset[int]:
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None and getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            "Layers of this model share keys and values; routing it needs a newer transformers: "
            "upgrade with `pip install -U transformers`."
        )
    modes = modes or ()
    return frozenset(i for i, mode in enumerate(modes) if mode == "store")
