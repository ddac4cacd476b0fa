# SPDX-License-Identifier: Apache-2.0
"""One decode step of a model as graphs: what comes before its layers, each layer, what comes after.

The model's own code is traced with `torch.export`, once with stand-ins for its layers and once for
every kind of layer. Attention is ours: a query of one token per row against the keys and values
that the layer has stored for that row, which lie packed from its first token on, without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from firstlm.errors import UnsupportedModelError, kind_and_line
from firstlm.graphs import Traced, part, trace
from firstlm.layers import CACHE_ARGUMENTS, LayerStack
from firstlm.slabs import SLAB, Slab, our_attention

CACHE_NAMES = (*CACHE_ARGUMENTS, "layer_past", "past_key_value")  # of a layer's argument
# Sizes to trace with; all may be others later.
BATCH, ROWS, ROOM, SPAN = 7, 5, 33, 17


class KvShape(NamedTuple):
    """What a layer stores for a token: heads, and the sizes of a key and a value."""

    heads: int
    keys: int
    values: int
    window: int | None  # tokens that the layer attends to; None: all
    dtype: torch.dtype


@dataclass
class LayerStep:
    """How one layer is called in a decode step.

    Attributes:
        kind: index into `DecodeGraphs.kinds`.
        extra: which outputs of the head its last arguments are.
        dtype: number format of its keys and values.
    """

    kind: int
    extra: list[int]
    dtype: torch.dtype


@dataclass
class DecodeGraphs:
    """The graphs of one decode step.

    Attributes:
        head: (token ids [rows, 1], positions [rows, 1]) -> (hidden, extras...).
        kinds: (hidden [batch, 1, hidden], rows [rows], keys, values [rows, heads, room, size],
            positions [batch], span [tokens], extras...) -> (); writes into those rows of hidden,
            and into keys and values. The step of one row has batch 1 and no `rows`.
        layers: per layer, its kind and its extras.
        tail: (hidden,) -> (logits [rows, vocab],).
        by_row: per output of the head, whether its first dimension is the rows, of which there may
            be any number; False throughout in the step of one row.
    """

    head: Traced
    kinds: list[Traced]
    layers: list[LayerStep]
    tail: Traced
    by_row: list[bool]


@torch.library.custom_op("firstlm::layer", mutates_args=())
def _layer(hidden: torch.Tensor, extra: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    """Stand for layer `index` while the rest of a model is traced; never run."""
    raise NotImplementedError


@_layer.register_fake
def _(hidden: torch.Tensor, extra: Sequence[torch.Tensor], index: int) -> torch.Tensor:
    return torch.empty_like(hidden)


def capture(base: Any, stack: LayerStack, rows: int) -> DecodeGraphs:
    """Trace one decode step.

    Args:
        base: a transformers model, out of peft's wrapper; LoRA must be off.
        stack: its layers.
        rows: 1, or any number above for graphs that take any number of 2 or more.

    Raises:
        UnsupportedModelError: the model's layers are not a plain chain, or its attention is not one
            of transformers' exchangeable functions.
    """
    try:
        with torch.no_grad():
            return _capture(base, stack, 1 if rows == 1 else ROWS)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever torch.export meets in a model's code
        raise UnsupportedModelError(f"It could not be traced: {kind_and_line(error)}") from error


def _capture(base: Any, stack: LayerStack, rows: int) -> DecodeGraphs:
    shapes = _kv_shapes(base, stack)
    with our_attention(base):
        return _trace(base, stack, rows, shapes)


def _trace(base: Any, stack: LayerStack, rows: int, shapes: list[KvShape]) -> DecodeGraphs:
    frame, calls = _trace_frame(base, stack, rows)
    nodes = [n for n in frame.graph.graph.nodes if n.target is torch.ops.firstlm.layer.default]
    if len(nodes) != len(stack):
        raise UnsupportedModelError(f"It calls its {len(stack)} layers {len(nodes)} times.")
    steps, kinds, extras = [], [], []
    known: dict[Any, int] = {}
    for index, (node, call) in enumerate(zip(nodes, calls, strict=True)):
        if index and node.args[0] is not nodes[index - 1]:
            raise UnsupportedModelError("Something happens between its layers.")
        layer = stack.modules[index]
        inputs = [n.meta["val"].shape for n in node.args[1]]
        key = repr((_anatomy(layer), call.constants, inputs, shapes[index]))
        kind = known.setdefault(key, len(kinds))
        if kind == len(kinds):
            kinds.append(_trace_layer(layer, call, node, stack, rows, shapes[index]))
        used = kinds[kind][1]
        picked = [node.args[1][i] for i in used]
        extras += [n for n in picked if n not in extras]
        steps.append(LayerStep(kind, [1 + extras.index(n) for n in picked], shapes[index].dtype))
    (output,) = [n for n in frame.graph.graph.nodes if n.op == "output"]
    tail = part(frame, list(output.args[0]), [nodes[-1]])
    head = part(frame, [nodes[0].args[0], *extras], [])
    for piece in (head, tail):
        if any(n.target is torch.ops.firstlm.layer.default for n in piece.graph.graph.nodes):
            raise UnsupportedModelError("Something happens between its layers.")
    if len(tail.arguments) > 1:
        raise UnsupportedModelError("Its output depends on more than its last layer.")
    by_row = [_is_rows(n) for n in (nodes[0].args[0], *extras)]
    return DecodeGraphs(head, [k[0] for k in kinds], steps, tail, by_row)


def _is_rows(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"].shape[0], int)


@dataclass
class _Call:
    """What a layer was called with, tensors by number."""

    leaves: list[Any]
    spec: pytree.TreeSpec

    @property
    def constants(self) -> list[Any]:
        return [leaf for leaf in self.leaves if not isinstance(leaf, _Hole)]

    def fill(self, hidden: torch.Tensor, extra: Sequence[torch.Tensor]) -> Any:
        """Return (args, kwargs) with tensors in their places."""
        values = [hidden, *extra]
        leaves = [values[x.number] if isinstance(x, _Hole) else x for x in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


@dataclass(frozen=True)
class _Hole:
    number: int  # 0: hidden states, 1 and up: extras


class _Frame(nn.Module):
    """The whole model for one token per row."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, token_ids: Any, positions: Any) -> Any:
        # Of four dimensions, so that transformers leaves it alone; no layer looks at it.
        attention_mask = torch.zeros_like(positions, dtype=torch.float32)[:, :, None, None]
        output = self.base(
            input_ids=token_ids,
            position_ids=positions,
            attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
        )
        return (output.logits[:, -1],)


