# SPDX-License-Identifier: Apache-2.0
"""Traced graphs: made from a module, and cut apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn


@dataclass
class Traced:
    """A graph that takes weights of a module, then arguments.

    Attributes:
        graph: of aten operations, with a tuple as its output.
        weights: placeholder -> name of the parameter or buffer in the model, or in a layer.
        fixed: placeholder -> a constant.
        arguments: placeholders of the arguments that are used, in order.
    """

    graph: fx.GraphModule
    weights: dict[str, str]
    fixed: dict[str, torch.Tensor]
    arguments: list[str]


def trace(module: nn.Module, arguments: tuple[Any, ...], dims: Any) -> Traced:
    """Export a module and leave out what has no effect.

    Args:
        module: has the model or a layer as its only child, and takes `arguments` by position.
        arguments: example tensors.
        dims: per argument, which of its dimensions may differ.
    """
    exported = torch.export.export(module, arguments, dynamic_shapes=dims, strict=False)
    graph = exported.graph_module.graph
    for node in reversed(graph.nodes):
        idle = node.op == "call_function" and not node.users and not _writes(node)
        if idle or node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    kept = {n.name for n in graph.nodes if n.op == "placeholder" and n.users}
    constants: Any = exported.constants
    weights: dict[str, str] = {}
    fixed: dict[str, torch.Tensor] = {}
    arguments_: list[str] = []
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if name not in kept:
            continue
        kind = spec.kind.name
        if kind in ("PARAMETER", "BUFFER"):
            weights[name] = str(spec.target).split(".", 1)[1]
        elif kind == "CONSTANT_TENSOR":
            fixed[name] = constants[spec.target]
        else:
            arguments_.append(name)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in kept:
            graph.erase_node(node)
    exported.graph_module.recompile()
    return Traced(exported.graph_module, weights, fixed, arguments_)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or schema.is_mutable


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as it is; inductor's CPU code writes it to memory, in the order of its sizes.

    Left to itself, inductor computes what a sum of products reads anew for each of the sums.
    """
    if tensor.device.type != "cpu":
        return tensor
    from torch._inductor.inductor_prims import force_stride_order

    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * size)
    return force_stride_order(tensor, strides)


def part(whole: Traced, outputs: list[fx.Node], given: list[fx.Node]) -> Traced:
    """Cut out what computes `outputs` from `given` and the whole's own arguments."""
    needed: set[fx.Node] = set()
    todo = [n for n in outputs if n not in given]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += [n for n in node.all_input_nodes if n not in given]
    graph, made = fx.Graph(), {}
    nodes = [n for n in whole.graph.graph.nodes if n in needed]
    lifted = {*whole.weights, *whole.fixed}
    for node in nodes:
        if node.name in lifted:
            made[node] = graph.node_copy(node)
    names = [f"given_{i}" for i in range(len(given))]
    for node, name in zip(given, names, strict=True):
        made[node] = graph.placeholder(name)
        made[node].meta = dict(node.meta)
    for node in nodes:
        if node not in made:
            made[node] = graph.node_copy(node, lambda n: made[n])
    graph.output(tuple(made[n] for n in outputs))
    holes = {n.name for n in graph.nodes if n.op == "placeholder"}
    return Traced(
        fx.GraphModule(whole.graph, graph),
        {k: v for k, v in whole.weights.items() if k in holes},
        {k: v for k, v in whole.fixed.items() if k in holes},
        names + [a for a in whole.arguments if a in holes],
    )
