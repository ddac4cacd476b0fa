# SPDX-License-Identifier: Apache-2.0
"""Rows that decode together, each with layers and a length of its own, through compiled steps.

Each layer stores keys and values for just the rows that keep it, without padding, in memory that is
allocated when decoding starts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from firstlm.capture import DecodeGraphs
from firstlm.errors import ConfigError
from firstlm.replays import Calls

BLOCK = 32  # memory for keys and values comes in blocks of so many tokens


@dataclass
class Stored:
    """What a layer holds of a batch.

    Attributes:
        keys: [rows that keep the layer, heads, tokens, size].
        values: as keys.
        rows: which rows of the batch these are.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: list[int]


@dataclass
class Part:
    """A compiled graph, and the inputs before its arguments.

    Attributes:
        forms: what its joined weights are packed to; parts of the same forms may share weights.
    """

    run: Callable[..., Sequence[torch.Tensor]]
    arguments: list[str]
    weights: list[torch.Tensor]
    forms: list[str]


@dataclass
class Step:
    """All of a decode step for one row, or for several, and what calls it."""

    graphs: DecodeGraphs
    head: Part
    layers: list[Part]
    tail: Part
    calls: Calls


class _Given(NamedTuple):
    """What every layer of a step is given: states, lengths, and all that the head puts out."""

    hidden: torch.Tensor
    lengths: torch.Tensor
    outputs: Sequence[torch.Tensor]

    def row(self, row: int, by_row: Sequence[bool]) -> _Given:
        """Return views of one row of it."""
        at = slice(row, row + 1)
        views = [t[at] if split else t for t, split in zip(self.outputs, by_row, strict=True)]
        return _Given(self.hidden[at], self.lengths[at], views)


