# SPDX-License-Identifier: Apache-2.0
"""Make a model's layers obey per-prompt decisions.

`Routing.attach` overrides `forward` on each layer instance; nothing else of the model changes, and
`detach` puts everything back. What a batch decided lives in its `RoutingState`, which rides in the
KV cache (`SkipCache.state`), or, where there is no cache (training, full recomputation), in the
scope of `Routing.tracing(state)`.
"""

from __future__ import annotations

import threading
import time
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.modeling_outputs import CausalLMOutputWithPast

from firstlm.cache import SkipCache
from firstlm.decisions import RoutingState
from firstlm.errors import ConfigError, UnsupportedModelError
from firstlm.layers import LayerStack, decoder_layers

# The state of the batch whose layer is running, for units inside a layer that get no cache (mlp).
_ACTIVE: ContextVar[RoutingState | None] = ContextVar("firstlm_active", default=None)
_ONLY_CACHED: ContextVar[bool] = ContextVar("firstlm_only_cached", default=False)
_OVERRIDING = threading.Lock()  # two threads that generate for the first time


class Routing:
    """Overrides the layers of one model; see the module's docstring."""

    def __init__(self, model: nn.Module, unit: str = "block") -> None:
        self.unit = unit
        self.stack: LayerStack = decoder_layers(model, unit)
        self.trace: RoutingState | None = None
        self._undo: list[tuple[nn.Module, Any]] = []

    def attach(self) -> None:
        """Override the layers' forward. A layer without a state in sight runs as it always did."""
        if self._undo:
            return
        for layer, module in enumerate(self.stack.modules):
            self._override(module, partial(self._visit, layer))
        if self.unit != "block":
            for layer, module in enumerate(self.stack.units):
                self._override(module, partial(self._unit_forward, layer))

    def decode_fast(self, model: nn.Module) -> None:
        """Let a cache's engine answer for the whole model, where the cache has one."""
        with _OVERRIDING:
            if all(module is not model for module, _ in self._undo):
                self._override(model, self._decode)

    def _decode(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one step of transformers' `generate` by the engine, or else as it always was."""
        argument = self.stack.cache_argument
        cache, ids = kwargs.get(argument), kwargs.get("input_ids")
        if isinstance(cache, SkipCache) and cache.engine is not None and ids is not None:
            mask = kwargs.get("attention_mask")
            if mask is None:  # transformers leaves out masks without padding
                mask = ids.new_ones(len(ids), cache.get_seq_length() + 1)
            logits = cache.step(ids[:, -1], mask[:, :-1]) if ids.shape[1] == 1 else None
            if logits is not None:
                output: Any = CausalLMOutputWithPast(logits=logits[:, None])
                output[argument] = cache
                return output
        return original(*args, **kwargs)

    @property
    def attached(self) -> bool:
        """Whether the layers' forward is overridden."""
        return bool(self._undo)

    def _override(self, module: nn.Module, forward: Any) -> None:
        before = module.__dict__.get("forward")
        if isinstance(getattr(getattr(before, "func", None), "__self__", None), Routing):
            self.detach()
            raise ConfigError(
                "This base model's layers are routed by another FirstModel. Call its detach() "
                "first, or load the base model again."
            )
        self._undo.append((module, before))
        original = module.forward
        module.forward = update_wrapper(partial(forward, original), original)  # keeps its signature

    def detach(self) -> None:
        """Put back whatever forward each layer had."""
        for module, before in reversed(self._undo):
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._undo.clear()

    @contextmanager
    def tracing(self, state: RoutingState) -> Iterator[RoutingState]:
        """Route forward passes without a cache by `state`.

        Under gradient checkpointing the scope must span the backward pass, which replays layers.
        """
        before, self.trace = self.trace, state
        state.traced = True
        try:
            yield state
        finally:
            self.trace = before

    @staticmethod
    @contextmanager
    def only_with_a_cache() -> Iterator[None]:
        """Refuse forward passes without a routed cache, in which every layer would run."""
        token = _ONLY_CACHED.set(True)
        try:
            yield
        finally:
            _ONLY_CACHED.reset(token)

    def _visit(self, layer: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Run layer `layer` as the batch's state says."""
        cache = next((a for a in (*args, *kwargs.values()) if isinstance(a, SkipCache)), None)
        state = cache.state if cache is not None else self.trace
        if state is None:
            if _ONLY_CACHED.get():
                raise ConfigError(
                    "transformers' generate drops this model's cache, and with it which layers run "
                    "as soon as a row is longer than what its first rotary factors are for "
                    "(original_max_position_embeddings). Keep prompt and answer within that, or "
                    "answer with firstlm.generate.stream."
                )
            return original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = hidden.shape[1]
        first = cache.tokens_seen[layer] if cache is not None else 0
        state.in_prefill = first < state.prompt_length
        if layer == 0 and not state.in_prefill and state.first_token_at is None:
            state.first_token_at = time.perf_counter()
        step = first - state.prompt_length
        if cache is not None and step >= 0 and state.retire(layer, step, hidden.device):
            cache.keep_rows(layer)
        deferred = cache is not None and state.prefill == "full"
        whole = True
        if not state.decided(layer) or (state.traced and torch.is_grad_enabled()):
            whole = state.observe(layer, hidden, first)
            if not whole and not deferred:
                raise ConfigError(
                    "prefill='skip' needs the whole prompt in one forward pass: a layer's decision "
                    "depends on it. Leave prefill_chunk_size unset, or use prefill='full'."
                )
            if not deferred:
                state.decide(layer, hidden.device)
        token = _ACTIVE.set(state)
        try:
            if self.unit == "block":
                output = self._gated(layer, state, hidden, original, args, kwargs)
            else:
                output = original(*args, **kwargs)
        finally:
            _ACTIVE.reset(token)
        if cache is not None:
            self._settle(layer, state, cache, tokens, hidden.device, deferred and whole)
        return output

    def _settle(
        self,
        layer: int,
        state: RoutingState,
        cache: SkipCache,
        tokens: int,
        device: torch.device,
        decide_now: bool,
    ) -> None:
        """Count a layer's tokens in the cache and, with prefill="full", take the decision."""
        rows = state.stored_rows(layer)
        cache.advance(layer, tokens, stored=rows is None or len(rows) > 0)
        if decide_now and not state.decided(layer):
            state.decide(layer, device)
            cache.keep_rows(layer)

    def _unit_forward(self, layer: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the attention or mlp of a layer as the batch's state says."""
        state = _ACTIVE.get() or self.trace
        if state is None:
            return original(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.stack.adds_residual:
            bypass = kwargs["residual"] if "residual" in kwargs else args[1]
        else:
            bypass = torch.zeros_like(hidden)
        return self._gated(layer, state, bypass, original, args, kwargs)

    def _gated(
        self,
        layer: int,
        state: RoutingState,
        bypass: torch.Tensor,
        original: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a unit for the rows that keep it; the others get `bypass`."""
        if not state.decided(layer):  # prefill="full": the prompt runs every layer
            state.count_call()
            return original(*args, **kwargs)
        rows = state.rows(layer)
        if state.traced and (state.gate != "hard" or state.prefill == "full" or state.stepped):
            state.count_call()
            return _replace_hidden(
                original(*args, **kwargs),
                lambda out: _blend(state, layer, out.reshape(bypass.shape), bypass),
            )
        if rows is None:
            state.count_call()
            return original(*args, **kwargs)
        size = self.stack.tuple_sizes[layer]
        if len(rows) == 0:
            if torch.is_grad_enabled() and isinstance(self.stack.modules[layer], FSDPModule):
                bypass = bypass + self._no_gradient(layer)
            return (bypass, *([None] * (size - 1))) if size else bypass
        state.count_call()
        pick = partial(_take_rows, rows=rows, count=state.row_count)
        output = original(
            *(pick(a) for a in args), **{name: pick(a, name=name) for name, a in kwargs.items()}
        )
        # Llama 4's mixture of experts returns [rows * tokens, hidden].
        shape = (len(rows), *bypass.shape[1:])
        return _replace_hidden(
            output, lambda out: bypass.index_copy(0, rows, out.reshape(shape)), size
        )

    def _no_gradient(self, layer: int) -> torch.Tensor | float:
        """Return a zero that gives what a skipped unit trains gradients of zero.

        Processes that share a layer (FSDP2) reduce its gradients together: all must have some. Adam
        moves by them, as it does not where layers are whole and have no gradient.
        """
        parameters = self.stack.units[layer].parameters()
        return 0.0 * sum(p.sum() for p in parameters if p.requires_grad)


def _replace_hidden(output: Any, change: Any, drop_rest: int = 0) -> Any:
    """Apply `change` to the hidden states of a unit's output (first of a tuple, or the tensor)."""
    if not isinstance(output, tuple):
        return change(output)
    rest = [None] * (drop_rest - 1) if drop_rest else output[1:]
    return (change(output[0]), *rest)


def _blend(
    state: RoutingState, layer: int, out: torch.Tensor, bypass: torch.Tensor
) -> torch.Tensor:
    """Mix a unit's output with its bypass by the gate, differentiably while routers train.

    soft: `bypass + rho * (out - bypass)`. straight_through: hard choice forward, and the gradient
    of the soft gate backward (its forward value is exactly zero).
    """
    score = state.scores[layer]
    # With prefill="full" the prompt's own positions are not gated; only what follows is.
    free = None
    if state.prefill == "full":
        free = state.prompt_mask.to(out.device).unsqueeze(-1)
    if score is None or state.gate == "hard":
        choice = _choice(state, layer, out)
        return torch.where(choice if free is None else choice | free, out, bypass)
    rho = torch.sigmoid(score).to(out.device, out.dtype).view(-1, 1, 1)
    if state.gate == "soft":
        mixed = bypass + rho * (out - bypass)
    else:
        choice = _choice(state, layer, out)
        mixed = torch.where(choice, out, bypass)
        mixed = mixed + (rho - rho.detach()) * (out - bypass).detach()
    return mixed if free is None else torch.where(free, out, mixed)


def _choice(state: RoutingState, layer: int, out: torch.Tensor) -> torch.Tensor:
    """Return which rows, or with a stepped policy which of their tokens, run the layer."""
    if state.stepped is not None:
        return state.runs_at(layer).unsqueeze(-1).to(out.device)
    return torch.tensor(state.row_keep(layer), device=out.device).view(-1, 1, 1)


def _take_rows(value: Any, rows: torch.Tensor, count: int, name: str = "") -> Any:
    """Pick batch rows from whatever a layer is given; what has no batch dimension stays."""
    if isinstance(value, torch.Tensor):
        if name == "position_bias" or value.dim() < 2:  # MPT: per head, not per row
            return value
        index = rows.to(value.device)
        if value.shape[0] == count and name != "alibi":
            return value.index_select(0, index)
        if name == "alibi" and value.shape[0] % count == 0:  # BLOOM, Falcon: [rows * heads, ...]
            by_row = value.view(count, -1, *value.shape[1:]).index_select(0, index)
            return by_row.flatten(0, 1)
        return value
    if isinstance(value, tuple | list):
        return type(value)(_take_rows(item, rows, count, name) for item in value)
    if isinstance(value, dict | UserDict):  # UserDict: keys and values shared between layers
        return type(value)({key: _take_rows(v, rows, count, name) for key, v in value.items()})
    if type(value).__name__ == "BlockMask":
        raise UnsupportedModelError(
            "flex attention masks cannot be split by rows; load the model with "
            "attn_implementation='sdpa' to run different masks in one batch."
        )
    return value
