# SPDX-License-Identifier: Apache-2.0
"""What a fleet of GPUs would answer with layers skipped: a simulation, nothing is measured.

    python experiments/fleet.py --output results/fleet_llama3_8b.json

`replicas.py` says how requests are batched and `step_model.py` what a step takes; docs/capacity.md
says how far that is from what was measured. Two questions by skip rate and masks: what the fleet
answers while more wait than it can serve (saturation: all have come at second 0), and how long
users wait at a load that it can serve with all layers. Every seed draws other requests, the same
for all skip rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from replicas import Fleet, Lengths, Outcome, Requests, draw
from step_model import Machine, Shape, llama

from firstlm.results import check_file, provenance, write_json

CROWD = 1.5  # requests at saturation, over what could be computed if nothing else took time


def tokens_per_second(found: Outcome, start: float, end: float) -> float:
    """Return tokens that the fleet answered between two seconds, per second."""
    return sum(tokens for when, tokens in found.steps if start < when <= end) / (end - start)


def waits(found: Outcome, asked: Requests, start: float) -> dict[str, float]:
    """Return median and 95th percentile of TTFT and TPOT in ms, of those who came after a second.

    TPOT is a request's own mean, of answers of more than one token.
    """
    mine = asked.arrival >= start
    ttft = 1e3 * (found.first - asked.arrival)[mine]
    many = mine & (asked.answer > 1)
    tpot = 1e3 * ((found.last - found.first)[many]) / (asked.answer[many] - 1)
    return {
        f"{name}_ms_{word}": float(np.percentile(values, share))
        for name, values in (("ttft", ttft), ("tpot", tpot))
        for word, share in (("median", 50), ("p95", 95))
    }


def spread(name: str, values: Sequence[float]) -> dict[str, float | list[float]]:
    """Return the mean over seeds and the range under two names."""
    return {name: float(np.mean(values)), f"{name}_range": [min(values), max(values)]}


class Trial:
    """The fleet that the options describe, and what is asked of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape: Shape = llama(
            options.layers,
            options.hidden,
            options.intermediate,
            options.heads,
            options.kv_heads,
            options.vocab,
            options.number_bytes,
        )
        self.machine = Machine(
            bandwidth=1e12 * options.bandwidth_tb_s * options.bandwidth_share,
            flops=1e12 * options.tflops * options.flops_share,
            layer_overhead=1e-6 * options.layer_overhead_us,
            step_overhead=1e-3 * options.step_overhead_ms,
            overlap=not options.no_overlap,
            partial=options.partial,
        )
        usable = options.memory_share * options.memory_gb - options.other_gb
        self.kv_limit = 1e9 * usable - self.shape.total_bytes
        self.prompt = Lengths(options.prompt_median, options.prompt_sigma, options.prompt_most)
        self.answer = Lengths(options.answer_median, options.answer_sigma, options.answer_most)

    def requests(self, seed: int, rate: float, seconds: float, skip: float, masks: str) -> Requests:
        """Return what arrives at a rate in requests a second."""
        return draw(seed, rate, seconds, self.prompt, self.answer, self.shape.layers, skip, masks)

    def fleet(self, freed: bool) -> Fleet:
        """Return replicas where nobody waits."""
        options = self.options
        limits = options.prompt_tokens, options.most_rows
        return Fleet(self.shape, self.machine, options.replicas, self.kv_limit, freed, *limits)

    def saturation(self, seed: int, skip: float, masks: str, freed: bool) -> dict[str, float]:
        """Return what is answered while more wait than can be served."""
        options, shape = self.options, self.shape
        lengths = self.requests(seed, 1.0, 10_000, 0.0, "one")
        tokens = float((lengths.prompt + lengths.answer).mean())
        flops = shape.layers * (1 - skip) * shape.layer_flops * tokens
        rate = CROWD * options.replicas * self.machine.flops / flops
        asked = self.requests(seed, rate, options.seconds, skip, masks)
        asked = replace(asked, arrival=np.zeros(len(asked.arrival)))
        found = self.fleet(freed).run(asked, options.seconds)
        if found.starved:
            raise SystemExit("a replica had nobody waiting: this is no saturation")
        return {
            "tokens_per_s": tokens_per_second(found, options.warmup, options.seconds),
            "answer_tokens": float(lengths.answer.mean()),
            "most_running": float(found.most_running),
            "kv_share": found.most_kv_bytes / self.kv_limit,
            "skip_rate": 1 - float(asked.keep.mean()),
        }

    def waiting(
        self, seed: int, rate: float, skip: float, masks: str, freed: bool
    ) -> dict[str, float]:
        """Return what users wait at a rate of requests a second."""
        asked = self.requests(seed, rate, self.options.seconds, skip, masks)
        return waits(self.fleet(freed).run(asked), asked, self.options.warmup)


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Return the report, without provenance."""
    trial = Trial(options)
    cases = [(0.0, "one", True)]
    for skip in options.skip_rates:
        cases += [
            (skip, masks, freed) for masks in ("one", "few", "own") for freed in (True, False)
        ]
    full = [trial.saturation(seed, *cases[0]) for seed in range(options.seeds)]
    served = float(np.mean([one["tokens_per_s"] / one["answer_tokens"] for one in full]))
    rate = options.load * served
    base = [one | trial.waiting(seed, rate, *cases[0]) for seed, one in enumerate(full)]
    rows = []
    for skip, masks, freed in cases:
        found = base
        if skip:
            found = [
                trial.saturation(seed, skip, masks, freed)
                | trial.waiting(seed, rate, skip, masks, freed)
                for seed in range(options.seeds)
            ]
        row: dict[str, Any] = {"skip_rate_asked": skip, "skip_rate": found[0]["skip_rate"]}
        row |= {"masks": masks, "kv": "freed" if freed else "reserved"}
        for name in [name for name in found[0] if name not in ("skip_rate", "answer_tokens")]:
            row |= spread(name, [one[name] for one in found])
            over = [one[name] / all_[name] for one, all_ in zip(found, base, strict=True)]
            row |= spread(f"{name}_ratio", over)
        rows.append(row)
        print(f"{skip:.0%} {masks} {row['kv']}: {row['tokens_per_s_ratio']:.2f}x", flush=True)
    return {
        "rows": rows,
        "requests_per_s_at_load": rate,
        "kv_limit_gb": trial.kv_limit / 1e9,
        "options": {name: value for name, value in vars(options).items() if name != "output"},
    }


def parser() -> argparse.ArgumentParser:
    """Return the options: Llama-3-8B in bfloat16 on GPUs of the H100's data sheet."""
    made = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for name, value, what in (
        ("layers", 32, "of the model"),
        ("hidden", 4096, "width of a token's state"),
        ("intermediate", 14336, "width within an MLP"),
        ("heads", 32, "of queries"),
        ("kv-heads", 8, "of keys, and of values"),
        ("vocab", 128256, "tokens that there are"),
        ("number-bytes", 2.0, "of a weight, and of a number in the KV cache"),
        ("replicas", 8, "GPUs, each with the whole model"),
        ("memory-gb", 80.0, "of a GPU"),
        ("memory-share", 0.9, "of the memory that is used at all"),
        ("other-gb", 2.0, "of the memory for neither weights nor keys and values"),
        ("bandwidth-tb-s", 3.35, "of memory, as its maker states"),
        ("bandwidth-share", 0.8, "of it that is reached"),
        ("tflops", 990.0, "a second, as its maker states"),
        ("flops-share", 0.5, "of them that are reached"),
        ("layer-overhead-us", 10.0, "for each layer that a step visits"),
        ("step-overhead-ms", 1.0, "for each step"),
        ("partial", 1.0, "factor on the time of a layer that only some rows of a step run"),
        ("prompt-tokens", 8192, "of prompts in one step at most, but for a single longer one"),
        ("most-rows", 100_000, "sequences at once on a replica at most; default: memory decides"),
        ("prompt-median", 200.0, "tokens"),
        ("prompt-sigma", 1.0, "of the logarithm of prompts' lengths"),
        ("prompt-most", 4096, "tokens, at most"),
        ("answer-median", 250.0, "tokens"),
        ("answer-sigma", 0.8, "of the logarithm of answers' lengths"),
        ("answer-most", 2048, "tokens, at most"),
        ("load", 0.7, "share of the requests served at saturation with all layers"),
        ("seconds", 40.0, "for which requests arrive"),
        ("warmup", 20.0, "seconds at the start that do not count"),
        ("seeds", 3, "each draws other requests and masks"),
    ):
        made.add_argument(f"--{name}", type=type(value), default=value, help=what)
    made.add_argument(
        "--skip-rates", type=float, nargs="+", default=[0.15, 0.25, 0.4], help="beside 0"
    )
    made.add_argument(
        "--no-overlap", action="store_true", help="reading and computing do not go on at once"
    )
    made.add_argument("--output", help="JSON file")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, and write the results."""
    options = parser().parse_args(arguments)
    if options.output:
        check_file(options.output)
    report = simulate(options) | {"provenance": provenance(options.seeds)}
    if options.output:
        write_json(options.output, report)


if __name__ == "__main__":
    main()
