# SPDX-License-Identifier: Apache-2.0
"""Compiled decode steps: layers one by one, each kind of them once, whatever mask comes.

A compiled layer takes the weights of the layer it runs as inputs. `fast_batch.py` has the rows that
are decoded with these steps.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from firstlm.cache import SkipCache
from firstlm.capture import capture
from firstlm.config import WEIGHT_FORMATS
from firstlm.errors import (
    ConfigError,
    FirstWarning,
    UnsupportedModelError,
    first_line,
    kind_and_line,
)
from firstlm.fast_batch import FastBatch, Part, Step, Stored
from firstlm.graphs import Traced
from firstlm.layers import LayerStack
from firstlm.lora import is_on_shared_weights, lora_layers, lora_left_out
from firstlm.packing import linears, pack_linears
from firstlm.prefetch import prefetching
from firstlm.replays import Calls, Replays, cuda_graphs

LONGEST = "max_position_embeddings"  # its name in configs
KEPT = 2  # states of one model's weights whose engines stay: with LoRA and without
# How like the model's own logits those of a trial step must be (cosine).
ALIKE = {"int8": 0.97, "int4": 0.7, torch.float64: 0.99999, torch.float32: 0.99999}


class DecodeEngine:
    """Compiled decode steps of one model; LoRA is merged into copies of its weights.

    Args:
        base: a transformers model, out of peft's wrapper.
        stack: its layers; units must be whole blocks.
        weights: number format of linear layers: one of `config.WEIGHT_FORMATS`.
        compiled: False runs the graphs operation by operation, which is slow and needs no compiler.
        calls: how graphs are called; None records and replays them on CUDA.

    Raises:
        ConfigError: no such format.
    """

    def __init__(
        self,
        base: Any,
        stack: LayerStack,
        weights: str = "same",
        compiled: bool = True,
        calls: Calls | None = None,
    ) -> None:
        if weights not in WEIGHT_FORMATS:
            known = ", ".join(WEIGHT_FORMATS)
            raise ConfigError(f"weights is {weights!r}; expected one of {known}.")
        self.base, self.stack, self.weights, self.compiled = base, stack, weights, compiled
        if calls is None:
            device = base.get_input_embeddings().weight.device
            calls = Replays(cuda_graphs(device)) if device.type == "cuda" else Calls()
        self.calls = calls
        self._steps: dict[bool, Step] = {}
        self._made_of: Any = None

    def __deepcopy__(self, memo: Any) -> DecodeEngine:
        """Return the engine itself: what is copied are batches and caches."""
        return self

    def step(self, rows: int) -> Step:
        """Return the step for one row, or for several; the first call traces and compiles it.

        Raises:
            UnsupportedModelError: it cannot be, or does not compute what the model does.
        """
        alone = rows == 1
        if alone not in self._steps:
            stamp = _stamp(self.base)
            if self._steps and stamp != self._made_of:
                raise UnsupportedModelError("Its weights have changed since it began to decode.")
            self._made_of = stamp
            try:
                with torch.autocast(self.base.device.type, enabled=False):
                    self._steps[alone] = self._build(1 if alone else 2)
                    self._try(1 if alone else 2)
            except Exception as error:
                self._steps.pop(alone, None)
                if isinstance(error, UnsupportedModelError):
                    raise
                what = kind_and_line(error)
                raise UnsupportedModelError(what) from error
        return self._steps[alone]

    def layer_bytes(self) -> list[int]:
        """Return the bytes of each layer's weights."""
        layers = next(iter(self._steps.values())).layers
        return [sum(tensor.nbytes for tensor in part.weights) for part in layers]

    def rest_bytes(self) -> int:
        """Return the bytes of the weights after the last layer: those of the vocabulary."""
        return sum(t.nbytes for t in next(iter(self._steps.values())).tail.weights)

    def _build(self, rows: int) -> Step:
        if is_on_shared_weights(self.base):
            raise UnsupportedModelError("It has LoRA on one of two layers that share a weight.")
        with lora_left_out(self.base):
            graphs = capture(self.base, self.stack, rows)
        # Both steps share what they are given: packed weights.
        other = next(iter(self._steps.values()), None)
        if other and other.graphs.layers != graphs.layers:
            raise UnsupportedModelError("It treats one row in another way than several.")
        part = partial(self._part, hints=rows == 1)
        head = part(graphs.head, [self.base], [other.head] if other else None)
        tail = part(graphs.tail, [self.base], [other.tail] if other else None)
        layers: list[Any] = [None] * len(graphs.layers)
        for kind, traced in enumerate(graphs.kinds):
            members = [i for i, layer in enumerate(graphs.layers) if layer.kind == kind]
            modules = [self.stack.modules[i] for i in members]
            known = [other.layers[i] for i in members] if other else None
            if self.weights != "same":
                _check_share(traced)
            for i, made in zip(members, part(traced, modules, known), strict=True):
                layers[i] = made
        return Step(graphs, head[0], layers, tail[0], self.calls)

    def _part(
        self, traced: Traced, roots: list[nn.Module], known: list[Part] | None, hints: bool
    ) -> list[Part]:
        """Compile a graph once, for modules that differ by their weights alone."""
        packed = pack_linears(traced, self.weights)
        if known and known[0].forms == packed.forms:
            weights = [part.weights for part in known]
        else:
            weights = [packed.inputs_from(root) for root in roots]
        run = _compile(traced, weights[0], hints) if self.compiled else traced.graph.forward
        return [Part(run, traced.arguments, found, packed.forms) for found in weights]

    @torch.no_grad()
    def _try(self, rows: int) -> None:
        """Hold a step against the model's own forward."""
        device = self.base.get_input_embeddings().weight.device
        vocab = self.base.config.get_text_config(decoder=True).vocab_size
        ids = torch.arange(1, 10 * rows + 1, device=device).view(rows, 10) * 7919 % vocab
        cache: Any = DynamicCache(config=self.base.config.get_text_config(decoder=True))
        self.base(input_ids=ids[:, :-1], use_cache=True, **{self.stack.cache_argument: cache})
        # In another order for the layers, so that each has to find its rows.
        order = list(reversed(range(rows)))
        stored = [Stored(s.keys[order], s.values[order], order) for s in cache.layers]
        found = FastBatch(self.step, stored, torch.ones_like(ids[:, :-1]), 1).step(ids[:, -1])
        wanted = self.base(input_ids=ids, use_cache=False).logits[:, -1]
        found, wanted = (x.double() - x.double().mean(-1, keepdim=True) for x in (found, wanted))
        alike = torch.cosine_similarity(found, wanted).min().item()
        bound = ALIKE.get(self.weights) or ALIKE.get(self.base.dtype, 0.99)
        if not alike >= bound:
            raise UnsupportedModelError(
                f"Its fast step gives other logits (cosine {alike:.4f}; expected {bound} or more)."
            )
        if rows > 1:
            self._try_apart(self._steps[False])

    def _try_apart(self, step: Step) -> None:
        """Refuse models that turn all rows by the longest of them: rows that decode together have
        run their prompts apart."""
        longest = getattr(self.base.config.get_text_config(decoder=True), LONGEST, None)
        if longest is None:
            return

        def given(other: int) -> list[torch.Tensor]:
            """Return what the first of two rows is given beside a row at some position."""
            positions = torch.tensor([[1], [other]], device=self.base.device)
            arguments = {"token_ids": torch.zeros_like(positions), "positions": positions}
            head, by_row = step.head, step.graphs.by_row
            found = head.run(*head.weights, *[arguments[name] for name in head.arguments])
            return [t[0] if split else t for t, split in zip(found, by_row, strict=True)]

        if not all(map(torch.equal, given(1), given(longest - 1))):
            raise UnsupportedModelError("A long row changes what short ones beside it compute.")

    def start(self, cache: SkipCache, attention_mask: torch.Tensor, room: int) -> FastBatch:
        """Take over from prompts that have run, all decisions made.

        Args:
            cache: of the prompts; what it holds is copied.
            attention_mask: [rows, tokens] of the prompts, padded on the left.
            room: tokens that may be added.

        Raises:
            UnsupportedModelError: as `step`.
        """
        stored: list[Stored | None] = []
        steps = self.step(1).graphs.layers
        every = range(len(attention_mask))
        for layer, slot in enumerate(cache.layers):
            rows = cache.state.stored_rows(layer)
            picked = list(every) if rows is None else rows.tolist()
            if picked and getattr(slot, "keys", None) is None:
                raise UnsupportedModelError(f"Its layer {layer} stores no keys.")
            if not picked:
                stored.append(None)
                continue
            # Prompts that run under autocast leave other formats than compiled layers read.
            keys, values = (tensor.to(steps[layer].dtype) for tensor in (slot.keys, slot.values))
            stored.append(Stored(keys, values, picked))
        return FastBatch(self.step, stored, attention_mask, room)


