# SPDX-License-Identifier: Apache-2.0
"""Time decoding with a quarter of the layers skipped, and the routers' share of prefill.

Four arms decode the same prompt in turn, one token each, in an order that is shuffled every round:
no layer skipped, a quarter skipped (7 and 8 of SmolLM2's 30 layers), every layer skipped. What a
skipped layer could save at best is its share of the layer time, that is of (none - all skipped).
Router work is timed directly inside the prefill that does it.

    python experiments/timing.py --rounds 200 --output results/timing_smollm2.json
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from firstlm.config import RouterConfig
from firstlm.decisions import RoutingState
from firstlm.generate import decode_step, prefill
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, RouterPolicy
from firstlm.pretrained import load_base
from firstlm.results import provenance, write_json


def quantiles(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "p25": low, "p75": high}


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """Return the 95% bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws)]]


def spread(count: int, layers: int) -> torch.Tensor:
    """Return a mask that skips `count` evenly spaced layers, none of them the first or last."""
    keep = torch.ones(layers, dtype=torch.bool)
    keep[torch.linspace(2, layers - 3, count).round().long()] = False
    return keep


def time_decoding(model: FirstModel, rounds: int, prompt_tokens: int) -> dict:
    """Decode one token per arm and round, interleaved; return times and what was realised."""
    layers = model.layer_count
    arms = {
        "none_skipped": torch.ones(layers, dtype=torch.bool),
        "7_skipped": spread(7, layers),
        "8_skipped": spread(8, layers),
        "all_skipped": torch.zeros(layers, dtype=torch.bool),
    }
    ids = torch.randint(5, 1000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    runs = {name: prefill(model, ids, policy=FixedMask(keep)) for name, keep in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    rng = random.Random(0)
    token = torch.tensor([7])
    for i in range(rounds + 5):
        names = list(arms)
        rng.shuffle(names)
        for name in names:
            start = time.perf_counter()
            decode_step(model, runs[name], token)
            if i >= 5:  # the first rounds warm up
                times[name].append(time.perf_counter() - start)
    result: dict = {"milliseconds": {n: quantiles([1e3 * t for t in v]) for n, v in times.items()}}
    result["layer_calls"] = {name: dict(run.state.layer_calls) for name, run in runs.items()}
    result["kv_bytes"] = {name: run.cache.kv_bytes for name, run in runs.items()}
    for name in ("7_skipped", "8_skipped"):
        share = 1 - arms[name].float().mean().item()
        saved = [a - b for a, b in zip(times["none_skipped"], times[name], strict=True)]
        layer_time = [
            a - b for a, b in zip(times["none_skipped"], times["all_skipped"], strict=True)
        ]
        ideal = share * statistics.median(layer_time)
        result[name] = {
            "skip_rate": share,
            "time_ratio": statistics.median(
                [b / a for a, b in zip(times["none_skipped"], times[name], strict=True)]
            ),
            "realised_over_ideal": statistics.median(saved) / ideal,
            "realised_over_ideal_ci95": [x / ideal for x in interval(saved)],
        }
    return result


def time_routers(model: FirstModel, rounds: int, prompt_tokens: int) -> dict:
    """Time pooling and deciding inside whole prefills that keep every layer."""
    spent = [0.0]

    class Timed(RoutingState):
        def observe(self, *args):
            start = time.perf_counter()
            whole = super().observe(*args)
            spent[0] += time.perf_counter() - start
            return whole

        def decide(self, *args):
            start = time.perf_counter()
            super().decide(*args)
            spent[0] += time.perf_counter() - start

    ids = torch.randint(5, 1000, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    shares = []
    for i in range(rounds + 2):
        state = Timed(RouterPolicy(model.routers, 1e6), mask, model.layer_count)
        spent[0] = 0.0
        start = time.perf_counter()
        with torch.no_grad(), model.routing.tracing(state):
            model.base(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        total = time.perf_counter() - start
        if i >= 2:
            shares.append(spent[0] / total)
    return {"prompt_tokens": prompt_tokens, "share_of_prefill": quantiles(shares)}


def main() -> None:
    """Run both measurements for each number format and write one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--prefill-rounds", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", default="results/timing_smollm2.json")
    options = parser.parse_args()
    report: dict = {
        "model": "smollm2",
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
    }
    for dtype in options.dtypes:
        base, tokenizer = load_base("smollm2", dtype=dtype, device="cpu")
        model = FirstModel.from_base(base, RouterConfig(), tokenizer).eval()
        with torch.no_grad():
            for router in model.routers:
                router.weight.normal_()
        report[dtype] = {
            "decode": time_decoding(model, options.rounds, options.prompt_tokens),
            "routers": time_routers(model, options.prefill_rounds, 512),
        }
        model.detach()
    report["provenance"] = provenance(seed=0)
    write_json(options.output, report)
    for dtype in options.dtypes:
        print(dtype, report[dtype]["decode"]["7_skipped"], report[dtype]["decode"]["8_skipped"])
        print(dtype, report[dtype]["routers"])


if __name__ == "__main__":
    main()
