# SPDX-License-Identifier: Apache-2.0
"""`firstlm balance`: several tasks in one artifact, each skipping as much as its own metric bears.

Some tasks lose quality sooner than others. Each is scored at several skip rates; then those rates
are chosen at which all keep the same share of their score, and that are the asked rate on average.
Routers are shifted to follow: they read from the prompt alone which task it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from firstlm import artifact, artifact_files
from firstlm.calibration import calibrate, serve_by_default
from firstlm.clusters import shift_groups
from firstlm.command_config import BalanceConfig
from firstlm.config import RATES
from firstlm.data import items_hash, scored_examples
from firstlm.errors import ConfigError, DataError
from firstlm.evaluate import encode_rows, evaluate
from firstlm.examples import Example
from firstlm.journal import Journal
from firstlm.model import FirstModel
from firstlm.options import to_dict
from firstlm.policies import RouterPolicy
from firstlm.probes import decide_all
from firstlm.results import portable, provenance
from firstlm.rows import check_sources
from firstlm.tasks import Task, find_task

T = TypeVar("T")
BISECTIONS = 60
NEAR = 0.02  # how far outside the levels an average may be asked for
LEAST = 16  # examples of a set
# Options that do not change what comes out, or that say where things lie.
FREE = ("artifact", "model", "data", "output", "device")


class TaskSet(NamedTuple):
    """Examples of one task, by a name for messages, and how they are scored."""

    name: str
    examples: Sequence[Example]
    task: Task


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
    if not least - NEAR <= skip_rate <= most + NEAR:
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
    sets: Sequence[TaskSet],
    skip_rate: float,
    levels: Sequence[float],
    rates: Sequence[float] = RATES,
    *,
    prefill: str = "skip",
    batch_size: int = 16,
    max_new_tokens: int = 32,
    journal: Callable[[int, str, dict[str, Any]], Journal] | None = None,
) -> list[dict[str, Any]]:
    """Let each task skip as much as its metric bears, and calibrate anew, in place.

    Half of each task's prompts show routers what the task looks like, and thresholds are measured
    on the others. Prompts on one text (`Example.group`) are in the same half.

    Args:
        model: a model with routers and thresholds.
        sets: one a task, two or more, which count alike whatever their sizes.
        skip_rate: share of layers to skip on average over the sets.
        levels: skip rates to measure the tasks at; if some were never calibrated, they are now.
        rates: skip rates to calibrate.
        prefill: "skip" or "full".
        batch_size: prompts per batch.
        max_new_tokens: longest answer.
        journal: makes what keeps a run's answers for an interrupted call, from the number of the
            set, the run's name, and all that the answers depend on besides the options.

    Returns:
        For each set its curve, the rate that was `chosen` for it, and the one that prompts which
        routers have not seen get at `skip_rate` (`met`).

    Raises:
        ConfigError: no average of the levels is `skip_rate`.
        DataError: a set scores 0 with all layers, so nothing can be kept of it.
    """
    model.need_routers()
    levels = sorted(levels)
    if not levels[0] - NEAR <= skip_rate <= levels[-1] + NEAR:
        raise ConfigError(
            f"skip_rate={skip_rate:g} is outside the levels {levels[0]:g} to {levels[-1]:g}; ask "
            "for a rate in between, or name other --levels."
        )
    halves = [_halves(one, encode_rows(model, one.examples, max_new_tokens)) for one in sets]
    shown, others = _alike([half[0] for half in halves]), _alike([half[1] for half in halves])
    if not model.thresholds.serve(levels, prefill):
        calibrate(model, list(chain(*shown)), levels, [prefill], batch_size)
    offsets = {level: model.thresholds.offset(level, prefill) for level in levels}

    def score(number: int, name: str, policy: str, level: float | None = None) -> dict[str, Any]:
        depends = {"offset": offsets.get(level or 0), "weights": str(model.base.dtype)}
        return evaluate(
            model,
            sets[number].examples,
            policy,
            level,
            task=sets[number].task,
            prefill=prefill,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            items=False,
            perplexity=False,
            journal=journal(number, name, depends) if journal else None,
        )

    curves = _curves(sets, offsets, score)
    chosen = share(curves, skip_rate)
    shifts = [
        float(np.interp(rate, curve.rates, curve.offsets))
        for rate, curve in zip(chosen, curves, strict=True)
    ]
    labels = torch.tensor([i for i, part in enumerate(shown) for _ in part])
    shift_groups(model, list(chain(*shown)), labels, shifts, prefill)
    calibrate(model, list(chain(*others)), rates, batch_size=batch_size)
    serve_by_default(model, skip_rate, prefill)
    policy = RouterPolicy(model.routers)
    keep = [decide_all(model, half[1], policy, prefill, batch_size) for half in halves]
    return [
        {**curve._asdict(), "chosen": rate, "met": 1 - float(part.float().mean())}
        for curve, rate, part in zip(curves, chosen, keep, strict=True)
    ]


def _curves(
    sets: Sequence[TaskSet], offsets: Mapping[float, float], score: Callable[..., dict[str, Any]]
) -> list[Curve]:
    """Return each set's curve; those with fewer layers are not asked for before all can have one.

    Args:
        sets: the tasks.
        offsets: logit offsets by asked rate, rates rising.
        score: returns what `evaluate` does, from a set's number, the run's name, policy and rate.
    """
    full = []
    for number, one in enumerate(sets):
        full.append(score(number, "run_all", "run_all")[one.task.primary]["value"])
        if not full[-1] > 0:
            raise DataError(
                f"{one.name} has {one.task.primary} 0 with all layers, so what it keeps with fewer "
                "cannot be said. Use more examples of it (--limit), or train longer."
            )
    curves = [Curve([], [], []) for _ in sets]
    for number, (one, curve) in enumerate(zip(sets, curves, strict=True)):
        for level, offset in offsets.items():
            found = score(number, f"router@{level:g}", "router", level)
            if not curve.rates or found["skip_rate"]["mean"] > curve.rates[-1]:
                curve.offsets.append(offset)
                curve.rates.append(found["skip_rate"]["mean"])
                curve.kept.append(found[one.task.primary]["value"] / full[number])
    return curves


def _halves(one: TaskSet, rows: Sequence[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Return a set's prompts in two halves; those on one text go together, if there are several."""
    names = [example.group for example in one.examples]
    if len(set(names)) == 1:
        names = [str(i) for i in range(len(names))]
    halves: tuple[list[list[int]], list[list[int]]] = ([], [])
    for name in dict.fromkeys(names):
        smaller = min(halves, key=len)
        smaller += [row.prompt_ids for row, its in zip(rows, names, strict=True) if its == name]
    return halves


