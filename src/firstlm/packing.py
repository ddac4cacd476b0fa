# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a traced graph in the form that runs fastest: joined, and with packed weights.

Linear layers that read the same input become one. For one row the CPU's matrix product is slower
than a sum of products that the compiler makes itself; several rows, and int4, take PyTorch's own
kernels, bfloat16 with weights in oneDNN's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from firstlm.errors import UnsupportedModelError
from firstlm.graphs import Traced, stored
from firstlm.onednn import ordered, ordered_linear, takes

aten = torch.ops.aten
INT4_GROUP = 32  # weights that share a scale and a zero point
INT4_ROWS = 16  # the CPU's kernel wants a multiple of so many outputs, CUDA's of 8
INT4_TILES = (8, 4, 2)  # of 16 inputs that CUDA's kernel reads at once, the best first


@dataclass
class Joined:
    """Linear layers that became one.

    Attributes:
        placeholders: inputs of the graph that take the packed weights.
        names: the weights, joined along their outputs.
        form: what `pack` makes of them.
    """

    placeholders: list[str]
    names: list[str]
    form: str


@dataclass
class Packed:
    """A graph whose linear layers are packed; `inputs_from` makes what its first inputs take."""

    traced: Traced
    joined: list[Joined]

    @property
    def forms(self) -> list[str]:
        """What each joined weight is packed to; graphs with the same forms may share weights."""
        return [joint.form for joint in self.joined]

    def inputs_from(self, root: nn.Module) -> list[torch.Tensor]:
        """Return the graph's inputs before its arguments, from a model's or layer's weights."""
        found = dict(self.traced.fixed)
        for joint in self.joined:
            packed = pack(joined_weight(root, joint.names), joint.form)
            found |= zip(joint.placeholders, packed, strict=True)
        found |= {key: effective_weight(root, name) for key, name in self.traced.weights.items()}
        names = [n.name for n in self.traced.graph.graph.nodes if n.op == "placeholder"]
        return [found[name] for name in names if name in found]


