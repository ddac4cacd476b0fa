# SPDX-License-Identifier: Apache-2.0
"""One row per arm, policy and skip rate over all seeds, from the results of experiments.

Reads what `firstlm experiment run` wrote and the test sets' references; needs no model, and its
tokenizer for chats alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firstlm.command_config import EvalConfig
from firstlm.config import BASELINES, DIAGNOSTICS, RATED, TrainConfig
from firstlm.data import items_hash, scored_examples
from firstlm.errors import DataError
from firstlm.examples import needs_tokenizer
from firstlm.masks import (
    describe_masks,
    from_bits,
    layer_length_correlations,
    length_correlation,
)
from firstlm.metrics import Estimate, Scores, grouped, means, over_seeds, perplexity
from firstlm.pretrained import SMOLLM2, load_tokenizer
from firstlm.sections import arm_of
from firstlm.tasks import Task, find_task

# Below this the reference itself has hardly learnt the task: a share of it would mean nothing.
LOWEST = {"bleu": 5.0, "f1": 20.0}
UNBOUNDED = ("perplexity",)  # the others are percentages


class Arm:
    """The results of one arm, seed by seed.

    Args:
        file: name of its experiment file.
        name: its own.
        train: options of its training (of any seed).
        score: options of its evaluation.
        reports: what `firstlm eval` wrote, by seed.
        routers_of: the files that its routers were trained on, where others than its own.
    """

    def __init__(
        self,
        file: str,
        name: str,
        train: TrainConfig,
        score: EvalConfig,
        reports: Mapping[int, dict[str, Any]],
        routers_of: Sequence[str] | None = None,
    ) -> None:
        self.file, self.name, self.train, self.score = file, name, train, score
        self.reports = dict(sorted(reports.items()))
        counts = {run["count"] for report in reports.values() for run in report["runs"].values()}
        if len(counts) != 1:
            raise DataError(f"The results of {train.output} are over {sorted(counts)} items.")
        (self.count,) = counts
        tokenizer = None
        if needs_tokenizer(score.data, score.template):
            tokenizer = load_tokenizer(score.model or self.model)
        examples = scored_examples(score.data, score.template, tokenizer, score.limit)
        if len(examples) != self.count:
            raise DataError(
                f"The results of {train.output} are over {self.count} items, but {score.data} has "
                f"{len(examples)}."
            )
        known = [example.id for example in examples]
        self.items = items_hash(examples)
        for report in reports.values():
            for name, run in report["runs"].items():
                if [item["id"] for item in run["items"]] != known:
                    raise DataError(
                        f"{name} of {train.output} was scored on other items of {score.data} than "
                        f"limit={score.limit} draws now; remove {score.output} and score it again."
                    )
            told = report["inputs"].get("items_sha256")  # not in results of 2026-11-25
            if told not in (None, self.items):
                raise DataError(
                    f"{score.data} has changed since {train.output} was scored on it; remove "
                    f"{score.output} and score it again."
                )
        self.groups = grouped([example.group for example in examples])
        self.dataset = Path(score.data).parent.name
        self.trained_on = [Path(file).parent.name for file in train.data or ()]
        self.routers_of = [Path(file).parent.name for file in routers_of or train.data or ()]
        self.task: Task = find_task(examples, score.task, score.template)
        self._references = [example.references for example in examples]
        self._scores: dict[str, dict[str, dict[int, Scores]]] = {}

    def comparable(self, other: Arm) -> bool:
        """Whether another arm is of the same model, and was scored on the same items."""
        ours, theirs = ((arm.model, arm.dataset, arm.items) for arm in (self, other))
        return ours == theirs

    @property
    def lora(self) -> bool:
        """Whether its artifact has LoRA."""
        trained = self.train.stage != "routers" and self.train.lora_steps > 0
        # Results of before 2026-11-28 do not say so.
        return any(report.get("lora", trained) for report in self.reports.values())

    @property
    def model(self) -> str:
        """Name of the base model that its artifact was made for."""
        # Results of before 2026-11-28 do not say so.
        told = [report.get("base_model") for report in self.reports.values()]
        return next(filter(None, told), self.score.model or self.train.model or SMOLLM2)

    @property
    def mask_of(self) -> str:
        """The arm whose routers one mask for all of its prompts is made of."""
        return arm_of(Path(self.train.majority_of or self.score.artifact).name)

    def weights(self, seeds: Sequence[int]) -> list[str]:
        """Return the number format in which its model was scored, by seed."""
        inputs = [self.reports[seed]["inputs"] for seed in seeds]
        # Results of 2026-11-25 do not say so.
        return [one.get("weights", "unknown").removeprefix("torch.") for one in inputs]

    @property
    def commits(self) -> list[str]:
        """The versions of the code at which its runs were scored."""
        made = [
            run.get("provenance", {}).get("git")
            for r in self.reports.values()
            for run in r["runs"].values()
        ]
        known = [f"{git['commit'][:7]}{'+' * git['dirty']}" for git in made if git]
        return list(dict.fromkeys(known))

    @property
    def names(self) -> list[str]:
        """The runs, in order."""
        return list(dict.fromkeys(n for report in self.reports.values() for n in report["runs"]))

    def runs(self, name: str) -> dict[int, dict[str, Any]]:
        """Return one run's results by seed."""
        return {s: r["runs"][name] for s, r in self.reports.items() if name in r["runs"]}

    def scores(self, name: str) -> dict[str, dict[int, Scores]]:
        """Return each metric's scores of a run, by seed."""
        if name in self._scores:
            return self._scores[name]
        found = self._scores[name] = dict[str, dict[int, Scores]]()
        for seed, run in self.runs(name).items():
            items = run["items"]
            by_metric = self.task.score([item["prediction"] for item in items], self._references)
            # Results of 2026-11-25 lack answer_tokens; what is no number was written as null.
            if all("answer_tokens" in x and x.get("perplexity") is not None for x in items):
                tokens = [item["answer_tokens"] for item in items]
                losses = [np.log(item["perplexity"]) * item["answer_tokens"] for item in items]
                by_metric |= {"perplexity": perplexity(losses, tokens)}
            if all("bertscore" in item for item in items):
                by_metric |= {"bertscore": means([item["bertscore"] for item in items])}
            for metric, scores in by_metric.items():
                found.setdefault(metric, {})[seed] = scores
        return found

    def keeps(self, name: str, seed: int) -> list[str]:
        """Return the layers that each prompt of a run kept."""
        return [item["keep"] for item in self.runs(name)[seed]["items"]]

    def primary(self, name: str, seeds: Sequence[int]) -> list[Scores]:
        """Return the primary scores of a run, one for each of some seeds."""
        scores = self.scores(name)[self.task.primary]
        return [scores[seed] for seed in seeds]

    def skip_rate(self, name: str, seeds: Sequence[int]) -> float:
        """Return the share of layers that a run skipped, the mean over some seeds."""
        return _mean([self.runs(name)[seed]["skip_rate"]["mean"] for seed in seeds])