def _trace_frame(base: Any, stack: LayerStack, rows: int) -> tuple[Traced, list[_Call]]:
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModelError("It takes no position_ids.")
    calls: list[_Call] = []

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        extra: list[torch.Tensor] = []
        for i, leaf in enumerate(leaves):
            if leaf is hidden:
                leaves[i] = _Hole(0)
            elif isinstance(leaf, torch.Tensor):
                extra.append(leaf)
                leaves[i] = _Hole(len(extra))
        calls.append(_Call(leaves, spec))
        out = torch.ops.firstlm.layer(hidden, extra, index)
        size = stack.tuple_sizes[index]
        return (out, *[None] * (size - 1)) if size else out

    device = base.get_input_embeddings().weight.device
    ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
    dims = None if rows == 1 else {0: torch.export.Dim("rows", min=2, max=2**20)}
    with _replaced(stack.modules, stand_in):
        traced = trace(_Frame(base), (ids, ids.clone()), (dims, dims))
    return traced, calls


class _LayerFrame(nn.Module):
    """One layer for one token of each row that keeps it, on keys and values of its own."""

    def __init__(
        self, layer: nn.Module, call: _Call, window: int | None, by_row: Sequence[bool]
    ) -> None:
        super().__init__()
        self.layer, self.call, self.window, self.by_row = layer, call, window, by_row
        self.signature = inspect.signature(type(layer).forward)
        found = [name for name in CACHE_NAMES if name in self.signature.parameters]
        if not found:
            raise UnsupportedModelError("Its layers take no cache.")
        self.argument = found[0]

    def forward(
        self, hidden: Any, rows: Any, keys: Any, values: Any, positions: Any, span: Any, *extra: Any
    ) -> Any:
        # Gathered and put back here, a layer's first and last kernels do it on the way.
        some, given = hidden, list(extra)
        if rows is not None:
            some, positions = hidden[rows], positions[rows]
            given = [t[rows] if split else t for t, split in zip(extra, self.by_row, strict=True)]
        slab = Slab(keys, values, positions, span, self.window)
        args, kwargs = self.call.fill(some, given)
        bound = self.signature.bind(self.layer, *args, **kwargs)
        bound.arguments[self.argument] = slab
        token = SLAB.set(slab)
        try:
            output = type(self.layer).forward(*bound.args, **bound.kwargs)
        finally:
            SLAB.reset(token)
        if (slab.updates, slab.reads) != (1, 1):
            raise UnsupportedModelError("A layer attends in a way of its own.")
        output = output[0] if isinstance(output, tuple) else output
        if rows is None:
            hidden.copy_(output)
        else:
            hidden.index_copy_(0, rows, output)
        return ()


