# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Each layer of a vLLM model runs for just the requests that keep it.

A step of vLLM is one flat row of tokens, some of prompts and some of answers. A layer takes those
tokens that run it out of the row, sees attention metadata of just these, and what it computed is
put back. Metadata is built once for each distinct set of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firstlm.decisions import RoutingState
from firstlm.vllm_wishes import Decisions

# Up to so many tokens a layer costs what its weights cost: tokens that skip it ride along, and what
# they get is thrown away. Taking them out would need attention metadata for each set of requests.
RIDE_ALONG = 16


@dataclass(frozen=True)
class Row:
    """A request in a step.

    Attributes:
        state: its decisions.
        begin: its first token in the step's row.
        tokens: how many it has there.
        first: how many of its tokens came in earlier steps.
    """

    state: RoutingState
    begin: int
    tokens: int
    first: int


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens of a step that run a layer.

    Attributes:
        rows: the requests they belong to, by their place in the step.
        counts: how many of each request's tokens run, from its first one on.
        index: their places in the step's row [tokens].
        riding: the places of the step's other tokens, where these ride along.
    """

    rows: list[int]
    counts: list[int]
    index: torch.Tensor
    riding: torch.Tensor | None


class Step:
    """One forward pass of the model over some requests.

    Args:
        rows: the requests.
        device: of the model.
        before: the step before this one. Where both are of answers of the same requests, as most
            are, nothing changes about which tokens run a layer.
    """

    def __init__(
        self, rows: Sequence[Row], device: torch.device, before: Step | None = None
    ) -> None:
        self.rows, self.device = rows, device
        self.visited: set[int] = set()
        self.metadata: dict[tuple[Part, int], tuple[Any, torch.Tensor]] = {}  # as far as built
        self._whole = tuple(row.tokens for row in rows)
        self._tokens = sum(self._whole)
        self._parts: dict[tuple[int, ...], Part] = {}
        answers = all(row.first >= row.state.prompt_length for row in rows)
        self._answers = [(row.state, row.tokens) for row in rows] if answers else None
        self._part_of: dict[int, Part | None] = {}
        if before is not None and answers and before._answers == self._answers:
            self._part_of = before._part_of

    def part(self, layer: int, states: Callable[[], torch.Tensor]) -> Part | None:
        """Return which tokens run a layer, None where all do; decides for prompts that enter it.

        Args:
            layer: its index.
            states: returns the hidden states that enter it [tokens, hidden].
        """
        self.visited.add(layer)
        if layer not in self._part_of:
            self._part_of[layer] = self._find(layer, states)
        return self._part_of[layer]

    def _find(self, layer: int, states: Callable[[], torch.Tensor]) -> Part | None:
        counts = tuple(self._count(row, layer, states) for row in self.rows)
        if counts == self._whole:
            return None
        if counts not in self._parts:
            rows = [i for i, count in enumerate(counts) if count]
            places = [
                place
                for i in rows
                for place in range(self.rows[i].begin, self.rows[i].begin + counts[i])
            ]
            index, riding = torch.tensor(places, dtype=torch.long, device=self.device), None
            if self._tokens <= RIDE_ALONG:
                others = sorted(set(range(self._tokens)).difference(places))
                riding = torch.tensor(others, dtype=torch.long, device=self.device)
            self._parts[counts] = Part(rows, [counts[i] for i in rows], index, riding)
        return self._parts[counts]

    def _count(self, row: Row, layer: int, states: Callable[[], torch.Tensor]) -> int:
        """Return how many of a request's tokens run a layer."""
        state = row.state
        prompt = max(min(state.prompt_length - row.first, row.tokens), 0)  # tokens of the prompt
        if not state.decided(layer):
            part = states()[row.begin : row.begin + prompt].unsqueeze(0)
            whole = state.observe(layer, part, row.first)
            if whole:
                state.decide(layer, self.device)
            elif state.prefill == "skip":
                raise RuntimeError(
                    "A prompt came in chunks, and prefill='skip' decides from whole prompts: start "
                    "vLLM with --no-enable-chunked-prefill."
                )
            else:
                return row.tokens
        if state.row_keep(layer)[0]:
            return row.tokens
        return prompt if state.prefill == "full" else 0