def rows(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return one row per arm, run and metric; retention is against plain LoRA with all layers.

    Args:
        arms: of one file.
    """
    found = []
    for arm in arms:
        reference = _reference(arm, arms)
        bases = reference.scores("run_all") if reference else {}
        for name in arm.names:
            gains = _gains(arm, name, arms)
            for metric, by_seed in arm.scores(name).items():
                runs = [arm.runs(name)[seed] for seed in by_seed]
                scores = list(by_seed.values())
                score = over_seeds(scores, groups=arm.groups)
                known = bases.get(metric, {})
                same, paired = base_seeds(list(by_seed), list(known))
                base = [known[seed] for seed in same]
                kept = None
                if base:  # a perplexity is the better the lower it is
                    pair = (base, scores) if metric == "perplexity" else (scores, base)
                    kept = over_seeds(*pair, groups=arm.groups, paired=paired)
                found.append(
                    {
                        "task": arm.task.name,
                        "dataset": arm.dataset,
                        "trained_on": "+".join(arm.trained_on),
                        "routers_of": "+".join(arm.routers_of),
                        "model": arm.model,
                        "file": arm.file,
                        "arm": arm.name,
                        **_policy(arm, runs[0]["policy"]),
                        "unit": arm.train.unit,
                        "prefill": runs[0]["prefill"],
                        "weights": arm.weights(list(by_seed)),
                        "mask_of": arm.mask_of,
                        "skip_rate": _mean([run["skip_rate"]["mean"] for run in runs]),
                        "skip_rate_p5": _mean([run["skip_rate"]["p5"] for run in runs]),
                        "skip_rate_p95": _mean([run["skip_rate"]["p95"] for run in runs]),
                        "skip_rate_asked": _asked(runs[0]),
                        "alpha": arm.train.alpha if arm.train.skip_rate is None else None,
                        "l2": arm.train.l2,
                        **adaptivity(runs),
                        "kv_recomputed": _known_mean([run.get("kv_recomputed") for run in runs]),
                        "gains": gains if metric == arm.task.primary else [],
                        "metric": metric,
                        "primary": metric == arm.task.primary,
                        "score": score.value,
                        "ci95": _within(metric, score),
                        "by_seed": [one.value for one in scores],
                        "retention": kept.value if kept else None,
                        "retention_ci95": [kept.low, kept.high] if kept else None,
                        "retention_of": reference.name if kept and reference else None,
                        "reference_score": _mean([s.value for s in base]) if kept else None,
                        "formats_differ": bool(
                            kept and reference and formats_differ(arm, by_seed, reference, same)
                        ),
                        "seeds": len(scores),
                        "n_test": score.count,
                        "n_groups": int(arm.groups.max()) + 1,
                        "tpot_ratio": _tpot_ratio(runs, "value"),
                        "tpot_ratio_spread": _spread(runs),
                    }
                )
    return found


def strayed_masks(arms: Sequence[Arm]) -> list[str]:
    """Return the runs of a majority mask that is not that of the routers it is named after.

    Those may have been trained anew since.

    Args:
        arms: of one file.
    """
    by_name, found = {arm.name: arm for arm in arms}, []
    for arm in arms:
        routers = by_name.get(arm.mask_of)
        if arm.train.policy != "majority" or routers is None:
            continue
        for name in arm.names:
            theirs = routers.runs(name)
            found += [
                f"{name} of {arm.file}-{arm.name}-{seed}"
                for seed in arm.runs(name)
                if seed in theirs and {*arm.keeps(name, seed)} != {*routers.keeps(name, seed)}
            ]
    return found


def base_seeds(seeds: Sequence[int], known: Sequence[int]) -> tuple[Sequence[int], bool]:
    """Return with which seeds of a base to compare, and whether they are the same.

    Where it lacks one of them all of its own count.
    """
    paired = set(seeds) <= set(known)
    return (seeds if paired else known), paired


def formats_differ(arm: Arm, seeds: Iterable[int], other: Arm, others: Iterable[int]) -> bool:
    """Tell whether two arms were scored in other number formats, over some seeds of each."""
    ours, theirs = arm.weights(list(seeds)), other.weights(list(others))
    return ours != theirs if len(ours) == len(theirs) else set(ours) != set(theirs)


def _reference(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Return the plain LoRA whose scores an arm's are held against, where it has learnt the task.

    It has all layers, and was trained on the same task alone, or else on what the arm was. Of
    several the best counts, which may have had more steps.
    """
    plain = [
        other
        for other in arms
        if other.lora
        and other.train.skip_rate == 0
        and other.comparable(arm)
        and other.task.primary in other.scores("run_all")
    ]
    alone = [other for other in plain if other.trained_on == [arm.dataset]]
    picked = alone or [other for other in plain if other.trained_on == arm.trained_on]
    best = max(picked, key=_plain_score, default=None)
    learnt = best is not None and _plain_score(best) >= LOWEST.get(best.task.primary, 0.0)
    return best if learnt else None


def _plain_score(arm: Arm) -> float:
    """Return the primary score of an arm with all layers, the mean over seeds."""
    return _mean([one.value for one in arm.scores("run_all")[arm.task.primary].values()])


def _gains(arm: Arm, name: str, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Return by how much FiRST's primary score is above that of other policies at the same rate.

    Returns:
        For each: file, arm, dataset, model, routers_of, policy, lora_of, the difference (value) and
        its 95% interval (low, high), paired over items and seeds, of which there are `seeds` that
        both have; by how much more of the layers FiRST skipped (skip_rate_above), since thresholds
        that were measured on other prompts than these may miss the rate; the share of prompts that
        skip the same layers in both (same_masks); whether a seed of one was scored in another
        number format than that of the other (formats_differ); the other's unit and prefill; and of
        one mask for all prompts, the arm whose routers it is made of (mask_of).
    """
    routed, _, rate = name.partition("@")
    if routed != "router" or not rate or arm.train.reads != "states":
        return []
    found = []
    for other in arms:
        for run in other.names if other.comparable(arm) else ():
            # Seeds that both have: those of others differ by more than policies do.
            seeds = [seed for seed in arm.runs(name) if seed in other.runs(run)]
            seeds = [seed for seed in seeds if _same_training(arm, other, seed)]
            same = (other.name, run) == (arm.name, name)
            if seeds and run.partition("@")[2] == rate and not same:
                ours, theirs = arm.primary(name, seeds), other.primary(run, seeds)
                gain = over_seeds(ours, theirs, groups=arm.groups, difference=True)
                shown = _policy(other, run.partition("@")[0])
                shown = {key: shown[key] for key in ("policy", "lora_of")}
                one_for_all = shown["policy"] in ("majority", "majority_here")
                shown["mask_of"] = other.mask_of if one_for_all else None
                same_masks = _mean(
                    [
                        one == two
                        for seed in seeds
                        for one, two in zip(
                            arm.keeps(name, seed), other.keeps(run, seed), strict=True
                        )
                    ]
                )
                difference = {"value": gain.value, "low": gain.low, "high": gain.high}
                above = arm.skip_rate(name, seeds) - other.skip_rate(run, seeds)
                more = {"skip_rate_above": above, "same_masks": same_masks, "seeds": len(seeds)}
                more["formats_differ"] = formats_differ(arm, seeds, other, seeds)
                found.append(
                    {
                        "file": other.file,
                        "arm": other.name,
                        "dataset": other.dataset,
                        "model": other.model,
                        "routers_of": "+".join(other.routers_of),
                        "unit": other.train.unit,
                        "prefill": other.runs(run)[seeds[0]]["prefill"],
                        **shown,
                        **difference,
                        **more,
                    }
                )
    return found


def _same_training(arm: Arm, other: Arm, seed: int) -> bool:
    """Tell whether two arms that score one artifact scored the same training of it."""
    if arm.score.artifact != other.score.artifact:
        return True
    ours, theirs = (one.reports[seed]["inputs"].get("artifact_sha256") for one in (arm, other))
    return ours == theirs


def adaptivity(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Say how much masks differ from prompt to prompt; means over runs.

    Returns:
        distinct_masks, mask_entropy, length_correlation, and layer_length_correlation, that of the
        layer where it is furthest from 0; see `masks`. The last two are None where no run has one.
    """
    found, correlations, by_layer = [], [], list[list[float | None]]()
    for run in runs:
        keep = from_bits([item["keep"] for item in run["items"]])
        found.append(describe_masks(keep))
        # Results of before 2026-11-25 do not say how long prompts are.
        lengths = [item.get("prompt_tokens", 1) for item in run["items"]]
        correlations.append(length_correlation((1 - keep.mean(1)).tolist(), lengths))
        by_layer.append(layer_length_correlations(keep, lengths))
    # Seeds first: the extreme of one seed is some layer's by chance.
    layers = [_mean_over_seeds(seeds) for seeds in zip(*by_layer, strict=True)]
    return {
        "distinct_masks": _mean([one["distinct_masks"] for one in found]),
        "mask_entropy": _mean([one["mask_entropy"] for one in found]),
        "length_correlation": _mean_over_seeds(correlations),
        "layer_length_correlation": max(
            (value for value in layers if value is not None), key=abs, default=None
        ),
    }


def _asked(run: Mapping[str, Any]) -> float | None:
    """Return the rate asked for; None where it was the one trained for."""
    rated = run["policy"] in RATED and run["asked_skip_rate"] is None
    return None if rated else run["asked_skip_rate"] or 0.0


def _policy(arm: Arm, policy: str) -> dict[str, Any]:
    """Return what decided in a run, in the words of the summary, and whether LoRA was on."""
    routed = "length_only" if arm.train.reads == "length" else "first"
    trained_for = routed if arm.train.policy == "router" else arm.train.policy
    if policy == "base":
        return {"policy": "base", "lora": False, "lora_of": None}
    if policy == "run_all" and arm.train.skip_rate == 0:
        return {"policy": "base", "lora": arm.lora, "lora_of": "base" if arm.lora else None}
    shown = policy if policy in (*BASELINES, *DIAGNOSTICS) else trained_for
    return {"policy": shown, "lora": arm.lora, "lora_of": trained_for if arm.lora else None}


def _tpot_ratio(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean over runs of their time per token over that with all layers.

    `name`: value, their medians over prompts, p5 or p95.
    """
    return _known_mean([run["tpot_ratio"][name] for run in runs if run.get("tpot_ratio")])


def _spread(runs: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return the 5th and 95th percentile over prompts of `_tpot_ratio`."""
    low, high = (_tpot_ratio(runs, name) for name in ("p5", "p95"))
    return None if low is None or high is None else [low, high]


def _within(metric: str, score: Estimate) -> list[float]:
    """Return an interval, no further than a metric reaches: of few items it may be."""
    low, high = max(score.low, 0.0), score.high
    return [low, high if metric in UNBOUNDED else min(high, 100.0)]


def _mean_over_seeds(correlations: Sequence[float | None]) -> float | None:
    """Return a mean correlation, 0 for seeds in which nothing varies; None where none does."""
    if all(value is None for value in correlations):
        return None
    return _mean([value or 0.0 for value in correlations])


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
