# SPDX-License-Identifier: Apache-2.0
"""Several tasks in one artifact: what masks by prompt keep on average, beside one mask for all.

python experiments/together.py experiments/mix.yaml --arms balanced balanced_debian \\
    --reference lora lora_debian --output results/together_mix.json

Scores of each task are divided by those of plain LoRA with all layers, then averaged over tasks.
Runs that were asked for the same skip rate are compared, paired over items and seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firstlm.errors import FirstError
from firstlm.experiment import arms_of
from firstlm.matrix import jobs_of
from firstlm.metrics import Estimate, Groups, Scores, Side, hierarchical, shares
from firstlm.results import provenance, write_json
from firstlm.scored import Arm, base_seeds

Seeds = Sequence[Scores]


def share(
    ours: Sequence[Seeds],
    references: Sequence[Seeds],
    groups: Sequence[Groups],
    minus: Sequence[Seeds] | None = None,
    over: Callable[..., Any] = np.mean,
    paired: bool = True,
) -> Estimate:
    """Return the mean over tasks of a score's share of the reference's, in percent.

    Args:
        ours: of each task, scores of each seed.
        references: of each task, scores that count as 100, of each seed.
        groups: of each task, what its items share.
        minus: of each task, others' scores of each seed, whose share is subtracted from ours.
        over: what is taken over tasks, the mean or the least, as numpy has it.
        paired: references are of the same seeds as ours; False draws them for themselves.
    """

    def value(scores: Sequence[np.ndarray]) -> np.ndarray:
        of_tasks = [scores[i : i + len(groups)] for i in range(0, len(scores), len(groups))]
        base, *compared = of_tasks
        kept = [
            100 * over([shares(*both) for both in zip(one, base, strict=True)], axis=0)
            for one in compared
        ]
        return kept[0] - kept[1] if minus else kept[0]

    sides = [Side(seeds, task, 0 if paired else 1) for task, seeds in enumerate(references)]
    for part in (ours, minus or ()):
        sides += [Side(seeds, task) for task, seeds in enumerate(part)]
    return hierarchical(sides, value, groups=groups)


def common(arms: Sequence[Arm], name: str) -> list[int]:
    """Return the seeds with which all arms have a run."""
    return sorted(set.intersection(*(set(arm.runs(name)) for arm in arms)))


def table(arms: Sequence[Arm], references: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return one row per run that all arms have, over the seeds with which all have it."""
    groups = [arm.groups for arm in arms]
    plain = common(references, "run_all")

    def compared(
        name: str, seeds: Sequence[int], minus: str | None = None, over: Any = np.mean
    ) -> Estimate:
        same, paired = base_seeds(seeds, plain)
        return share(
            [arm.primary(name, seeds) for arm in arms],
            [arm.primary("run_all", same) for arm in references],
            groups,
            [arm.primary(minus, seeds) for arm in arms] if minus else None,
            over,
            paired=paired,
        )

    found = []
    for name in arms[0].names:
        seeds = common(arms, name)
        if not seeds:
            continue
        rates = [arm.skip_rate(name, seeds) for arm in arms]
        kept, worst = compared(name, seeds), compared(name, seeds, over=np.min)
        row: dict[str, Any] = {
            "run": name,
            "seeds": len(seeds),
            "skip_rates": rates,
            "skip_rate": float(np.mean(rates)),
            "kept": kept.value,
            "kept_ci95": [kept.low, kept.high],
            "worst": worst.value,
            "worst_ci95": [worst.low, worst.high],
            "gains": [],
        }
        policy, _, rate = name.partition("@")
        for other in arms[0].names if policy == "router" and rate else ():
            both = [seed for seed in common(arms, other) if seed in seeds]
            if other != name and other.partition("@")[2] == rate and both:
                gain = compared(name, both, minus=other)
                least = compared(name, both, minus=other, over=np.min)
                theirs = float(np.mean([arm.skip_rate(other, both) for arm in arms]))
                ours = float(np.mean([arm.skip_rate(name, both) for arm in arms]))
                row["gains"].append(
                    {
                        "above": other,
                        "value": gain.value,
                        "low": gain.low,
                        "high": gain.high,
                        "worst": [least.value, least.low, least.high],
                        "seeds": len(both),
                        "skip_rate_above": ours - theirs,
                    }
                )
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
    wanted = {*options.arms, *options.reference}
    jobs = [job for job in jobs_of(options.file, "runs", options.results) if job.arm in wanted]
    try:
        found = arms_of(jobs).get(options.file.stem, {})
    except FirstError as error:
        parser.error(str(error))
    if missing := sorted(wanted - found.keys()):
        parser.error(f"{options.results} has nothing of {', '.join(missing)}")
    arms, references = ([found[n] for n in names] for names in (options.arms, options.reference))
    if [one.dataset for one in arms] != [one.dataset for one in references]:
        parser.error(
            "--reference is to name one arm for each of --arms, on the same test sets in the same "
            f"order; found {[one.dataset for one in references]} for "
            f"{[one.dataset for one in arms]}"
        )
    rows = table(arms, references)
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
