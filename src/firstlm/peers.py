# SPDX-License-Identifier: Apache-2.0
"""What a user would pick instead, for `firstlm bench --peers`: each answers one prompt, timed.

Layers that are skipped are left out for good here, or as the peer's own method does it. What each
needs is imported when it is made; one that is not installed says so.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from firstlm.cut import cut
from firstlm.errors import ConfigError
from firstlm.generate import stream
from firstlm.layers import LayerStack
from firstlm.model import FirstModel
from firstlm.policies import FixedMask
from firstlm.pretrained import dtype_name
from firstlm.short_gguf import shorter_gguf

# Takes a prompt [1, tokens] and how many tokens to answer; returns seconds a token, the first
# left out.
Answer = Callable[[torch.Tensor, int], float]


@dataclass
class Peer:
    """One way of answering a prompt.

    Attributes:
        name: of the peer.
        dtype: number format of its weights.
        keep: [layers] bool, the layers that run.
        answer: answers a prompt; see `Answer`.
        seconds: a token, measured so far.
    """

    name: str
    dtype: str
    keep: torch.Tensor
    answer: Answer
    seconds: list[float] = field(default_factory=list)


class _Clock(StoppingCriteria):
    """Notes when tokens came; never stops."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.note(input_ids.shape[1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def note(self, tokens: int) -> bool:
        """Note that there are so many tokens."""
        self.marks.append((time.perf_counter(), tokens))
        return False

    def seconds(self) -> float:
        """Return seconds a token, from the first on."""
        (start, before), (end, after) = self.marks[0], self.marks[-1]
        return (end - start) / (after - before)


def _timed_generate(model: Any, **options: Any) -> Answer:
    """Return an answer by a `generate` like transformers'."""

    def answer(ids: torch.Tensor, tokens: int) -> float:
        clock = _Clock()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
                **options,
            )
        return clock.seconds()

    return answer


def _timed_decode(model: Any) -> Answer:
    """Return an answer by economize's `decode`."""

    def answer(ids: torch.Tensor, tokens: int) -> float:
        clock = _Clock()
        model.decode(ids[0], tokens, stop=lambda found: clock.note(len(found)))
        return clock.seconds()

    return answer


def ours(model: FirstModel, keep: torch.Tensor, weights: str) -> Peer:
    """Return our own fast engine, as a user calls it."""

    def answer(ids: torch.Tensor, tokens: int) -> float:
        marks = [
            time.perf_counter()
            for _ in stream(
                model,
                ids,
                policy=FixedMask(keep),
                max_new_tokens=tokens,
                eos_token_ids=(),
                engine="fast",
                weights=weights,
            )
        ]
        return (marks[-1] - marks[0]) / (len(marks) - 1)

    dtype = dtype_name(model.plain_base.dtype) if weights == "same" else weights
    return Peer("fast", dtype, keep, answer)


class PeerMaker:
    """Makes peers of one model.

    Args:
        base: a transformers model, out of peft's wrapper.
        stack: its layers.
        gguf: the file that it was read from, for llama.cpp.
    """

    def __init__(self, base: Any, stack: LayerStack, gguf: Path | None) -> None:
        self.base, self.stack, self.gguf = base, stack, gguf
        self.dtype = dtype_name(base.dtype)

    def make(self, name: str, keep: torch.Tensor) -> list[Peer]:
        """Return the peers of one of `config.PEERS` for one mask.

        Raises:
            ImportError: a package is missing.
            FirstError: it cannot run this model, or not with this mask.
        """
        return getattr(self, name)(keep)

    def _short(self, keep: torch.Tensor) -> Any:
        """Return the model with only the layers of a mask, and plain options of generation."""
        short = cut(self.base, self.stack, keep.tolist())
        short.generation_config = GenerationConfig(pad_token_id=0)
        return short

    def transformers(self, keep: torch.Tensor) -> list[Peer]:
        """Transformers' `generate`, as it comes."""
        return [Peer("transformers", self.dtype, keep, _timed_generate(self._short(keep)))]

    def static(self, keep: torch.Tensor) -> list[Peer]:
        """Transformers' `generate` with a static cache, which compiles the model."""
        config: Any = CompileConfig()
        config._compile_all_devices = True
        answer = _timed_generate(
            self._short(keep), cache_implementation="static", compile_config=config
        )
        return [Peer("transformers-static", self.dtype, keep, answer)]

    def early_exit(self, keep: torch.Tensor) -> list[Peer]:
        """Drafts by the lower half of the layers, which all layers verify; nothing is lost."""
        if not bool(keep.all()):
            return []
        answer = _timed_generate(self._short(keep), assistant_early_exit=len(keep) // 2)
        return [Peer("assistant_early_exit", self.dtype, keep, answer)]

    def economize(self, keep: torch.Tensor) -> list[Peer]:
        """economize's static depth (`depth_prune`) and its dynamic one (`skipdecode`)."""
        import economize
        from economize.techniques.dynamic_depth import SkipDecodeConfig
        from economize.techniques.prune import DepthPruneConfig

        gone = [i + 1 for i, runs in enumerate(keep.tolist()) if not runs]
        left = len(keep) - len(gone)
        ways: dict[str, Any] = {
            "economize-skipdecode": SkipDecodeConfig(max_layers=left, min_layers=left)
        }
        if gone:
            ways["economize-depth_prune"] = DepthPruneConfig(
                num_blocks=len(gone), layers=tuple(gone)
            )
        every = torch.ones_like(keep)
        # A token a cycle, and told as it comes.
        options = economize.DecodeConfig(cycle_length=1, sync_interval=1)
        peers = []
        for name, way in ways.items():
            model = economize.apply(self._short(every), way, decoding=options)
            peers.append(Peer(name, self.dtype, keep, _timed_decode(model)))
        return peers

    def llama_cpp(self, keep: torch.Tensor) -> list[Peer]:
        """llama.cpp, on the file's own number format and on bfloat16."""
        if self.gguf is None:  # first: no package mends it
            raise ConfigError("it needs a model that comes as a .gguf file")
        import llama_cpp  # pyright: ignore[reportMissingImports]

        peers = []
        for bfloat16 in (False, True):
            folder = tempfile.TemporaryDirectory(prefix="firstlm-")
            file = Path(folder.name) / "short.gguf"
            dtype = shorter_gguf(self.gguf, file, keep.tolist(), bfloat16)
            model = llama_cpp.Llama(
                str(file), n_ctx=2048, n_threads=torch.get_num_threads(), verbose=False
            )
            peers.append(Peer("llama.cpp", dtype, keep, _llama_answer(model, folder)))
        return peers


def _llama_answer(model: Any, folder: Any) -> Answer:
    def answer(ids: torch.Tensor, tokens: int) -> float:
        assert folder.name  # the file lives as long as the peer
        prompt = ids[0].tolist()
        model.reset()
        model.eval(prompt)
        start = time.perf_counter()
        for turn in range(tokens - 1):
            model.eval([prompt[turn % len(prompt)]])
        return (time.perf_counter() - start) / (tokens - 1)

    return answer
