# SPDX-License-Identifier: Apache-2.0
"""The LoRA of a routed model: put on, given a higher rank, made ready to train."""

from __future__ import annotations

import torch

from firstlm.config import TrainConfig
from firstlm.errors import ConfigError
from firstlm.lora import lora_layers, lora_parameters, without_peft_warning
from firstlm.model import FirstModel


def add_lora(model: FirstModel, config: TrainConfig) -> None:
    """Put fresh LoRA matrices on all linear layers but the vocabulary's."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with without_peft_warning():
        model.base = get_peft_model(model.base, lora)


def lora_to_train(model: FirstModel, config: TrainConfig) -> list[torch.nn.Parameter]:
    """Return the LoRA matrices to train, in float32: steps are smaller than bfloat16 resolves."""
    if not model.has_adapter:
        add_lora(model, config)
    found = list(lora_parameters(model).values())
    for parameter in found:
        parameter.data = parameter.data.float()
    return found


@torch.no_grad()
def raise_rank(model: FirstModel, config: TrainConfig) -> None:
    """Give LoRA the rank and scale of `config`; the model computes what it did.

    Raises:
        ConfigError: the rank would be lower, or the adapter is of another kind (DoRA), or on
            modules that ours is not on.
    """
    before = _matrices(model)
    rank = max(len(matrix) for name, (matrix, _) in before.items() if "lora_A" in name)
    if rank > config.lora_rank:
        raise ConfigError(
            f"{config.artifact} has a LoRA of rank {rank}, but {config.lora_rank} was asked for, "
            f"which has no room for it; give --lora-rank {rank} or more."
        )
    model.base = model.base.unload()
    add_lora(model, config)
    after = _matrices(model)
    if not before.keys() <= after.keys():
        raise ConfigError(
            f"{config.artifact} has more than LoRA matrices on linear layers (DoRA, or others), to "
            f"which no rank can be added; give --lora-rank {rank}, to go on with what is there."
        )
    for name, (old, scale) in before.items():
        new, new_scale = after[name]
        if "lora_A" in name:
            new[: len(old)] = old
        else:
            new[:, : old.shape[1]] = old.to(new.dtype) * (scale / new_scale)


def _matrices(model: FirstModel) -> dict[str, tuple[torch.Tensor, float]]:
    """Return LoRA's matrices by name, and what their product is multiplied by."""
    scales = {
        id(p): part.scaling["default"] for part in lora_layers(model) for p in part.parameters()
    }
    return {name: (p, scales[id(p)]) for name, p in lora_parameters(model).items()}
