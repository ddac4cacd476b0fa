# SPDX-License-Identifier: Apache-2.0
"""How a decode step calls its compiled graphs: as they are, or on CUDA recorded and replayed.

On a GPU a layer of one token takes less time than Python needs to launch its kernels. A CUDA graph
is a recording of launches with the addresses that they read and write, so a call whose inputs lie
where those of an earlier call lay is replayed, whatever they hold now. Each layer is a graph of its
own, and a step replays those of the layers that run: a new mask records nothing.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock

import torch

from firstlm.errors import FirstWarning, first_line

Run = Callable[..., Sequence[torch.Tensor]]
Record = Callable[[Callable[[], None]], Callable[[], None]]

SPAN = 256  # tokens; attention reads multiples of it, as each length is a recording of its own
FAILURES = 3  # to record a call, after which no other is tried
LIMIT = 4096  # calls that are known; the one that was not seen for the longest time goes first


class Calls:
    """Calls graphs as they are."""

    one_step: AbstractContextManager[object] = nullcontext()  # held for a step

    def __call__(
        self, run: Run, weights: list[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Call a compiled graph; what it returns holds until it is called so again."""
        return run(*weights, *inputs)

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy for a step to read and write."""
        return tensor.clone()

    def span(self, places: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the places of keys that attention looks at: `tokens` of them, or more.

        Args:
            places: 0, 1, ... up to those there are.
            tokens: the most that a row has.
        """
        return places[:tokens]

    def result(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that stays as it is when the next step begins."""
        return tensor


@dataclass
class _Call:
    """What is known of a call: what it is of, where its outputs lie, and what replays it."""

    run: Run
    weights: list[torch.Tensor]
    outputs: list[torch.Tensor]
    replay: Callable[[], None] | None = None  # once recorded


class Replays(Calls):
    """Records a call when it comes for the second time, and replays it from then on.

    The first time loads and tunes kernels, which cannot be recorded. What a step writes lies in
    places of its own, where the calls after it find it again; memory of recordings is shared. So
    all steps of an engine must run on one stream.

    Args:
        record: takes a function, and returns one that does again what it did, on the same places.
    """

    def __init__(self, record: Record) -> None:
        self.one_step = Lock()  # the places are those of one step at a time
        self._record = record
        self._failures = 0
        self._known: OrderedDict[object, _Call] = OrderedDict()
        self._places: dict[object, torch.Tensor] = {}

    def __call__(
        self, run: Run, weights: list[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Call a compiled graph, or replay an earlier call with inputs at the same places."""
        where = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in inputs)
        key = id(run), id(weights), where
        call = self._known.get(key)
        if call is None:
            found = run(*weights, *inputs)
            call = self._known[key] = _Call(run, weights, [_place(t).copy_(t) for t in found])
            if len(self._known) > LIMIT:
                self._known.popitem(last=False)
            return call.outputs
        self._known.move_to_end(key)
        outputs = call.outputs

        def again() -> None:
            for place, tensor in zip(outputs, run(*weights, *inputs), strict=True):
                place.copy_(tensor)

        if call.replay is None:
            call.replay = self._recorded(again)
        (call.replay or again)()
        return outputs

    def _recorded(self, run: Callable[[], None]) -> Callable[[], None] | None:
        """Record a call; None where that fails, which is told once, and tried a few times."""
        if self._failures == FAILURES:
            return None
        try:
            return self._record(run)
        except RuntimeError as error:
            self._failures += 1
            if self._failures == 1:
                warnings.warn(
                    f"Steps are launched kernel by kernel, not recorded: {first_line(error)}",
                    FirstWarning,
                    stacklevel=2,
                )
            return None

    def put(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy at a place that is the same for all steps of as many rows."""
        key = name, tensor.shape, tensor.dtype
        if key not in self._places:
            self._places[key] = _place(tensor)
        return self._places[key].copy_(tensor)

    def span(self, places: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return places as `Calls` does, rounded up so that a recording serves many steps."""
        size = min(-(-tokens // SPAN) * SPAN, len(places))
        if size not in self._places:
            self._places[size] = _place(places[:size]).copy_(places[:size])
        return self._places[size]

    def result(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy."""
        return tensor.clone()


def _place(like: torch.Tensor) -> torch.Tensor:
    """Return memory for a tensor that steps within inference mode may write, and others too."""
    with torch.inference_mode(False):
        return torch.empty_like(like)


def cuda_graphs(device: torch.device) -> Record:
    """Return what records calls on a GPU; all of its recordings share their memory."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def record(run: Callable[[], None]) -> Callable[[], None]:
        # Not `torch.cuda.graph`, which empties the allocator's cache each time: keys and values
        # would lie elsewhere afterwards, and nothing could be replayed.
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        now.wait_stream(stream)
        return graph.replay

    return record