def effective_weight(root: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer with the LoRA that is active on it added."""
    owner, inside, leaf = name.rpartition(".base_layer.")
    path, _, last = name.rpartition(".")
    value = getattr(root.get_submodule(path), last).detach()
    if not inside or leaf != "weight":
        return value
    lora: Any = root.get_submodule(owner)
    if lora.disable_adapters or lora.merged:
        return value
    if lora.lora_variant or any(layer.bias is not None for layer in lora.lora_B.values()):
        raise UnsupportedModelError(f"{owner} has LoRA of a kind that is not merged (DoRA, bias).")
    total = value.float()
    for adapter in lora.active_adapters:
        total = total + lora.get_delta_weight(adapter).detach().float()
    return total.to(value.dtype)


def joined_weight(root: nn.Module, names: Sequence[str]) -> torch.Tensor:
    """Return weights [outputs, inputs] joined along their outputs, contiguous.

    One that is alone, and lies so, is not copied.
    """
    found = [effective_weight(root, name) for name in names]
    return found[0].contiguous() if len(found) == 1 else torch.cat(found)


def pack(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, ...]:
    """Bring a weight [outputs, inputs] into a form: a number format, or "ordered" for oneDNN.

    "int8" has a scale per output; "int4" a scale and a zero point for every 32 inputs, in the order
    that the kernel of the weight's device reads.
    """
    if form == "same":
        return (weight,)
    if form == "ordered":
        return (ordered(weight),)
    if form == "int8":
        scale = (weight.float().abs().amax(1).clamp_min(1e-8) / 127).to(weight.dtype)
        whole = (weight.float() / scale[:, None].float()).round().clamp(-127, 127)
        return whole.to(torch.int8), scale
    outputs, inputs = weight.shape
    weight = nn.functional.pad(weight, (0, 0, 0, -outputs % INT4_ROWS))
    parts = weight.float().view(len(weight), inputs // INT4_GROUP, INT4_GROUP)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8).to(weight.dtype).float()
    whole = ((parts - low) / scale).round().clamp(0, 15).to(torch.int32).view(weight.shape)
    middle = low + 8 * scale  # what the kernel takes for zero
    pairs = torch.cat([scale, middle], -1).transpose(0, 1).contiguous().to(weight.dtype)
    if weight.device.type == "cpu":
        return aten._convert_weight_to_int4pack_for_cpu(whole, 1), pairs
    bytes_ = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
    tiles = next(n for n in INT4_TILES if inputs % (16 * n) == 0)
    return aten._convert_weight_to_int4pack(bytes_, tiles), pairs


def pack_linears(traced: Traced, weights: str = "same") -> Packed:
    """Join and pack the linear layers of a traced graph, in place.

    Args:
        traced: from `capture`.
        weights: one of `config.WEIGHT_FORMATS`.
    """
    graph = traced.graph.graph
    groups: dict[Any, list[Any]] = {}
    for node in linears(graph):
        if node.args[1].name in traced.weights:
            groups.setdefault(node.args[0], []).append(node)
    first = next(iter(graph.nodes))
    joined = []
    for x, nodes in groups.items():
        if not all(isinstance(n, int) for n in x.meta["val"].shape[1:]):
            continue  # over all tokens so far: keys and values that are stored compressed
        names = [traced.weights[node.args[1].name] for node in nodes]
        inputs = x.meta["val"].shape[-1]
        if weights == "int4" and inputs % INT4_GROUP:
            raise UnsupportedModelError(
                f"{names[0]} has {inputs} inputs; int4 takes multiples of {INT4_GROUP}."
            )
        if weights != "same" and x.meta["val"].dtype == torch.float64:
            raise UnsupportedModelError(f"{names[0]} is in float64, which is not packed.")
        if weights == "int4" and not _takes_int4(x.meta["val"]):
            raise UnsupportedModelError(f"{names[0]} is not in bfloat16, as int4 on a GPU wants.")
        one_row = all(isinstance(n, int) and n == 1 for n in x.meta["val"].shape[:-1])
        shapes = [node.args[1].meta["val"] for node in nodes]
        form = "ordered" if weights == "same" and not one_row and takes(shapes[0]) else weights
        holes = []
        with x.meta["val"].fake_mode:  # shapes alone, and what is ordered passes for plain
            tensors = pack(torch.cat(shapes), weights)
        with graph.inserting_before(first):
            for tensor in tensors:
                hole = graph.placeholder(f"packed_{len(joined)}_{len(holes)}")
                hole.meta["val"] = tensor
                holes.append(hole)
        joined.append(Joined([hole.name for hole in holes], names, form))
        _join(graph, x, nodes, holes, form, one_row)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in traced.weights and not node.users:
            graph.erase_node(node)
            del traced.weights[node.name]
    graph.lint()
    traced.graph.recompile()
    return Packed(traced, joined)


def _takes_int4(value: torch.Tensor) -> bool:
    return value.device.type == "cpu" or value.dtype == torch.bfloat16


def linears(graph: fx.Graph) -> list[Any]:
    """Return the nodes of linear layers."""
    return [node for node in graph.nodes if node.target is aten.linear.default]


def _join(
    graph: fx.Graph,
    x: fx.Node,
    nodes: list[Any],
    holes: list[fx.Node],
    form: str,
    one_row: bool,
) -> None:
    """Put one product of `x` in the place of several."""
    sizes = [node.meta["val"].shape[-1] for node in nodes]
    total = sum(sizes) + (-sum(sizes) % INT4_ROWS if form == "int4" else 0)
    with graph.inserting_before(nodes[0]):
        call: Callable[..., fx.Node] = graph.call_function
        shape = x.meta["val"].shape
        rows = [n if isinstance(n, int) else -1 for n in shape[:-1]]
        flat = call(aten.reshape.default, (x, [-1, shape[-1]]))
        y = _product_node(call, flat, holes, form, one_row, like=x)
        y = call(aten.view.default, (y, [*rows, total]))
    start = 0
    for node, size in zip(nodes, sizes, strict=True):
        with graph.inserting_before(node):
            part = y
            if size != total:
                part = graph.call_function(aten.slice.Tensor, (y, -1, start, start + size))
            if len(node.args) > 2 and node.args[2] is not None:
                part = graph.call_function(aten.add.Tensor, (part, node.args[2]))
        start += size
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _product_node(
    call: Callable[..., fx.Node],
    x: fx.Node,
    holes: list[fx.Node],
    form: str,
    one_row: bool,
    like: fx.Node,
) -> fx.Node:
    """Return the node of x [rows, inputs] times packed weights, [rows, outputs]."""
    value = like.meta["val"]
    if form == "int4":
        on_cpu = value.device.type == "cpu"
        kernel = aten._weight_int4pack_mm_for_cpu if on_cpu else aten._weight_int4pack_mm
        return call(kernel.default, (x, holes[0], INT4_GROUP, holes[1]))
    if form == "ordered":
        return call(ordered_linear._opoverload, (x, *holes))
    wide = form == "same" and value.dtype in (torch.float32, torch.float64)
    if not one_row or wide or value.device.type != "cpu":
        kernel = aten._weight_int8pack_mm if form == "int8" else aten.linear
        return call(kernel.default, (x, *holes))
    inputs, weight = [call(aten.to.dtype, (node, torch.float32)) for node in (x, holes[0])]
    product = call(aten.mul.Tensor, (call(stored, (inputs,)), weight))
    total = call(aten.sum.dim_IntList, (product, [-1]))
    if form == "int8":
        total = call(aten.mul.Tensor, (total, holes[1]))
    return call(aten.unsqueeze.default, (call(aten.to.dtype, (total, value.dtype)), 0))
