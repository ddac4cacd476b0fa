# SPDX-License-Identifier: Apache-2.0
"""Two arms of one loaded model, timed in turns: base (all layers, no LoRA) and routed.

Both take the same loop. LoRA is merged into the weights for the routed arm, as one would deploy it,
so that the difference in time is that of the layers skipped. Knows token ids only, no text.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from firstlm.generate import stream
from firstlm.lora import swapped
from firstlm.model import FirstModel


@dataclass
class Run:
    """What one answer took: seconds to each of its tokens, layers, memory for keys and values."""

    ids: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    keep: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    layer_calls: dict[str, int] = field(default_factory=dict)
    kv_bytes: int = 0

    @property
    def skip_rate(self) -> float:
        """Share of layers skipped."""
        return 1.0 - float(self.keep.float().mean())

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.seconds[0]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, the first included."""
        return len(self.ids) / self.seconds[-1]

    @property
    def steps(self) -> list[float]:
        """Seconds of each decode step."""
        return [after - before for before, after in pairwise(self.seconds)]

    @property
    def tpot(self) -> float:
        """Median seconds per token after the first; nan for a single token."""
        return statistics.median(self.steps) if len(self.seconds) > 1 else float("nan")


def follow(model: FirstModel, ids: Sequence[int], run: Run, **options: Any) -> Iterator[int]:
    """Yield the tokens that answer one prompt and note in `run` what they take."""
    for token in stream(model, torch.tensor([list(ids)]), **options):
        run.ids.append(int(token.ids[0]))
        run.seconds.append(token.seconds)
        state = token.decoding.state
        run.keep, run.layer_calls = state.keep[0], dict(state.layer_calls)
        run.kv_bytes = token.decoding.cache.kv_bytes
        yield run.ids[-1]


def answer(model: FirstModel, ids: Sequence[int], **options: Any) -> Run:
    """Answer one prompt; options as for `stream`."""
    run = Run()
    for _ in follow(model, ids, run, **options):
        pass
    return run


class Arms:
    """One model as base (all layers, no adapter) and as routed model (adapter merged)."""

    NAMES = ("base", "routed")

    def __init__(self, model: FirstModel) -> None:
        self.model = model
        self._merged = _merge(model)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Within this scope the model is what `name` says."""
        with ExitStack() as stack:
            if name == "base":
                stack.enter_context(self.model.run_all())
                stack.enter_context(self.model.disable_adapter())
            elif self._merged is not None:
                stack.enter_context(self.model.disable_adapter())
                stack.enter_context(swapped(self._merged))
            yield

    def answers(self, ids: Sequence[int], skip_rate: float | None, **options: Any) -> list[Run]:
        """Return the base's answer and the routed one."""
        return [self._answer(name, ids, skip_rate, **options) for name in self.NAMES]

    def timings(
        self, ids: Sequence[int], skip_rate: float | None, tokens: int, rounds: int = 2, **more: Any
    ) -> tuple[list[Run], list[Run]]:
        """Time base and routed turn by turn, `tokens` tokens each; the order turns every round."""
        runs: dict[str, list[Run]] = {name: [] for name in self.NAMES}
        for turn in range(rounds):
            for name in self.NAMES if turn % 2 == 0 else reversed(self.NAMES):
                run = self._answer(
                    name, ids, skip_rate, max_new_tokens=tokens, eos_token_ids=(), **more
                )
                runs[name].append(run)
        return runs["base"], runs["routed"]

    def _answer(
        self, name: str, ids: Sequence[int], skip_rate: float | None, **options: Any
    ) -> Run:
        rate = None if name == "base" else skip_rate
        with self.scope(name):
            return answer(self.model, ids, skip_rate=rate, **options)


def _merge(model: FirstModel) -> list[tuple[torch.nn.Parameter, torch.Tensor]] | None:
    """Return (weight, weight with LoRA), or None where LoRA can't be added (quantised weights)."""
    if not model.has_adapter:
        return None
    from peft.tuners.lora.layer import Linear, LoraLayer

    pairs = []
    with torch.no_grad():
        for module in model.base.modules():
            if not isinstance(module, LoraLayer):
                continue
            weight: Any = module.get_base_layer().weight
            if not isinstance(module, Linear) or module.lora_variant or weight.element_size() < 2:
                return None
            whole = weight.detach().clone()
            for name in module.active_adapters:
                whole += module.get_delta_weight(name).to(whole)
            pairs.append((weight, whole))
    return pairs


def median(runs: Sequence[Run], what: str) -> float:
    """Return the median over runs of `ttft`, `tpot` or `tokens_per_second`."""
    return statistics.median(getattr(run, what) for run in runs)
