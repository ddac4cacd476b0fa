# SPDX-License-Identifier: Apache-2.0
"""What the measurements of `firstlm diagnose` mean: limits, levels, and the printed report.

Correctness (no-skip identity, KV consistency, layer calls, masks) can FAIL, and then the exit code
is 1. Signs of failed training are named as WARN: stuck near 0.5, the same mask for every input,
quality below a floor, skips that don't become time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

STUCK_WIDTH, STUCK_SHARE = 0.05, 0.9  # rho within 0.5 +- width, in that share of decisions
SAME_MASK_SHARE = 0.9  # of prompts with the commonest mask
QUALITY_LIMIT, QUALITY_NATS = 0.25, 0.05  # rise of the answer's cross-entropy: relative, absolute
TIME_SHARE = 0.5  # of the skipped layer time that must be saved
RATE_LIMIT = 0.02  # between asked and measured skip rate, besides chance
FLIP_LIMIT = 0.05  # distance from the threshold (logit) up to which rounding may flip a decision
# Norm of the difference over the norm of the centred logits; a wrong cache gives 1 and more.
# 16-bit weights are judged as float32, and as loaded only roughly: rounding alone gives 0.2 there.
TOLERANCE = {
    "torch.float64": 1e-8,
    "torch.float32": 5e-3,
    "torch.float16": 0.5,
    "torch.bfloat16": 0.5,
}
BARS = " ▁▂▃▄▅▆▇█"
Flip = tuple[int, int, float]  # row, layer, distance from the threshold


@dataclass(frozen=True)
class Check:
    """One line of the report; level is ok, WARN, FAIL, or n/a where it could not be measured."""

    name: str
    level: str
    text: str


def judge(numbers: dict[str, Any], asked: float | None) -> list[Check]:
    """Return the checks of one model.

    Args:
        numbers: what `diagnose` measured.
        asked: the skip rate that was asked for, or None for the trained threshold.
    """
    return [
        _identity(numbers["identity"]),
        *_kv(numbers["kv"]),
        _flips(
            numbers["mask_flips"],
            numbers["mask_flips_as_loaded"],
            numbers["kv"]["routers"]["rows"],
        ),
        *_routers(numbers["routers"], asked),
        _quality(numbers["quality"]),
        _time(numbers["time"]),
    ]


def _identity(found: dict[str, Any]) -> Check:
    name = "no-skip identity"
    worst = max(found["max_abs_difference"], found["max_abs_difference_cached"])
    if not (found["routers_asked"] and found["all_kept"]):
        return Check(name, "FAIL", "routers with a huge offset did not keep every layer (nan?)")
    text = (
        f"logits with routers on and all layers kept against the base model: max |difference| "
        f"{found['max_abs_difference']:.3g} over {found['prompts']} prompts, "
        f"{found['max_abs_difference_cached']:.3g} in cached decoding (expected exactly 0)"
    )
    return Check(name, "ok" if worst == 0 else "FAIL", text)


def _kv(found: dict[str, dict[str, Any]]) -> list[Check]:
    checks = []
    for name, run in found.items():
        dtype = run["dtype"].removeprefix("torch.")
        limit = TOLERANCE.get(run["dtype"], TOLERANCE["torch.bfloat16"])
        wrong = run["relative_difference"] > limit
        text = (
            f"{name}: {run['steps']} steps, {run['rows']} rows{', padded' * run['padded']}, "
            f"{run['skip_rate']:.0%} skipped; cached against recomputed logits differ by "
            f"{run['relative_difference']:.2g} of their norm (up to {limit:g} in {dtype} is "
            f"rounding), max |difference| {run['max_abs_difference']:.2g}"
        )
        checks.append(Check("KV consistency", "FAIL" if wrong else "ok", text))
    problems = [f"{name}: {text}" for name, run in found.items() for text in run["problems"]]
    counted = sum(sum(run["layer_calls"].values()) for run in found.values())
    text = f"{counted} calls, each kept layer once a step on one new token, no skipped layer"
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        text = "; ".join(problems[:3]) + more
    return [*checks, Check("layer calls", "FAIL" if problems else "ok", text)]


def _flips(flips: list[Flip], as_loaded: list[Flip] | None, rows: int) -> Check:
    far = [flip for flip in flips if flip[2] > FLIP_LIMIT]
    text = f"{rows - len(flips)} of {rows} prompts get the same mask alone as in a padded batch"
    if flips:
        text += f"; the first decisions that differ are up to {max(f[2] for f in flips):.2g} from "
        text += f"the threshold (logit; up to {FLIP_LIMIT} is rounding)"
    if as_loaded is not None:
        text += f"; {len(as_loaded)} differ in the 16-bit weights as loaded, which is rounding"
    return Check("same mask alone", "FAIL" if far else "ok", text)


def _routers(found: dict[str, Any], asked: float | None) -> list[Check]:
    stuck = found["near_half"] >= STUCK_SHARE
    checks = [
        Check(
            "stuck near 0.5",
            "WARN" if stuck else "ok",
            f"{found['near_half']:.0%} of rho lie within 0.5 +- {STUCK_WIDTH} (a sign of untrained "
            f"routers from {STUCK_SHARE:.0%} on)",
        )
    ]
    rate = found["skip_rate"]
    same = found["commonest_mask_share"] >= SAME_MASK_SHARE
    level, more = ("WARN", "") if same else ("ok", "")
    if same and rate["mean"] in (0, 1):
        more = f"; {'nothing' if rate['mean'] == 0 else 'everything'} is skipped"
    text = (
        f"{found['distinct_masks']} masks for {found['prompts']} prompts, the commonest for "
        f"{found['commonest_mask_share']:.0%} (a sign from {SAME_MASK_SHARE:.0%} on), "
        f"{found['mask_entropy']:.2f} bits per mask{more}"
    )
    checks.append(Check("same mask for every input", level, text))
    text = f"{rate['mean']:.1%} skipped per prompt, 5th to 95th percentile {rate['p5']:.0%} to "
    text += f"{rate['p95']:.0%}"
    correlation = found["length_correlation"]
    if correlation is not None:
        text += f", correlation with prompt length {correlation:+.2f}"
    missed = False
    if asked is not None:
        chance = 2 * rate["std"] / math.sqrt(found["prompts"])
        missed = abs(rate["mean"] - asked) > RATE_LIMIT + chance
        text += (
            f"; asked for {asked:.0%}, met within {100 * (RATE_LIMIT + chance):.1f} points"
            if (not missed)
            else f"; asked for {asked:.0%}, missed by more than chance: calibrate on such prompts"
        )
    return [*checks, Check("skip rate", "WARN" if missed else "ok", text)]


def _quality(found: dict[str, Any] | None) -> Check:
    name = "quality below a floor"
    if found is None:
        return Check(name, "n/a", "needs answers: name rows with --data")
    gap = found["ce_routed"] - found["ce_run_all"]
    low = not (found["increase"] <= QUALITY_LIMIT or gap <= QUALITY_NATS)
    text = (
        f"cross-entropy of {found['answers']} answers {found['ce_routed']:.3f} routed, "
        f"{found['ce_run_all']:.3f} with all layers: {found['increase']:+.0%} (floor: up to "
        f"{QUALITY_LIMIT:+.0%}, or {QUALITY_NATS} nats)"
    )
    return Check(name, "WARN" if low else "ok", text)


def _time(found: dict[str, Any] | None) -> Check:
    name = "skips that don't become time"
    if found is None:
        return Check(name, "n/a", "nothing is skipped")
    text = (
        f"decode step {found['run_all_ms']:.2f} ms with all layers, {found['routed_ms']:.2f} ms "
        f"routed with {found['skip_rate']:.0%} skipped: saved {found['saved_ms']:.2f} of "
        f"{found['ideal_saved_ms']:.2f} ms of skipped layer time "
        f"({found['saved_of_ideal']:.0%}; a sign below {TIME_SHARE:.0%})"
    )
    if not found["ideal_saved_ms"] > 2 * found["error_ms"]:
        return Check(name, "n/a", text + "; too noisy to tell, run it on a quiet machine")
    return Check(name, "WARN" if found["saved_of_ideal"] < TIME_SHARE else "ok", text)


def table(report: dict[str, Any]) -> str:
    """Return a report as text: the routers layer by layer, then one line a check."""
    found = report["routers"]
    top = max(max(counts) for counts in found["rho_histogram"])
    lines = [
        f"rho over {found['prompts']} prompts; a layer runs where rho >= {found['threshold']:.3f}",
        f"{'layer':>5}{'mean':>8}{'std':>8}{'skipped':>9}   rho 0 to 1",
    ]
    for layer, counts in enumerate(found["rho_histogram"]):
        bars = "".join(BARS[math.ceil(count / top * (len(BARS) - 1))] for count in counts)
        lines.append(
            f"{layer:>5}{found['rho_mean'][layer]:>8.3f}{found['rho_std'][layer]:>8.3f}"
            f"{found['layer_skip_share'][layer]:>9.0%}   |{bars}|"
        )
    lines.append("")
    lines += [f"{c['level']:<5}{c['name']}: {c['text']}" for c in report["checks"]]
    failed = sum(c["level"] == "FAIL" for c in report["checks"])
    warned = sum(c["level"] == "WARN" for c in report["checks"])
    verdict = "sound" if not failed else f"not sound: {failed} checks failed"
    return "\n".join([*lines, f"{verdict}; {warned} warnings"])
