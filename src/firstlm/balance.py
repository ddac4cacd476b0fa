# SPDX-License-Identifier: Apache-2.0
"""`firstlm balance`: several tasks in one artifact, each skipping as much as its own metric bears.

Some tasks lose quality sooner than others. Each is scored at several skip rates; then those rates
are chosen at which all keep the same share of their score, and that are the asked rate on average.
Routers are shifted to follow: they read from the prompt alone which task it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from firstlm import artifact, artifact_files
from firstlm.calibration import calibrate, serve_by_default
from firstlm.clusters import shift_groups
from firstlm.command_config import BalanceConfig
from firstlm.config import RATES
from firstlm.data import items_hash, prompt_batches, scored_examples
from firstlm.errors import ConfigError, DataError
from firstlm.evaluate import encode_rows, evaluate
from firstlm.examples import Example
from firstlm.journal import Journal
from firstlm.model import FirstModel
from firstlm.options import to_dict
from firstlm.policies import RouterPolicy
from firstlm.results import portable, provenance
from firstlm.tasks import Task, find_task

BISECTIONS = 60
LEAST = 16  # examples of a set
FREE = ("artifact", "model", "data", "output", "device")  # of no matter to what was answered


class Curve(NamedTuple):
    """What one task keeps of its score as layers go.

    Attributes:
        offsets: logit offsets, falling.
        rates: the task's own skip rates with them, rising.
        kept: its primary score over that with all layers.
    """

    offsets: list[float]
    rates: list[float]
    kept: list[float]


def measure(
    score: Callable[..., dict[str, Any]],
    primary: str,
    levels: Mapping[float, float],
) -> Curve:
    """Score one task with all layers, and at some asked rates.

    Args:
        score: `evaluate`, but for the policy and its skip rate.
        primary: the metric that counts.
        levels: skip rates to ask for, and the logit offset of each.

    Raises:
        DataError: the score with all layers is 0, so nothing can be kept of it.
    """
    full = score("run_all")[primary]["value"]
    if not full > 0:
        raise DataError(
            f"One of the sets has {primary} 0 with all layers, so what it keeps with fewer cannot "
            "be said. Use more examples of it (--limit), or train longer."
        )
    found = [score("router", level) for level in sorted(levels)]
    return Curve(
        [levels[level] for level in sorted(levels)],
        [result["skip_rate"]["mean"] for result in found],
        [result[primary]["value"] / full for result in found],
    )


def share(curves: Sequence[Curve], skip_rate: float) -> list[float]:
    """Return the skip rates at which all tasks keep alike, `skip_rate` on average.

    Between measured rates lines are drawn. What is kept never rises with the rate: a score that
    does so by chance counts as the one before.

    Raises:
        ConfigError: the average is outside what was measured.
    """
    lost = [1 - np.minimum.accumulate(curve.kept) for curve in curves]

    def rates_at(loss: float) -> np.ndarray:
        # A little of the rate itself, so that the loss rises along what is flat.
        found = [
            np.interp(loss, part + 1e-6 * np.array(curve.rates), curve.rates)
            for part, curve in zip(lost, curves, strict=True)
        ]
        return np.array(found)

    low, high = min(part[0] for part in lost), max(part[-1] for part in lost) + 1e-3
    least, most = rates_at(low).mean(), rates_at(high).mean()
    if not least - 0.01 <= skip_rate <= most + 0.01:
        raise ConfigError(
            f"skip_rate={skip_rate:g} is outside the {least:.2f} to {most:.2f} that were measured; "
            "ask for a rate in between, or name other --levels."
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rates_at(middle).mean() < skip_rate else (low, middle)
    return rates_at(high).tolist()


def balance(
    model: FirstModel,
    sets: Sequence[tuple[Sequence[Example], Task]],
    skip_rate: float,
    levels: Sequence[float],
    rates: Sequence[float] = RATES,
    *,
    prefill: str = "skip",
    batch_size: int = 16,
    max_new_tokens: int = 32,
    journals: Sequence[Journal] | None = None,
) -> list[dict[str, Any]]:
    """Let each task skip as much as its metric bears, and calibrate anew, in place.

    Of each task's prompts every other one shows routers what the task looks like; thresholds are
    measured on the others.

    Args:
        model: a model with routers and thresholds.
        sets: examples and task, two or more.
        skip_rate: share of layers to skip on average over the sets, which count alike.
        levels: skip rates to measure the tasks at; if some were never calibrated, they are now.
        rates: skip rates to calibrate.
        prefill: "skip" or "full".
        batch_size: prompts per batch.
        max_new_tokens: longest answer.
        journals: of each set, what an interrupted call has answered.

    Returns:
        For each set its curve, the rate that was `chosen` for it, and the one that prompts which
        routers have not seen get at `skip_rate` (`met`).
    """
    model.need_routers()
    prompts = [
        [row.prompt_ids for row in encode_rows(model, examples, max_new_tokens)]
        for examples, _ in sets
    ]
    shown, others = ([part[start::2] for part in prompts] for start in (0, 1))
    if not model.thresholds.serve(levels, prefill):
        calibrate(model, list(chain(*shown)), levels, [prefill], batch_size)
    how = {"prefill": prefill, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    offsets = {level: model.thresholds.offset(level, prefill) for level in levels}
    curves = []
    for (examples, task), journal in zip(sets, journals or [None] * len(sets), strict=True):
        score = partial(evaluate, model, examples, task=task, journal=journal, items=False, **how)
        curves.append(measure(score, task.primary, offsets))
    chosen = share(curves, skip_rate)
    shifts = [
        float(np.interp(rate, curve.rates, curve.offsets))
        for rate, curve in zip(chosen, curves, strict=True)
    ]
    labels = torch.tensor([i for i, part in enumerate(shown) for _ in part])
    shift_groups(model, list(chain(*shown)), labels, shifts, prefill)
    calibrate(model, list(chain(*others)), rates, batch_size=batch_size)
    serve_by_default(model, skip_rate, prefill)
    return [
        {**curve._asdict(), "chosen": rate, "met": _met(model, part, prefill, batch_size)}
        for curve, rate, part in zip(curves, chosen, others, strict=True)
    ]


@torch.no_grad()
def _met(
    model: FirstModel, prompts: Sequence[Sequence[int]], prefill: str, batch_size: int
) -> float:
    """Return the share of layers that prompts skip by default."""
    policy = RouterPolicy(model.routers)
    batches = prompt_batches(prompts, batch_size, model.pad_id)
    keep = [model.decide(*batch, policy, prefill=prefill).keep for batch in batches]
    return 1 - float(torch.cat(keep).float().mean())


def run(options: BalanceConfig) -> int:
    """Balance an artifact over data sets and save it elsewhere (`firstlm balance`)."""
    artifact_files.check_target(options.output)
    source = artifact_files.find(options.artifact)
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    skip_rate = options.skip_rate
    if skip_rate is None:
        skip_rate = model.training_record.get("run", {}).get("skip_rate")
    if not skip_rate:
        raise ConfigError(
            f"{options.artifact} does not say for which rate it was trained; name one with "
            "--skip-rate."
        )
    sets = []
    for source_of_rows in options.data:
        rows = scored_examples(source_of_rows, options.template, model.tokenizer, options.limit)
        if len(rows) < LEAST:
            raise DataError(
                f"{source_of_rows} has {len(rows)} examples; expected {LEAST} or more, of which "
                "half show what the task looks like and half are calibrated on."
            )
        sets.append((rows, find_task(rows)))
    asked = _compared(options)
    artifact_hash = artifact_files.content_hash(options.artifact)
    inputs = [
        {"data": portable(name), "items_sha256": items_hash(rows)}
        for name, (rows, _) in zip(options.data, sets, strict=True)
    ]
    journals = [
        Journal(
            Path(f"{options.output}.{i}.partial"),
            {**asked, **one, "artifact_sha256": artifact_hash},
        )
        for i, one in enumerate(inputs)
    ]
    rates = sorted(
        {
            skip_rate,
            *RATES,
            *(row.asked for rows in model.thresholds.table.values() for row in rows),
        }
    )
    found = balance(
        model,
        sets,
        skip_rate,
        options.levels,
        rates,
        prefill=options.prefill,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        journals=journals,
    )
    model.results = {}  # measured with other routers
    model.base_id = artifact_files.base_id(options.artifact)  # whatever copy of it is used here
    model.training_record["balance"] = {
        "options": asked,
        "artifact_sha256": artifact_hash,
        "skip_rate": skip_rate,
        "sets": [{**one, **part} for one, part in zip(inputs, found, strict=True)],
        "provenance": provenance(),
    }
    artifact.save(model, options.output, more_from=source)
    for journal in journals:
        journal.close()
    for name, (_, task), part in zip(options.data, sets, found, strict=True):
        print(_line(name, task, part))
    print(f"{skip_rate:.0%} on average. Saved the artifact to {options.output}.")
    return 0


def _compared(options: BalanceConfig) -> dict[str, Any]:
    """Return the options on which the result depends, other than artifact and data."""
    return {k: v for k, v in to_dict(options).items() if k not in FREE}


def changed_options(before: Mapping[str, Any], options: BalanceConfig) -> list[str]:
    """Return the options with which something else was made before."""
    now = _compared(options)
    return [name for name in now if name in before and now[name] != before[name]]


def _line(name: str, task: Task, part: dict[str, Any]) -> str:
    """Say what one task keeps at which rate, and which rate it got."""
    points = zip(part["rates"], part["kept"], strict=True)
    kept = ", ".join(f"{share:.0%} at {rate:.0%}" for rate, share in points)
    rate = f"skips {part['met']:.1%} ({part['chosen']:.1%} wanted)"
    return f"{name}: {rate}; {task.primary} keeps {kept}"