class FastBatch:
    """Rows that are being decoded together; each has its own layers and its own length.

    Args:
        step_for: gives the step for so many rows; the first time compiles it.
        stored: what each layer holds of the prompts; None where no row keeps it.
        attention_mask: [rows, tokens] of the prompts, padded on the left.
        room: tokens that may be added.

    Attributes:
        count: rows.
        lengths: [rows] tokens so far.
        room: tokens that a row may have: as many as the longest of them needs.
    """

    def __init__(
        self,
        step_for: Callable[[int], Step],
        stored: Sequence[Stored | None],
        attention_mask: torch.Tensor,
        room: int,
    ) -> None:
        self.step_for = step_for
        self.count = len(attention_mask)
        self.lengths = attention_mask.sum(1)
        self.longest = int(self.lengths.max())
        self._needs = [in_blocks(n + room) for n in self.lengths.tolist()]
        self.room = max(self._needs)
        self._span = torch.arange(self.room, device=attention_mask.device)
        self._slabs = [None if s is None else self._allocate(s, attention_mask) for s in stored]
        self._order = self._plan(self._slabs, self.count)

    def _allocate(self, stored: Stored, attention_mask: torch.Tensor) -> Stored:
        """Copy what a layer stored, without padding, into memory with room for more."""
        lengths = self.lengths.tolist()
        slabs = []
        for old in (stored.keys, stored.values):
            new = old.new_zeros(len(stored.rows), old.shape[1], self.room, old.shape[3])
            for place, row in enumerate(stored.rows):
                # Sliding layers hold the last tokens only.
                real = old[place][:, attention_mask[row, -old.shape[2] :].bool()]
                end = lengths[row]
                new[place, :, end - real.shape[1] : end] = real
            slabs.append(new)
        return Stored(slabs[0], slabs[1], stored.rows)

    def _plan(
        self, slabs: Sequence[Stored | None], count: int
    ) -> list[tuple[int, Stored, torch.Tensor | None]]:
        """Return (layer, slab, its rows as a tensor) of each layer that some row keeps, in order.

        A layer of one row has no tensor. What steps there will be are compiled now.
        """
        order = []
        for layer, slab in enumerate(slabs):
            if slab is not None:
                rows = tuple(slab.rows)
                index = _places(rows, self._span.device) if len(rows) > 1 else None
                order.append((layer, slab, index))
        for size in {count, *(len(slab.rows) for _, slab, _ in order)} - {0}:
            self.step_for(size)
        return order

    def select(self, rows: Sequence[int]) -> None:
        """Keep only some rows, given in ascending order; what others stored is let go."""
        if len(rows) == self.count:
            return
        place = {row: i for i, row in enumerate(rows)}
        needs = [self._needs[row] for row in rows]
        room = max(needs, default=0)
        for layer, slab in enumerate(self._slabs):
            if slab is not None:
                kept = [i for i, row in enumerate(slab.rows) if row in place]
                names = [place[slab.rows[i]] for i in kept]
                keys, values = slab.keys[:, :, :room], slab.values[:, :, :room]
                slab = Stored(keys[kept], values[kept], names) if kept else None
            self._slabs[layer] = slab
        self._needs, self.room = needs, room
        self.count = len(rows)
        self.lengths = self.lengths[list(rows)]
        self.longest = int(self.lengths.max()) if rows else 0
        self._order = self._plan(self._slabs, self.count)

    def pick(self, rows: Sequence[int]) -> FastBatch:
        """Return a batch of just some rows, given in ascending order; this one stays as it is."""
        other = copy.copy(self)
        other._slabs = list(self._slabs)
        other.select(rows)
        return other

    def join(self, others: Sequence[FastBatch]) -> None:
        """Take the rows of other batches in, after those that are here."""
        if not others:
            return
        batches = [self, *others]
        room = max(batch.room for batch in batches)
        # Memory may run out on the way: the rows that are here stay whole until all is there.
        slabs: list[Stored | None] = []
        for stored in zip(*(batch._slabs for batch in batches), strict=True):
            rows, found, before = [], [], 0
            for batch, slab in zip(batches, stored, strict=True):
                if slab is not None:
                    rows += [before + row for row in slab.rows]
                    found.append(slab)
                before += batch.count
            keys = [_with_room(slab.keys, room) for slab in found]
            values = [_with_room(slab.values, room) for slab in found]
            slabs.append(Stored(torch.cat(keys), torch.cat(values), rows) if found else None)
        lengths = torch.cat([batch.lengths for batch in batches])
        self._order = self._plan(slabs, len(lengths))
        self._slabs = slabs
        self._span = max((batch._span for batch in batches), key=len)
        self._needs = [need for batch in batches for need in batch._needs]
        self.lengths, self.count, self.room = lengths, len(lengths), room
        self.longest = max(batch.longest for batch in batches)

    @property
    def layer_calls(self) -> int:
        """Layers that run in a step; one that several rows run counts once."""
        return len(self._order)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(
            t.untyped_storage().nbytes() for s in self._slabs if s for t in (s.keys, s.values)
        )

    @torch.no_grad()
    def step(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append one token [rows] to every row; returns the logits [rows, vocab] of the next.

        Raises:
            ConfigError: there is no more room.
        """
        if self.longest >= self.room:
            raise ConfigError(f"The batch is full with {self.room} tokens; raise max_new_tokens.")
        step = self.step_for(self.count)
        # Graphs are traced without autocast, and the kernels that they call obey it.
        with step.calls.one_step, torch.autocast(token_ids.device.type, enabled=False):
            logits = self._run(step, token_ids)
        self.lengths = self.lengths + 1
        self.longest += 1
        return logits

    def _run(self, step: Step, token_ids: torch.Tensor) -> torch.Tensor:
        calls, head, tail = step.calls, step.head, step.tail
        span = calls.span(self._span[: self.room], self.longest + 1)
        lengths = calls.put("lengths", self.lengths)
        arguments = {
            "token_ids": calls.put("ids", token_ids.view(-1, 1)),
            "positions": lengths.view(-1, 1),
        }
        outputs = calls(head.run, head.weights, [arguments[name] for name in head.arguments])
        # Layers write into it, and it may be among what they are given.
        hidden = calls.put("hidden", outputs[0])
        every = _Given(hidden, lengths, outputs)
        lone: dict[int, _Given] = {}
        for layer, slab, rows in self._order:
            part = self.step_for(len(slab.rows)).layers[layer]
            if rows is not None:
                given, index = every, [rows]
            else:  # the step of one row gathers nothing
                row = slab.rows[0]
                if row not in lone:
                    lone[row] = every.row(row, step.graphs.by_row)
                given, index = lone[row], []
            extra = [given.outputs[i] for i in step.graphs.layers[layer].extra]
            inputs = (given.hidden, *index, slab.keys, slab.values, given.lengths, span, *extra)
            calls(part.run, part.weights, inputs)
        (logits,) = calls(tail.run, tail.weights, [hidden])
        return calls.result(logits)


def in_blocks(tokens: int) -> int:
    """Return for how many tokens there is memory where so many are asked for."""
    return -(-tokens // BLOCK) * BLOCK


@lru_cache(1024)
def _places(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return rows as a tensor, the same one for all steps, so that these can be replayed."""
    return torch.tensor(rows, device=device)


def _with_room(stored: torch.Tensor, room: int) -> torch.Tensor:
    """Return keys or values [rows, heads, tokens, size] with room for more tokens."""
    return nn.functional.pad(stored, (0, 0, 0, room - stored.shape[2]))
