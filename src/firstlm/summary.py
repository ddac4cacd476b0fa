# SPDX-License-Identifier: Apache-2.0
"""One row per arm, policy and skip rate over all seeds, from the results of experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from firstlm.config import BASELINES, DIAGNOSTICS, RATED
from firstlm.masks import (
    describe_masks,
    from_bits,
    layer_length_correlations,
    length_correlation,
)
from firstlm.metrics import Estimate, over_seeds
from firstlm.scored import Arm, base_seeds, formats_differ, mean

# Below this the reference itself has hardly learnt the task: a share of it would mean nothing.
LOWEST = {"bleu": 5.0, "f1": 20.0}
UNBOUNDED = ("perplexity",)  # the others are percentages


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
                        "skip_rate": mean([run["skip_rate"]["mean"] for run in runs]),
                        "skip_rate_p5": mean([run["skip_rate"]["p5"] for run in runs]),
                        "skip_rate_p95": mean([run["skip_rate"]["p95"] for run in runs]),
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
                        "reference_score": mean([s.value for s in base]) if kept else None,
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
    return mean([one.value for one in arm.scores("run_all")[arm.task.primary].values()])


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
                same_masks = mean(
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
        "distinct_masks": mean([one["distinct_masks"] for one in found]),
        "mask_entropy": mean([one["mask_entropy"] for one in found]),
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
    return mean([value or 0.0 for value in correlations])


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None
