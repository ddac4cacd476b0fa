# SPDX-License-Identifier: Apache-2.0
"""Where the time of one token goes: transformers' layers, and the fast engine's.

Parts are timed one by one while a model decodes, all layers kept, batch 1; what is left of a step
is Python between them. Medians over steps.

    python experiments/profile_token.py --output results/profile_smollm2.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from firstlm.config import WEIGHT_FORMATS, RouterConfig
from firstlm.generate import decode_step, prefill
from firstlm.model import FirstModel
from firstlm.policies import RunAll
from firstlm.pretrained import load_base
from firstlm.results import provenance, write_json

KINDS = ("self_attn", "mlp", "norm", "rotary_emb", "embed_tokens", "lm_head")
PLAIN = {
    "self_attn": "attention",
    "mlp": "mlp",
    "norm": "norms",
    "rotary_emb": "embedding, positions",
    "embed_tokens": "embedding, positions",
    "lm_head": "vocabulary",
}


class Parts:
    """Sums up the seconds of calls by part, a step at a time."""

    def __init__(self) -> None:
        self.now: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def watch(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a call that is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.now[part] += time.perf_counter() - start

        return timed

    def step(self, call: Callable[[], Any]) -> None:
        """Run a step, and note what it spent."""
        self.now.clear()
        start = time.perf_counter()
        call()
        total = time.perf_counter() - start
        self.now["Python between"] = total - sum(self.now.values())
        self.steps.append(dict(self.now))

    def medians(self) -> dict[str, float]:
        """Return milliseconds by part."""
        names = list(self.steps[0])
        return {name: 1e3 * statistics.median(s[name] for s in self.steps) for name in names}


def watch_modules(model: FirstModel, parts: Parts) -> None:
    """Time the modules of transformers' layers."""
    for name, module in model.plain_base.named_modules():
        leaf = name.rpartition(".")[2]
        kind = next((k for k in KINDS if leaf == k or (k == "norm" and leaf.endswith(k))), None)
        if kind:
            module.forward = parts.watch(PLAIN[kind], module.forward)


def watch_engine(model: FirstModel, weights: str, parts: Parts) -> None:
    """Time the compiled parts of the fast engine."""
    engine = model.engine_for("fast", weights, 1)
    assert engine is not None
    step = engine.step(1)
    step.head.run = parts.watch("embedding, positions", step.head.run)
    step.tail.run = parts.watch("vocabulary", step.tail.run)
    for part in step.layers:
        part.run = parts.watch("layers", part.run)


def profile(dtype: str, engine: str, weights: str, options: argparse.Namespace) -> Parts:
    """Decode, and return what the parts took."""
    base, tokenizer = load_base("smollm2", dtype=dtype)
    model = FirstModel.from_base(base.eval(), RouterConfig(), tokenizer)
    parts = Parts()
    ids = torch.randint(5, 40000, (1, options.prompt_tokens))
    if engine == "fast":
        watch_engine(model, weights, parts)
    else:
        watch_modules(model, parts)
    how = {"policy": RunAll(), "max_new_tokens": options.steps + 3, "engine": engine}
    decoding = prefill(model, ids, weights=weights, **how)
    for turn in range(options.steps + 3):
        parts.step(partial(decode_step, model, decoding, ids[:, 0]))
        if turn < 3:
            parts.steps.clear()
    return parts


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    ways = [("hf", "same"), *(("fast", weights) for weights in WEIGHT_FORMATS)]
    rows = []
    with torch.no_grad():
        for engine, weights in ways:
            found = profile(options.dtype, engine, weights, options).medians()
            total = sum(found.values())
            rows.append({"engine": engine, "weights": weights, "ms": found, "total_ms": total})
            print(engine, weights, {k: round(v, 2) for k, v in found.items()}, round(total, 2))
    write_json(
        options.output,
        {
            "rows": rows,
            "dtype": options.dtype,
            "steps": options.steps,
            "prompt_tokens": options.prompt_tokens,
            "threads": torch.get_num_threads(),
            "provenance": provenance(0),
        },
    )


if __name__ == "__main__":
    main()
