# SPDX-License-Identifier: Apache-2.0
"""KV caches with holes: a skipped layer stores nothing, and the cache still knows its length.

transformers reads a cache's length and mask sizes off its first (full or sliding) layer. When that
layer is skipped, stock caches answer 0 and decoding goes silently wrong. These caches count tokens
per layer themselves, and hold for each layer only the rows (sequences) that run it.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, StaticCache

from firstlm.errors import ConfigError
from firstlm.layers import CACHE_ARGUMENTS

if TYPE_CHECKING:
    from firstlm.decisions import RoutingState
    from firstlm.engine import DecodeEngine
    from firstlm.fast_batch import FastBatch


class SkipCache(Cache):
    """Mixin over a transformers cache that carries one batch's `RoutingState`.

    `state.stored_rows(i)` says which rows layer i holds: None for all, else their indices.
    """

    layers: list[Any]  # which attributes a slot has depends on its class
    state: RoutingState
    tokens_seen: list[int]
    engine: DecodeEngine | None = None  # decodes in transformers' place where it is set
    longest: int = 0  # tokens that the engine makes room for
    batch: FastBatch | None = None  # what the engine decodes; holds all keys and values then

    def bind(self, state: RoutingState) -> None:
        """Attach the decisions of the batch that this cache serves."""
        self.state = state
        self.tokens_seen = [0] * len(self.layers)
        if not self.layers:
            raise ConfigError("A SkipCache needs its layers up front: build it with a config.")

    def advance(self, layer: int, tokens: int, stored: bool) -> None:
        """Count the tokens that layer `layer` has passed, whether or not it stored them."""
        self.tokens_seen[layer] += tokens
        if stored:
            return
        slot = self.layers[layer]
        if isinstance(getattr(slot, "cumulative_length", None), int):
            slot.cumulative_length += tokens
        if hasattr(slot, "cumulative_length_int"):
            slot.cumulative_length_int += tokens

    def step(self, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:
        """Decode one token [rows] per row with the engine; the first call gives the cache to it.

        Args:
            token_ids: [rows].
            attention_mask: [rows, tokens before it].

        Returns:
            Logits [rows, vocab], or None where transformers shall decode: no engine is set, the
            prompt has not run yet, or the engine cannot run this model.
        """
        if self.engine is None or not self.state.complete:
            return None
        if self.get_seq_length() < self.state.prompt_length:
            return None
        if self.state.first_token_at is None:
            self.state.first_token_at = time.perf_counter()
        if self.batch is None:
            self.batch = self.hand_over(attention_mask)
        logits = self.batch.step(token_ids)
        self.state.in_prefill = False
        self.state.layer_calls["decode"] += self.batch.layer_calls
        self.tokens_seen = [tokens + 1 for tokens in self.tokens_seen]
        return logits

    def hand_over(self, attention_mask: torch.Tensor) -> FastBatch:
        """Give all keys and values to the engine; `attention_mask` is [rows, tokens so far]."""
        assert self.engine is not None, "there is no engine to give them to"
        room = max(self.longest - attention_mask.shape[1], 1)
        batch = self.engine.start(self, attention_mask, room)
        for slot in self.layers:
            slot.keys = slot.values = None
            slot.is_initialized = False
        return batch

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens the layer has passed, stored or not."""
        return self.tokens_seen[layer_idx] if layer_idx < len(self.tokens_seen) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (kv_length, kv_offset) of a layer's mask, also where the layer has a hole."""
        slot = self.layers[layer_idx]
        if getattr(slot, "is_sliding", False) or hasattr(slot, "max_cache_len"):
            return slot.get_mask_sizes(query_length)
        return self.tokens_seen[layer_idx] + query_length, 0

    def _select(self, index: torch.Tensor) -> None:
        """Make row j of the batch what row index[j] was, in every layer and in the decisions."""
        self._refuse_fast("Rows cannot be reordered, picked or repeated")
        for layer, slot in enumerate(self.layers):
            rows = self.state.stored_rows(layer)
            picked = index
            if rows is not None:
                place = torch.full((self.state.row_count,), -1, device=rows.device)
                place[rows] = torch.arange(len(rows), device=rows.device)
                picked = place[index.to(rows.device)]
                picked = picked[picked >= 0]
            self._select_slot(slot, picked)
        self.state.select_rows(index)

    def _refuse_fast(self, what: str) -> None:
        if self.batch is not None:
            raise ConfigError(f"{what} while the fast engine decodes; use engine='hf' for that.")

    @staticmethod
    def _select_slot(slot: Any, index: torch.Tensor) -> None:
        if slot.is_initialized and getattr(slot, "keys", None) is not None and slot.keys.numel():
            index = index.to(slot.keys.device)
            slot.keys = slot.keys.index_select(0, index)
            slot.values = slot.values.index_select(0, index)
            if getattr(slot, "indexer_keys", None) is not None:  # sparse attention (DeepSeek 3.2)
                slot.indexer_keys = slot.indexer_keys.index_select(0, index)
            if getattr(slot, "indexer_position_ids", None) is not None:
                slot.indexer_position_ids = slot.indexer_position_ids.index_select(1, index)

    def keep_rows(self, layer: int) -> None:
        """Drop what a layer stored of rows that run it no more; before, it stored all of them."""
        slot, rows = self.layers[layer], self.state.stored_rows(layer)
        if rows is None:
            return
        if len(rows):
            self._select_slot(slot, rows)
        else:
            tokens = self.tokens_seen[layer]
            slot.reset()
            slot.keys = slot.values = None
            slot.is_initialized = False
            self.tokens_seen[layer] = 0
            self.advance(layer, tokens, stored=False)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow beam search: row j continues what row beam_idx[j] was."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the given rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._select(torch.arange(self.state.row_count).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (0 or negative, as in transformers)."""
        self._refuse_fast("Tokens cannot be forgotten")
        for layer, slot in enumerate(self.layers):
            if slot.is_initialized:
                slot.crop(tokens_to_remove)
            else:
                self.advance(layer, tokens_to_remove, stored=False)
                continue
            self.tokens_seen[layer] += tokens_to_remove

    def reset(self) -> None:
        """Empty the cache and forget the decisions."""
        self.batch = None
        super().reset()
        self.tokens_seen = [0] * len(self.layers)
        self.state.reset()

    @property
    def batch_size(self) -> int:
        """Rows of the batch (layers may hold fewer)."""
        return self.state.row_count or -1

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        if self.batch is not None:
            return self.batch.kv_bytes
        total = 0
        for slot in self.layers:
            for name in ("keys", "values", "indexer_keys"):
                tensor = getattr(slot, name, None)
                if isinstance(tensor, torch.Tensor):
                    total += tensor.untyped_storage().nbytes()
        return total