class Engines:
    """The engines of one model; weights that have changed since make new ones. Copies have none.

    Args:
        stack: the model's layers.
        unit: what is switched; the engine knows whole blocks only.
    """

    def __init__(self, stack: LayerStack, unit: str) -> None:
        self.stack, self.unit = stack, unit
        self._made: dict[Any, dict[str, DecodeEngine | None]] = {}
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Engines:
        return Engines(copy.deepcopy(self.stack, memo), self.unit)

    def clear(self) -> None:
        """Let go of all engines, and of the weights that they hold."""
        self._made.clear()

    def get(self, base: Any, weights: str, rows: int) -> DecodeEngine | None:
        """Return an engine that is ready for a batch.

        Args:
            base: the model, out of peft's wrapper.
            weights: one of `config.WEIGHT_FORMATS`.
            rows: in the batch.

        Returns:
            The engine, or None, with one warning, where the model cannot be run by it.
        """
        with self._lock:
            return self._get(base, weights, rows)

    def _get(self, base: Any, weights: str, rows: int) -> DecodeEngine | None:
        stamp = _stamp(base)
        self._made[stamp] = self._made.pop(stamp, {})  # the last one used stays the longest
        for old in list(self._made)[:-KEPT]:
            del self._made[old]
        if weights not in self._made[stamp]:
            self._made[stamp][weights] = DecodeEngine(base, self.stack, weights)
        engine = self._made[stamp][weights]
        if engine is None:
            return None
        try:
            if self.unit != "block":
                raise UnsupportedModelError(f"It switches {self.unit} units.")
            for size in {1, rows}:
                engine.step(size)
        except UnsupportedModelError as error:
            self._made[stamp][weights] = None
            warnings.warn(
                f"{type(base).__name__} decodes with engine='hf' instead of 'fast': {error}",
                FirstWarning,
                stacklevel=3,
            )
        return self._made[stamp][weights]


