# SPDX-License-Identifier: Apache-2.0
"""Several tasks in one artifact: what masks by prompt keep on average, beside one mask for all.

python experiments/together.py experiments/mix.yaml --arms balanced balanced_debian \\
    --reference lora lora_debian --output results/together_mix.json

Scores of each task are divided by those of plain LoRA with all layers, then averaged over tasks.
Runs that were asked for the same skip rate are compared, paired over items and seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firstlm.jobs import jobs_of
from firstlm.metrics import Estimate, Groups, Scores, drawn_items
from firstlm.results import provenance, write_json
from firstlm.summary import Arm

Seeds = Sequence[Scores]
DRAWS = 1000


def kept(
    ours: Sequence[Seeds],
    references: Sequence[Seeds],
    groups: Sequence[Groups],
    above: Sequence[Seeds] | None = None,
) -> Estimate:
    """Return what is kept on average over tasks, or by how much it is above others, in percent.

    Args:
        ours: of each task, scores of each seed.
        references: of each task, scores that count as 100, of each seed.
        groups: of each task, what its items share.
        above: of each task, the others' scores of each seed, which are subtracted.
    """
    seeds = len(ours[0])

    def value(times: Sequence[np.ndarray], rows: np.ndarray, plain: Sequence[np.ndarray]) -> float:
        def mean(scores: Seeds, task: int, picked: np.ndarray) -> float:
            return float(
                np.mean([scores[i].combine(times[task] @ scores[i].statistics) for i in picked])
            )

        shares = []
        for task in range(len(ours)):
            score = mean(ours[task], task, rows)
            if above is not None:
                score -= mean(above[task], task, rows)
            shares.append(score / mean(references[task], task, plain[task]))
        return 100 * float(np.mean(shares))

    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        times = [drawn_items(generator, len(part), part) for part in groups]
        plain = [generator.integers(0, len(part), len(part)) for part in references]
        drawn.append(value(times, generator.integers(0, seeds, seeds), plain))
    low, high = np.percentile(drawn, [2.5, 97.5]).tolist()
    everything = [np.ones(len(part)) for part in groups]
    each = [np.arange(len(part)) for part in references]
    count = sum(len(part) for part in groups)
    return Estimate(value(everything, np.arange(seeds), each), low, high, count)


def primary(arm: Arm, name: str) -> Seeds:
    """Return the primary scores of a run, one a seed."""
    return arm.scores(name)[arm.task.primary]


def table(arms: Sequence[Arm], references: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return one row per run that all arms have; the first arm's name stands for all."""
    base = [primary(arm, "run_all") for arm in references]
    groups = [arm.groups for arm in arms]
    found = []
    for name in arms[0].names:
        scores = [primary(arm, name) for arm in arms]
        rates = [
            float(np.mean([run["skip_rate"]["mean"] for run in arm.runs(name).values()]))
            for arm in arms
        ]
        share = kept(scores, base, groups)
        row = {"run": name, "skip_rates": rates, "skip_rate": float(np.mean(rates))}
        row |= {"kept": share.value, "kept_ci95": [share.low, share.high], "seeds": len(scores[0])}
        policy, _, rate = name.partition("@")
        if policy == "router" and rate:
            for other in arms[0].names:
                if other != name and other.endswith(f"@{rate}"):
                    theirs = [primary(arm, other) for arm in arms]
                    gain = kept(scores, base, groups, above=theirs)
                    row[f"above {other}"] = [gain.value, gain.low, gain.high]
        found.append(row)
    return found


def main() -> None:
    """Compare runs over all tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, help="experiment file")
    parser.add_argument("--arms", nargs="+", required=True, help="one a task")
    parser.add_argument("--reference", nargs="+", required=True, help="plain LoRA, one a task")
    parser.add_argument("--results", default="results")
    parser.add_argument("--output")
    options = parser.parse_args()
    jobs = jobs_of(options.file, "runs", options.results)

    def arm(name: str) -> Arm:
        mine = [job for job in jobs if job.arm == name]
        reports = {job.seed: job.report for job in mine}
        there = {seed: report for seed, report in reports.items() if report is not None}
        if not there:
            parser.error(f"{options.results} has nothing of {name}")
        return Arm(f"{options.file.stem}-{name}", mine[0].train, mine[0].score, there)

    rows = table([arm(name) for name in options.arms], [arm(name) for name in options.reference])
    for row in rows:
        print(row)
    if options.output:
        write_json(
            options.output,
            {
                "arms": options.arms,
                "reference": options.reference,
                "rows": rows,
                "provenance": provenance(),
            },
        )


if __name__ == "__main__":
    main()