def _alike(parts: Sequence[Sequence[T]]) -> list[list[T]]:
    """Return parts of equal lengths, shorter ones repeated, so that they count alike."""
    longest = max(map(len, parts))
    return [list(islice(cycle(part), longest)) for part in parts]


def run(options: BalanceConfig) -> int:
    """Balance an artifact over data sets and save it elsewhere (`firstlm balance`)."""
    artifact_files.check_target(options.output)
    source = artifact_files.find(options.artifact)
    check_sources(*options.data)
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    model.need_routers()
    trained = model.training_record.get("run", {}).get("skip_rate")
    if trained == 0:
        raise ConfigError(
            f"{options.artifact} was trained with --skip-rate 0, LoRA alone, so its routers were "
            "not; expected an artifact that skips layers."
        )
    skip_rate = options.skip_rate or trained
    if skip_rate is None:
        raise ConfigError(
            f"{options.artifact} does not say for which rate it was trained; name one with "
            "--skip-rate."
        )
    sets = [_task_set(name, options, model) for name in options.data]
    asked = _compared(options)
    artifact_hash = artifact_files.content_hash(options.artifact)
    inputs = [
        {"data": portable(one.name), "items_sha256": items_hash(one.examples)} for one in sets
    ]
    answers = {k: asked[k] for k in ("prefill", "batch_size", "max_new_tokens")}
    journals: list[Journal] = []

    def journal(number: int, name: str, depends: dict[str, Any]) -> Journal:
        file = Path(f"{options.output.rstrip('/')}.{number}.{name}.partial")
        work = {**answers, **inputs[number], "artifact_sha256": artifact_hash, **depends}
        journals.append(Journal(file, work))
        return journals[-1]

    known = [row.asked for rows in model.thresholds.table.values() for row in rows]
    found = balance(
        model,
        sets,
        skip_rate,
        options.levels,
        sorted({skip_rate, *RATES, *known}),
        prefill=options.prefill,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        journal=journal,
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
    for one in journals:
        one.close()
    for one, part in zip(sets, found, strict=True):
        print(_line(one, part))
    met = np.mean([part["met"] for part in found])
    print(f"{met:.1%} on average ({skip_rate:.1%} asked). Saved the artifact to {options.output}.")
    return 0


def _task_set(name: str, options: BalanceConfig, model: FirstModel) -> TaskSet:
    """Read one of the data sets."""
    rows = scored_examples(name, options.template, model.tokenizer, options.limit)
    if len(rows) < LEAST:
        raise DataError(
            f"{name} has {len(rows)} examples; expected {LEAST} or more, of which half show what "
            "the task looks like and half are calibrated on."
        )
    return TaskSet(name, rows, find_task(rows, options.task, options.template))


def _compared(options: BalanceConfig) -> dict[str, Any]:
    """Return the options on which the result depends, other than artifact and data."""
    return {k: v for k, v in to_dict(options).items() if k not in FREE}


def changed_options(before: Mapping[str, Any], options: BalanceConfig) -> list[str]:
    """Return the options with which something else was made before (`balance` of its record)."""
    now, made = _compared(options), before["options"]
    found = [name for name in now if name in made and now[name] != made[name]]
    data = [one["data"] for one in before["sets"]]
    return found + ["data"] * (data != [portable(name) for name in options.data])


def _line(one: TaskSet, part: dict[str, Any]) -> str:
    """Say what one task keeps at which rate, and which rate it got."""
    points = zip(part["rates"], part["kept"], strict=True)
    kept = ", ".join(f"{share:.0%} at {rate:.0%}" for rate, share in points)
    rate = f"skips {part['met']:.1%} ({part['chosen']:.1%} wanted)"
    return f"{one.name}: {rate}; {one.task.primary} keeps {kept}"