def _stamp(base: nn.Module) -> Any:
    """Return what differs when weights were changed, or LoRA turned off."""
    lora = tuple(
        (m.disable_adapters, m.merged, tuple(m.active_adapters), tuple(m.scaling.items()))
        for m in lora_layers(base)
    )
    # Tensors that were made in inference mode count no versions.
    weights = tuple(
        (p.data_ptr(), 0 if p.is_inference() else p._version) for p in base.parameters()
    )
    return id(base), base.training, lora, weights


def _check_share(traced: Traced) -> None:
    """Refuse to pack layers whose weights are not those of linear layers, or few of them."""
    graph = traced.graph.graph
    linear = {node.args[1].name for node in linears(graph)}
    sizes = {n.name: n.meta["val"].numel() for n in graph.nodes if n.name in traced.weights}
    if 2 * sum(size for name, size in sizes.items() if name in linear) < sum(sizes.values()):
        raise UnsupportedModelError(
            "Most of its layers' weights are not those of linear layers, and cannot be packed."
        )


def _compile(traced: Traced, weights: Sequence[torch.Tensor], hints: bool) -> Any:
    """Compile a graph for sizes as they are in it, with hints about what it reads or without."""
    from torch._inductor import config, standalone_compile

    # The graph's own idea of its inputs: weights in oneDNN's order have no strides to go by.
    examples = [n.meta["val"] for n in traced.graph.graph.nodes if n.op == "placeholder"]
    cpp = bool(weights) and weights[0].device.type == "cpu"
    plain = not any(weight.is_mkldnn for weight in weights)
    try:
        chosen = config.patch(cpp_wrapper=cpp, size_asserts=plain)
        with torch.no_grad(), chosen, prefetching(hints):
            return standalone_compile(traced.graph, examples, dynamic_shapes="from_graph")
    except Exception as error:  # no compiler, or one that fails
        raise UnsupportedModelError(f"It could not be compiled: {first_line(error)}") from error
