# SPDX-License-Identifier: Apache-2.0
"""What goes into generation: a batch of token ids, its mask, and options that skips allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from firstlm.errors import ConfigError


def take_prompts(
    input_ids: Any,
    attention_mask: torch.Tensor | None,
    generation_config: Any,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of prompts and its mask [batch, tokens] on a device.

    Args:
        input_ids: [batch, tokens], padded on either side.
        attention_mask: [batch, tokens]; without it, pad tokens are taken for padding where the
            model has a pad token that is not also EOS.
        generation_config: the model's, for that.
        device: where both shall be.

    Raises:
        ConfigError: this is no batch of token ids, or the mask does not fit.
    """
    _check_prompts(input_ids)
    input_ids = input_ids.to(device)
    if attention_mask is None:
        attention_mask = _infer_mask(generation_config, input_ids)
    if not isinstance(attention_mask, torch.Tensor):
        raise ConfigError(
            f"attention_mask is {type(attention_mask).__name__}; expected a tensor [batch, tokens]."
        )
    attention_mask = attention_mask.to(device)
    _check_mask(attention_mask, input_ids)
    return input_ids, attention_mask


def _check_prompts(input_ids: Any) -> None:
    """Refuse what is no batch of token ids."""
    if not isinstance(input_ids, torch.Tensor):
        raise ConfigError(
            f"input_ids is {type(input_ids).__name__}; expected a tensor [batch, tokens] of token "
            'ids, such as tokenizer(text, return_tensors="pt")["input_ids"].'
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ConfigError(f"input_ids has dtype {input_ids.dtype}; expected whole numbers.")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ConfigError(
            f"input_ids has the shape {tuple(input_ids.shape)}; expected [batch, tokens] with at "
            "least one prompt of at least one token."
        )


def check_ids(ids: Sequence[int], vocab: int, name: str) -> None:
    """Refuse a prompt that has no tokens, or unknown ones.

    Args:
        ids: of its tokens.
        vocab: how many tokens the model knows.
        name: of the prompt, in errors.
    """
    if not len(ids):
        raise ConfigError(f"{name} has no tokens; expected one or more.")
    if min(ids) < 0 or max(ids) >= vocab:
        raise ConfigError(f"{name} has a token id outside 0 to {vocab - 1}.")


def _check_mask(attention_mask: torch.Tensor, input_ids: torch.Tensor) -> None:
    """Refuse a mask that does not fit its prompts [batch, tokens], or hides a whole prompt."""
    if attention_mask.shape != input_ids.shape:
        raise ConfigError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; expected "
            f"{tuple(input_ids.shape)}, that of input_ids."
        )
    if not bool(attention_mask.any(1).all()):
        raise ConfigError(
            "attention_mask hides every token of a prompt; expected one real token or more in each "
            "row."
        )


def asked(name: str, generation_config: Any, generate_kwargs: dict[str, Any]) -> Any:
    """Return an option of transformers' `generate`, or None.

    Args:
        name: of the option.
        generation_config: the model's own, which fills in what a given one leaves open.
        generate_kwargs: what `generate` is called with.
    """
    configs = generate_kwargs.get("generation_config"), generation_config
    found = (generate_kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in found if value is not None), None)


def refuse_rollback(generation_config: Any, generate_kwargs: dict[str, Any]) -> None:
    """Refuse what transformers' `generate` can do but skipped layers cannot follow."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if asked(name, generation_config, generate_kwargs) is not None:
            raise ConfigError(f"{name} rolls the cache back, which is not supported with skips.")
    if generate_kwargs.get("inputs_embeds") is not None:
        raise ConfigError("inputs_embeds is not supported; give prompts as input_ids.")
    if generate_kwargs.get("use_cache") is False:
        raise ConfigError("use_cache=False is not supported: decisions ride in the cache.")


def refuse_for_engine(generation_config: Any, generate_kwargs: dict[str, Any]) -> None:
    """Refuse what transformers' `generate` can do but the fast engine cannot."""
    if (asked("num_beams", generation_config, generate_kwargs) or 1) > 1:
        raise ConfigError("Beam search reorders rows; use it with engine='hf'.")
    for name in ("output_hidden_states", "output_attentions"):
        if asked(name, generation_config, generate_kwargs):
            raise ConfigError(f"{name} needs engine='hf': the fast engine keeps logits alone.")


def pad_on_the_left(
    input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move padding to the left, where generation needs it; both are [batch, tokens]."""
    # A stable sort by the mask moves padding to the front and keeps the order of real tokens.
    order = attention_mask.long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, attention_mask), both [rows, longest], padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = torch.tensor(row)
            mask[i, -len(row) :] = 1
    return ids, mask


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Count each row's own tokens from 0 [batch, tokens], as transformers' `generate` does."""
    positions = attention_mask.long().cumsum(1) - 1
    return positions.masked_fill(attention_mask == 0, 0)


def _infer_mask(generation_config: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Take pad tokens for padding, where the model has a pad token that is not also EOS."""
    pad, eos = generation_config.pad_token_id, generation_config.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in eos_ids:
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()


def longest_row(generation_config: Any, prompt_length: int, generate_kwargs: dict[str, Any]) -> int:
    """Return how many tokens a row may have in the end, as transformers' `generate` counts."""
    new = asked("max_new_tokens", generation_config, generate_kwargs)
    if new is not None:
        return prompt_length + new
    return asked("max_length", generation_config, generate_kwargs) or prompt_length + 20


def kv_token_bytes(config: Any, size: int) -> int:
    """Return the bytes of a token's keys and values in one layer.

    Args:
        config: of the model.
        size: bytes of a number.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * heads * width * size