class LayerRouting:
    """Routes the layers of one vLLM model; `step` says which requests a forward pass is of.

    Args:
        decisions: of the requests that run.
        layers: the decoder layers, in order.
        device: of the model.
    """

    def __init__(
        self, decisions: Decisions, layers: Sequence[nn.Module], device: torch.device
    ) -> None:
        self.decisions, self.device = decisions, device
        self.count = len(layers)
        self.attention = [
            [str(m.layer_name) for m in layer.modules() if hasattr(m, "layer_name")]
            for layer in layers
        ]
        self._step: Step | None = None
        self._before: Step | None = None
        self._groups: list[_Group] = []
        self._group_of: dict[str, int] = {}

    def watch(self, groups: Sequence[Any]) -> None:
        """Note what attention metadata is made of from now on.

        Args:
            groups: vLLM's attention groups, whose layers share a block table and a builder.
        """
        self._groups = [_Group(group) for group in groups]
        self._group_of = {n: i for i, g in enumerate(groups) for n in g.layer_names}

    @contextmanager
    def step(self, rows: Sequence[Row]) -> Iterator[None]:
        """Run a forward pass over some requests.

        Raises:
            RuntimeError: layers ran without asking, as they do when the whole model is compiled.
        """
        self._step, self._before = Step(rows, self.device, self._before), None
        try:
            yield
            missed = self.count - len(self._step.visited)
            self._before = self._step
        finally:
            self._step = None
        if missed:
            raise RuntimeError(
                f"{missed} of {self.count} layers ran without asking which requests keep them: the "
                "model was compiled or captured whole. Start vLLM with --enforce-eager."
            )

    def fused(
        self,
        layer: int,
        run: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a layer of a model of vLLM's own, which adds the residual at its beginning.

        Args:
            layer: its index.
            run: the layer, (positions, hidden, residual) -> (hidden, residual).
            positions: [tokens].
            hidden: [tokens, hidden], of which `residual` is not yet part.
            residual: [tokens, hidden], or None before the first layer.
        """
        if residual is None:  # so that a skipped first layer leaves what the next one expects
            residual = torch.zeros_like(hidden)
        entering = residual
        part = self._part(layer, lambda: hidden + entering)
        if part is None:
            return run(positions, hidden, residual)
        if not part.rows:
            return hidden, residual
        index, riding = part.index, part.riding
        if riding is not None:
            kept = hidden.index_select(0, riding), residual.index_select(0, riding)
            new = run(positions, hidden, residual)  # which may write into both
            for tensor, rows in zip(new, kept, strict=True):
                tensor.index_copy_(0, riding, rows)
            return new
        with self._attending(layer, part):
            new_hidden, new_residual = run(positions[index], hidden[index], residual[index])
        return hidden.index_copy(0, index, new_hidden), residual.index_copy(0, index, new_residual)

    def packed(
        self, layer: int, size: int, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a layer of a transformers model, whose tokens are [1, tokens, hidden].

        Args:
            layer: its index.
            size: length of the tuple that it returns; 0 for a tensor.
            run: the layer.
            args: what it is called with.
            kwargs: likewise.
        """
        hidden = args[0] if args else kwargs["hidden_states"]
        part = self._part(layer, lambda: hidden[0])
        if part is None:
            return run(*args, **kwargs)
        tokens, index = hidden.shape[1], part.index

        def pick(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                packed = value.dim() >= 2 and value.shape[:2] == (1, tokens)
                return value.index_select(1, index) if packed else value
            return tuple(map(pick, value)) if isinstance(value, tuple) else value

        riding = part.riding
        if not part.rows:
            new = hidden
        elif riding is not None:
            kept = hidden.index_select(1, riding)
            output = run(*args, **kwargs)
            new = (output[0] if size else output).index_copy(1, riding, kept)
        else:
            with self._attending(layer, part):
                picked = {name: pick(value) for name, value in kwargs.items()}
                output = run(*map(pick, args), **picked)
            new = hidden.index_copy(1, index, output[0] if size else output)
        return (new, *([None] * (size - 1))) if size else new

    def _part(self, layer: int, states: Callable[[], torch.Tensor]) -> Part | None:
        return None if self._step is None else self._step.part(layer, states)

    @contextmanager
    def _attending(self, layer: int, part: Part) -> Iterator[None]:
        """Let a layer's attention see just the tokens that run."""
        from vllm.forward_context import get_forward_context

        assert self._step is not None
        context, built = get_forward_context(), self._step.metadata
        for name in self.attention[layer]:
            group = self._group_of[name]
            if (part, group) not in built:
                built[part, group] = self._groups[group].of(part, self._step.rows)
            context.attn_metadata[name], context.slot_mapping[name] = built[part, group]
        yield


class _Group:
    """Attention metadata of some layers, for parts of a step."""

    def __init__(self, group: Any) -> None:
        self._build = group.build_metadata
        self._common: Any = None
        group.build_metadata = self._noted
        for builder in group.metadata_builders:  # it would leave out what is noted here
            builder.supports_update_block_table = False

    def _noted(self, common: Any, *args: Any, **kwargs: Any) -> Any:
        self._common = common
        return self._build(common, *args, **kwargs)

    def of(self, part: Part, rows: Sequence[Row]) -> tuple[Any, torch.Tensor]:
        """Return metadata of some tokens of the step, and the slots of their keys and values."""
        common, counts = self._common, torch.tensor(part.counts, dtype=torch.int32)
        device = common.seq_lens.device
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        firsts = torch.tensor([rows[i].first for i in part.rows], dtype=torch.int32)
        lengths, picked = firsts + counts, torch.tensor(part.rows, device=device)

        def take(tensor: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
            return None if tensor is None else tensor[index.to(tensor.device)]

        slots = common.slot_mapping[part.index]
        smaller = common.replace(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths.to(device, common.seq_lens.dtype),
            seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(part.rows),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=common.block_table_tensor[picked],
            slot_mapping=slots,
            positions=take(common.positions, part.index),
            is_prefilling=take(common.is_prefilling, picked),
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        return self._build(smaller), slots
