# SPDX-License-Identifier: Apache-2.0
"""Attention of decode steps: one token per row against what the layer has stored for that row.

A row's keys and values lie from place 0 on, without padding, so that rows of different lengths
share a batch and each knows its own positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from firstlm.errors import UnsupportedModelError
from firstlm.graphs import stored

ATTENTION = "firstlm_decode"  # its name among transformers' attention functions


class Slab:
    """The keys and values of one layer, as a cache that its attention writes to."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        span: torch.Tensor,
        window: int | None,
    ) -> None:
        self.keys, self.values, self.positions, self.span = keys, values, positions, span
        self.window = window  # tokens that the layer attends to; None: all
        self.updates, self.reads = 0, 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a token [rows, heads, 1, size] at each row's position; return all up to there."""
        self.updates += 1
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        heads = torch.arange(keys.shape[1], device=keys.device)[None, :]
        place = (rows, heads, self.positions[:, None])
        self.keys.index_put_(place, keys[:, :, 0])
        self.values.index_put_(place, values[:, :, 0])
        tokens = self.span.shape[0]
        return self.keys.narrow(2, 0, tokens), self.values.narrow(2, 0, tokens)

    def get_seq_length(self, *_args: Any) -> Any:
        """Return how many tokens there are (layers should not ask: rows differ)."""
        raise UnsupportedModelError("A layer asks for the cache's length, which differs by row.")


SLAB: ContextVar[Slab] = ContextVar("firstlm_slab")


def attend(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from one token per row [rows, heads, 1, size] to the row's own tokens, in float32.

    `s_aux` [heads] are attention sinks: scores of a token that holds nothing.
    """
    unknown = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and k != "position_ids"]
    if unknown:
        raise UnsupportedModelError(f"Its attention takes {', '.join(unknown)}.")
    slab = SLAB.get()
    slab.reads += 1
    rows, heads, _, size = query.shape
    groups = heads // keys.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    query = stored(query.view(rows, keys.shape[1], groups, 1, size).float() * scale)
    scores = (query * keys.unsqueeze(2).float()).sum(-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # Some models say their window to attention, some leave it to the mask, which is ours here.
    if None not in (slab.window, sliding_window) and slab.window != sliding_window:
        raise UnsupportedModelError(f"Its windows are {sliding_window} and {slab.window} tokens.")
    window = slab.window if sliding_window is None else sliding_window
    place = slab.positions[:, None]
    seen = slab.span <= place
    if window is not None:
        seen = seen & (slab.span > place - window)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().view(1, keys.shape[1], groups, 1).expand(rows, -1, -1, -1)
        share = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        share = scores.softmax(-1)
    mixed = (share.unsqueeze(-1) * values.unsqueeze(2).float()).sum(3)
    return mixed.to(values.dtype).view(rows, 1, heads, values.shape[-1]), None


@contextmanager
def our_attention(base: Any) -> Iterator[None]:
    """Let every attention layer of the model call `attend`."""
    AttentionInterface.register(ATTENTION, attend)
    configs = {id(m.config): m.config for m in base.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