class DynamicSkipCache(SkipCache, DynamicCache):
    """A growing cache with holes."""


class StaticSkipCache(SkipCache, StaticCache):
    """A preallocated cache with holes; a layer that no row runs is never allocated."""

    @property
    def room(self) -> int:
        """Tokens that fit; sliding layers roll over and set no bound."""
        bounds = [
            slot.max_cache_len
            for slot in self.layers
            if hasattr(slot, "max_cache_len") and not slot.is_sliding
        ]
        return min(bounds, default=sys.maxsize)

    def check(self, base: Any, longest: int) -> None:
        """Refuse rows of `longest` tokens that do not fit, and models that take no static cache."""
        if longest > self.room:
            raise ConfigError(
                f"The static cache has room for {self.room} tokens, but {longest} may come; "
                "ask for fewer new tokens, or start with a dynamic cache."
            )
        if getattr(base, "_can_compile_fullgraph", True) is False:
            raise ConfigError(
                f"{type(base).__name__} is not made for static caches (GPT-Neo, for one, answers "
                "wrongly with them); use cache_implementation='dynamic'."
            )


def take_cache(generate_kwargs: dict[str, Any]) -> SkipCache | None:
    """Take the cache to continue, if there is one, out of the options of `generate`."""
    given = [generate_kwargs.pop(name, None) for name in CACHE_ARGUMENTS]
    cache = next((found for found in given if found is not None), None)
    if cache is not None and not isinstance(cache, SkipCache):
        raise ConfigError(
            "A cache to continue must be the .cache of an earlier output of generate."
        )
    if cache is not None and cache.batch is not None:
        raise ConfigError(
            "This cache was decoded with engine='fast' and cannot be continued; generate with "
            "engine='hf' what you want to go on from."
        )
    return cache


def make_cache(
    config: Any, state: RoutingState, kind: str = "dynamic", max_len: int = 0
) -> SkipCache:
    """Build an empty cache for a model's text config, bound to `state`.

    Args:
        config: the model's config.
        state: the decisions of the batch.
        kind: "dynamic" or "static".
        max_len: tokens to allocate for, static only.

    Raises:
        ConfigError: another kind was asked for.
    """
    config = config.get_text_config(decoder=True)
    if kind == "dynamic":
        cache: SkipCache = DynamicSkipCache(config=config)
    elif kind == "static":
        cache = StaticSkipCache(config=config, max_cache_len=max_len)
    else:
        raise ConfigError(
            f"cache_implementation={kind!r} cannot hold skipped layers; use 'dynamic' or 'static'."
        )
    cache.bind(state)
    return cache
