# SPDX-License-Identifier: Apache-2.0
"""`firstlm eval`: score an artifact under several policies, into one file that can be added to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from firstlm import artifact_files
from firstlm.bertscore import BertScore
from firstlm.command_config import EvalConfig
from firstlm.config import RATED
from firstlm.data import items_hash, scored_examples
from firstlm.errors import ConfigError
from firstlm.eval_policies import choose, own_policy, run_name
from firstlm.evaluate import encode_rows, evaluate
from firstlm.examples import Example
from firstlm.journal import Journal
from firstlm.lora import is_lora
from firstlm.metrics import Scores, grouped, over_seeds
from firstlm.model import FirstModel
from firstlm.options import to_dict
from firstlm.pretrained import resolve_encoder
from firstlm.results import check_file, portable, provenance, sha256_of, to_json, write_json
from firstlm.rows import check_sources
from firstlm.scoreboard import read, summary, table
from firstlm.tasks import Task, find_task

# Options that change no number of a run that is done, or that are compared by content instead.
FREE_OPTIONS = (
    "artifact",
    "data",
    "output",
    "record",
    "policies",
    "skip_rates",
    "timed",
    "perplexity",
    "device",
)
PATHS = ("artifact", "data")  # where inputs lay; what they hold is compared by hashes


def run(options: EvalConfig) -> int:
    """Score an artifact on a task (`firstlm eval`)."""
    check_file(options.output)
    recorded_in = None
    if options.record:
        recorded_in = artifact_files.local_folder(
            options.artifact,
            "scores cannot be written into it",
            "leave --record out, or copy the artifact to a folder of your own",
        )
    check_sources(options.data)
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    examples = scored_examples(options.data, options.template, model.tokenizer, options.limit)
    task = find_task(examples, options.task, options.template)
    decides = model.baseline or model.has_routers
    asked = _asked(options, own_policy(model) if decides else None)
    for policy, rate in asked:  # an impossible rate is refused before anything is run
        choose(model, policy, rate, options.prefill, options.seed)
    encode_rows(model, examples, options.max_new_tokens)
    with _alone(options.output):
        report = _score(options, model, examples, task, asked)
    print(table(report))
    if recorded_in is not None:
        artifact_files.record(recorded_in, task.name, summary(report))
    return 0


@contextmanager
def _alone(output: str | None) -> Iterator[None]:
    """Keep other processes from writing results into the same file."""
    if output is None:
        yield
        return
    lock = Path(output).parent / ".locks" / f"{Path(output).name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"Another evaluation writes into {output}. Wait for it, or name another --output."
        ) from None
    with held:
        yield


def _score(
    options: EvalConfig,
    model: FirstModel,
    examples: Sequence[Example],
    task: Task,
    asked: Sequence[tuple[str, float | None]],
) -> dict[str, Any]:
    """Score the policies that are asked for, as far as --output does not hold them yet."""
    bert_score = None
    if options.bert_model is not None:
        bert_score = BertScore(resolve_encoder(options.bert_model), str(model.device))
    report = _start(options, model, examples, task)
    scored: dict[str, Scores] = {}
    journal = Journal(
        Path(f"{options.output}.partial") if options.output else None,
        {k: v for k, v in {**report["options"], **report["inputs"]}.items() if k not in PATHS},
    )
    if journal.dropped:
        print(f"{journal.path} holds answers under other options or of other weights; not used.")
    for policy, rate in asked:
        name = run_name(policy, rate)
        before = report["runs"].get(name, {})
        if before:
            if holds(before, options):
                print(f"{name}: done before, taken from {options.output}")
                continue
            print(f"{name}: done before with less than is asked for now; scored anew")
            scored.pop(name, None)
        try:
            result = evaluate(
                model,
                examples,
                policy,
                rate,
                task=task,
                prefill=options.prefill,
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
                timed=max(options.timed, before.get("timed", 0)),
                seed=options.seed,
                perplexity=options.perplexity or "perplexity" in before,
                bert_score=bert_score,
                journal=journal,
            )
        except KeyboardInterrupt:
            if options.output is not None:
                print(
                    f"{options.output} lacks {name} and what comes after it; the same command "
                    "goes on."
                )
            raise
        result["provenance"] = provenance(seed=options.seed)
        report["runs"][name] = result
        report["of_run_all"] = _of_run_all(report["runs"], examples, task, scored, options.seed)
        if options.output is not None:
            report["provenance"] = provenance(seed=options.seed, **report["inputs"])
            write_json(options.output, report)
        journal.close(f"{name} ")
    return report


def _start(
    options: EvalConfig, model: FirstModel, examples: Sequence[Example], task: Task
) -> dict[str, Any]:
    """Return a new report, or what --output holds of the same one."""
    compared = compared_options(options)
    inputs = {
        "artifact": options.artifact,
        "artifact_sha256": _model_hash(model),
        "weights": str(model.base.dtype),
        "data": portable(options.data),
        "data_sha256": _data_hash(options.data, examples),
        "items_sha256": items_hash(examples),
    }
    report = {
        "task": task.name,
        "primary": task.primary,
        "options": compared,
        "inputs": inputs,
        "training": model.training_record,
        "base_model": model.base_id,
        "lora": model.has_adapter,
        "runs": {},
        "of_run_all": {},
    }
    old = read(Path(options.output)) if options.output else None
    if old is None:
        return report
    before = {**old["options"], **old["inputs"]}
    report["runs"], report["of_run_all"] = old["runs"], old.get("of_run_all", {})
    now = {**compared, **inputs}
    other = [k for k in now if k not in PATHS and now[k] != before.get(k)]
    if other:
        raise ConfigError(
            f"{options.output} holds results for other inputs ({', '.join(other)}). Remove it, "
            "name another --output, or repeat the options to add runs to it."
        )
    return report


def _asked(options: EvalConfig, own: str | None) -> list[tuple[str, float | None]]:
    """Return each policy with each rate at which it is scored.

    `own` is what decides in the artifact, if anything does: it is scored where no policy is named.
    """
    usual = ("base", "run_all", *([own] if own else ()))
    asked: list[tuple[str, float | None]] = []
    for policy in dict.fromkeys(options.policies or usual):
        rates = dict.fromkeys(options.skip_rates or [None]) if policy in RATED else (None,)
        asked += [(policy, rate) for rate in rates]
    return asked


def run_names(options: EvalConfig) -> list[str]:
    """Return the names under which results hold what these options ask for; they name policies."""
    return [run_name(policy, rate) for policy, rate in _asked(options, "router")]


def holds(run: Mapping[str, Any], options: EvalConfig) -> bool:
    """Return whether a run was scored in all that these options ask for."""
    if options.perplexity and "perplexity" not in run:
        return False
    return run.get("timed", options.timed) >= options.timed  # not told before 2026-11-28


def compared_options(options: EvalConfig) -> dict[str, Any]:
    """Return the options that results hold, and that must be the same to add to them."""
    return {k: v for k, v in to_dict(options).items() if k not in FREE_OPTIONS}


def _of_run_all(
    runs: dict[str, Any],
    examples: Sequence[Example],
    task: Task,
    scored: dict[str, Scores],
    seed: int,
) -> dict[str, Any]:
    """Return each run's primary score over that of run_all, on the same items.

    `scored` keeps the primary scores of runs from call to call.
    """
    if "run_all" not in runs:
        return {}
    references = [example.references for example in examples]
    for name in runs.keys() - scored.keys():
        predictions = [item["prediction"] for item in runs[name]["items"]]
        scored[name] = task.score(predictions, references)[task.primary]
    groups = grouped([example.group for example in examples])
    found = {
        name: over_seeds([scored[name]], [scored["run_all"]], groups=groups, seed=seed)
        for name in runs
        if name != "run_all"
    }
    return {name: asdict(value) for name, value in found.items()}


def _model_hash(model: FirstModel) -> str:
    """Return a hash of routers, thresholds and adapter: what an artifact adds to its base."""
    baseline = asdict(model.baseline) if model.baseline else None
    decides = {"thresholds": model.thresholds.table, "policy": baseline}
    digest = hashlib.sha256(to_json(decides).encode())
    for name, tensor in model.named_parameters():
        if name.startswith("routers.") or is_lora(name):
            # In float32, so that the number format in which it is loaded makes no difference.
            values = tensor.detach().float().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _data_hash(source: str, examples: Sequence[Example]) -> str:
    return sha256_of(source) if Path(source).is_file() else items_hash(examples)
