# SPDX-License-Identifier: Apache-2.0
"""Thousands of prompts through `generate_many`: what skipping saves, prompts and answers together.

The same prompts, in slices that take turns: all layers; the artifact's routers; the routers without
prompts that run ahead; and a mask drawn for each prompt, which is the worst case for a batch.

    python experiments/throughput.py smollm2-qa --data qa/qamr --output results/throughput_qamr.json
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch

from firstlm.batching import generate_many
from firstlm.bench import spread
from firstlm.data import encode, scored_examples
from firstlm.matrix import data_files
from firstlm.model import FirstModel
from firstlm.results import provenance, sha256_of, write_json


def ratios(ours: list[float], others: list[float]) -> list[float]:
    """Return one arm's figures over another's, slice by slice."""
    return [a / b for a, b in zip(ours, others, strict=True)]


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact")
    parser.add_argument("--data", required=True, help="a folder of $FIRSTLM_DATA")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--skip-rate", type=float, default=0.25)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--end", action="store_true", help="answers end where the model ends them")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    model = FirstModel.from_pretrained(options.artifact, dtype=options.dtype)
    model.merge_and_unload()  # as `firstlm generate` and `firstlm serve` do
    file = data_files(options.data, "--data")["test"]
    examples = scored_examples(file, limit=options.prompts)
    texts = [
        encode(example, model.tokenizer, model.context_length).prompt_ids for example in examples
    ]
    rate = options.skip_rate
    arms: dict[str, dict[str, Any]] = {
        "all layers": {"skip_rate": 0.0},
        "routers": {"skip_rate": rate},
        "routers, first come": {"skip_rate": rate, "lookahead": 0},
    }
    if not options.end:  # nonsense does not end
        arms["a mask for each"] = {"policy": model.baseline_for("random", rate).at()}
    more = {
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "eos_token_ids": None if options.end else (),
        "progress": False,
    }
    made = provenance(0, data={options.data: sha256_of(file)})
    found: dict[str, dict[str, list]] = {
        name: {"rate": [], "seconds": [], "masks": []} for name in arms
    }
    rng = random.Random(0)
    for arm in arms.values():  # compiles
        generate_many(model, texts[: 2 * options.batch_size], **(more | arm))
    for turn in range(options.slices):
        part = texts[turn :: options.slices]
        for name in rng.sample(list(arms), len(arms)):
            start = time.perf_counter()
            answers = generate_many(model, part, **(more | arms[name]))
            seconds = time.perf_counter() - start
            found[name]["seconds"].append(seconds)
            found[name]["rate"].append(sum(len(a.ids) for a in answers) / seconds)
            found[name]["masks"] += [tuple(a.keep.tolist()) for a in answers]
        print(turn, {name: round(one["rate"][-1], 1) for name, one in found.items()}, flush=True)
    whole = found["all layers"]
    rows = [
        {
            "arm": name,
            "skip_rate": 1 - float(torch.tensor(one["masks"]).float().mean()),
            "masks": len(set(one["masks"])),
            "tokens_per_s": sorted(one["rate"])[len(one["rate"]) // 2],
        }
        | spread("speedup", ratios(one["rate"], whole["rate"]), seed=0)
        | spread("prompts_speedup", ratios(whole["seconds"], one["seconds"]), seed=0)
        for name, one in found.items()
    ]
    report = {
        "rows": rows,
        "options": vars(options),
        "prompt_tokens": sum(map(len, texts)) / len(texts),
    }
    report["threads"] = torch.get_num_threads()
    report["provenance"] = made
    write_json(options.output, report)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