def _trace_layer(
    layer: nn.Module,
    call: _Call,
    node: fx.Node,
    stack: LayerStack,
    rows: int,
    shape: KvShape,
) -> tuple[Traced, list[int]]:
    """Trace one layer; returns the graph, and which of its extra arguments it uses."""
    nodes: Any = node.args[1]
    by_row = [_is_rows(n) for n in nodes]
    frame = _LayerFrame(layer, call, shape.window, by_row)
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise UnsupportedModelError("Its layers have hooks, which would not be called.")
    like: Any = node.args[0]
    like = like.meta["val"]
    alone = rows == 1
    batch = 1 if alone else BATCH
    hidden = torch.zeros(batch, 1, stack.hidden_size, dtype=like.dtype, device=like.device)
    keys = hidden.new_zeros(rows, shape.heads, ROOM, shape.keys, dtype=shape.dtype)
    values = hidden.new_zeros(rows, shape.heads, ROOM, shape.values, dtype=shape.dtype)
    positions = torch.full((batch,), SPAN - 1, device=like.device)
    span = torch.arange(SPAN, device=like.device)
    picked = None if alone else torch.arange(rows, device=like.device)
    extra = [_example(n.meta["val"], batch) for n in nodes]
    first: Any = None if alone else {0: torch.export.Dim.AUTO}
    slab = {**(first or {}), 2: torch.export.Dim.AUTO}
    more = tuple(first if split else None for split in by_row)
    dims = (first, first, slab, slab, first, {0: torch.export.Dim.AUTO}, more)
    traced = trace(frame, (hidden, picked, keys, values, positions, span, *extra), dims)
    names = [a for a in traced.arguments if a.startswith("extra_")]
    used = [int(name.removeprefix("extra_")) for name in names]
    return traced, used


def _kv_shapes(base: Any, stack: LayerStack) -> list[KvShape]:
    """Return, per layer, what it stores for a token."""
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    ids = torch.zeros(1, 1, dtype=torch.long, device=base.get_input_embeddings().weight.device)
    base(input_ids=ids, use_cache=True, **{stack.cache_argument: cache})
    found = []
    for slot in cache.layers:
        keys, values = getattr(slot, "keys", None), getattr(slot, "values", None)
        if keys is None or values is None or keys.dim() != 4 or keys.shape[:2] != values.shape[:2]:
            raise UnsupportedModelError("A layer stores something else than keys and values.")
        sliding = getattr(slot, "is_sliding", False)
        window = getattr(slot, "sliding_window", None) if sliding else None
        sizes = keys.shape[1], keys.shape[3], values.shape[3]
        found.append(KvShape(*sizes, window, keys.dtype))
    if len(found) != len(stack):
        raise UnsupportedModelError("Some of its layers store no keys and values.")
    return found


def _example(fake: torch.Tensor, rows: int) -> torch.Tensor:
    shape = [int(n) if isinstance(n, int) else rows for n in fake.shape]
    return torch.zeros(shape, dtype=fake.dtype, device=fake.device)


def _anatomy(layer: nn.Module) -> list[Any]:
    """Return what must be equal for two layers to share a graph: shapes, and plain attributes."""
    found: list[Any] = [
        (n, p.shape, p.stride(), p.dtype, p.device) for n, p in layer.named_parameters()
    ]
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | bool | None)
            and not key.startswith("_")
            and not key.endswith(("layer_idx", "layer_id"))
        }
        found.append((name, type(module).__name__, sorted(plain.items())))
    return found


@contextmanager
def _replaced(modules: Sequence[nn.Module], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Let `stand_in(index, ...)` answer for each module's forward."""
    before = [module.__dict__.get("forward") for module in modules]
    for index, module in enumerate(modules):
        module.forward = partial(stand_in, index)
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
