# SPDX-License-Identifier: Apache-2.0
"""Score a model's greedy answers to questions, as the base, with all layers, and routed.

Owns the run over a data set, its table and its file of results; scores come from `metrics`, and
what a policy is, only `FirstModel` knows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from firstlm import artifact
from firstlm.config import EVAL_POLICIES, EvalConfig
from firstlm.data import TEMPLATES, check_room, encode_prompt, pad_left
from firstlm.errors import ConfigError, DataError
from firstlm.examples import Example, load_examples
from firstlm.lora import is_lora
from firstlm.metrics import Estimate, retention, score_qa
from firstlm.model import FirstModel, GenerateOutput
from firstlm.options import to_dict
from firstlm.policies import Policy, RunAll
from firstlm.results import provenance, sha256_of, to_json, write_json

# Options that change no number of a run that is done, or that are compared by content instead.
FREE_OPTIONS = ("artifact", "data", "output", "record", "policies", "skip_rates", "device")


def evaluate_qa(
    model: FirstModel,
    examples: Sequence[Example],
    policy: str | Policy = "router",
    skip_rate: float | None = None,
    *,
    prefill: str = "skip",
    batch_size: int = 16,
    max_new_tokens: int = 32,
    seed: int = 0,
    progress: bool = True,
    items: bool = True,
) -> dict[str, Any]:
    """Answer every example greedily under one policy, and score the answers.

    Args:
        model: a model with its tokenizer.
        examples: what to answer; answers are compared with each example's `references`.
        policy: "base" (adapter off, all layers), "run_all" (adapter on, all layers), "router", or a
            policy object.
        skip_rate: share of layers to skip, for "router" only; None is the trained threshold.
        prefill: "skip" or "full".
        batch_size: prompts per batch; batches hold prompts of similar length.
        max_new_tokens: longest answer; an answer also ends at its first line break.
        seed: seed of the bootstrap.
        progress: show a progress bar.
        items: put every answer with its scores and mask into the result.

    Returns:
        One JSON object: em and f1 in percent with their 95% intervals, skip rates per prompt and
        layer, number of distinct masks, layer calls, and the items in the order of `examples`.
    """
    if not examples:
        raise DataError("There are no examples to score.")
    name = _name(policy, skip_rate)
    chosen, scope = _choose(model, policy, skip_rate, prefill)
    prompts = _prompts(model, examples, max_new_tokens)
    model.eval()
    start = time.perf_counter()
    with scope, tqdm(total=len(prompts), desc=name, unit="prompt", disable=not progress) as bar:
        answers, keep, calls, steps = _answer_all(
            model, prompts, chosen, prefill, max_new_tokens, batch_size, bar
        )
    seconds = time.perf_counter() - start
    scores = score_qa(answers, [example.references for example in examples])
    result = {
        "policy": policy if isinstance(policy, str) else type(policy).__name__,
        "asked_skip_rate": skip_rate,
        "prefill": prefill,
        "count": len(examples),
        **{metric: asdict(value) for metric, value in scores.summary(seed).items()},
        **_masks(keep),
        "layer_calls": calls,
        "decode_steps": steps,
        "batch_size": batch_size,
        "seconds": seconds,
    }
    if items:
        result["items"] = [
            {
                "id": example.id,
                "prediction": answers[i],
                "em": int(scores.em[i]),
                "f1": round(scores.f1[i], 4),
                "keep": "".join("1" if kept else "0" for kept in keep[i].tolist()),
            }
            for i, example in enumerate(examples)
        ]
    return result


def first_line(text: str) -> str:
    """Return an answer's first line, blanks and line breaks before it left out."""
    return text.lstrip().split("\n", 1)[0].rstrip()


class _EndOfLine(StoppingCriteria):
    """Ends a row as soon as its first line is complete: what follows is not scored."""

    def __init__(self, tokenizer: Any, prompt_length: int) -> None:
        self.tokenizer, self.prompt_length = tokenizer, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_length :].tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _answer_all(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    prefill: str,
    max_new_tokens: int,
    batch_size: int,
    bar: tqdm,
) -> tuple[list[str], torch.Tensor, dict[str, int], int]:
    """Answer all prompts, long ones first; return answers, keep, layer calls and decode steps."""
    answers = [""] * len(prompts)
    keep = torch.ones(len(prompts), model.layer_count, dtype=torch.bool)
    calls, steps = {"prefill": 0, "decode": 0}, 0
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        batch = [prompts[i] for i in picked]
        output, texts = _answer(model, batch, policy, prefill, max_new_tokens)
        for row, i in enumerate(picked):
            answers[i], keep[i] = texts[row], output.keep[row]
        calls = {phase: calls[phase] + output.layer_calls[phase] for phase in calls}
        steps += output.sequences.shape[1] - max(map(len, batch)) - 1
        bar.update(len(picked))
    return answers, keep, calls, steps


def _answer(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    prefill: str,
    max_new_tokens: int,
) -> tuple[GenerateOutput, list[str]]:
    """Generate for one batch; returns the output and each row's answer."""
    tokenizer: Any = model.tokenizer
    ids, mask = pad_left(prompts, model.pad_id)
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        policy=policy,
        prefill=prefill,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=model.pad_id,
        stopping_criteria=StoppingCriteriaList([_EndOfLine(tokenizer, ids.shape[1])]),
    )
    new = output.sequences[:, ids.shape[1] :].tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    return output, [first_line(text) for text in texts]


def _choose(
    model: FirstModel, policy: str | Policy, skip_rate: float | None, prefill: str
) -> tuple[Policy, Any]:
    """Return the policy object, and the scope in which it is measured."""
    if policy == "router":
        return model.policy_for(skip_rate, prefill), nullcontext()
    if skip_rate is not None:
        raise ConfigError(f"skip_rate={skip_rate} is for policy='router'; {policy!r} has none.")
    if not isinstance(policy, str):
        return policy, nullcontext()
    known = {"base": (RunAll, model.disable_adapter), "run_all": (RunAll, nullcontext)}
    if policy not in known:
        raise ConfigError(f"policy is {policy!r}; expected one of {', '.join(EVAL_POLICIES)}.")
    make, scope = known[policy]
    return make(), scope()


def _prompts(
    model: FirstModel, examples: Sequence[Example], max_new_tokens: int
) -> list[list[int]]:
    tokenizer = model.need_tokenizer()
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    for example, ids in zip(examples, prompts, strict=True):
        where = f"{example.where or 'example'} (id {example.id})"
        check_room(ids, max_new_tokens, model.context_length, where)
    return prompts


def _masks(keep: torch.Tensor) -> dict[str, Any]:
    """Describe the masks [prompts, layers] of a run."""
    rates = 1 - keep.double().mean(1).numpy()
    low, high = np.percentile(rates, [5, 95])
    return {
        "skip_rate": {"mean": float(rates.mean()), "p5": float(low), "p95": float(high)},
        "layer_skip_share": [round(x, 4) for x in (~keep).double().mean(0).tolist()],
        "distinct_masks": len(torch.unique(keep, dim=0)),
    }


def _name(policy: str | Policy, skip_rate: float | None) -> str:
    """Return the name of a run, such as base or router@0.25."""
    kind = policy if isinstance(policy, str) else type(policy).__name__
    return kind if skip_rate is None else f"{kind}@{skip_rate:g}"


def run(options: EvalConfig) -> int:
    """Score an artifact on a question answering set (`firstlm eval`)."""
    _check_template(options.template)
    recorded_in = None
    if options.record:
        recorded_in = artifact.local_folder(
            options.artifact,
            "scores cannot be written into it",
            "leave --record out, or copy the artifact to a folder of your own",
        )
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    examples = load_examples(
        options.data, template=options.template, tokenizer=model.tokenizer, limit=options.limit
    )
    _check_task(examples)
    asked: list[tuple[str, float | None]] = []
    for policy in dict.fromkeys(options.policies):
        rates = dict.fromkeys(options.skip_rates) if policy == "router" else (None,)
        asked += [(policy, rate) for rate in rates]
    for policy, rate in asked:  # an impossible rate is refused before anything is run
        _choose(model, policy, rate, options.prefill)
    _prompts(model, examples, options.max_new_tokens)
    report = _start(options, model, examples)
    for policy, rate in asked:
        name = _name(policy, rate)
        if name in report["runs"]:
            print(f"{name}: done before, taken from {options.output}")
            continue
        result = evaluate_qa(
            model,
            examples,
            policy,
            rate,
            prefill=options.prefill,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        )
        result["provenance"] = provenance(seed=options.seed)
        report["runs"][name] = result
        report["retention"] = _retention(report["runs"], options.seed)
        if options.output is not None:
            report["provenance"] = provenance(seed=options.seed, **report["inputs"])
            write_json(options.output, report)
    print(table(report))
    if recorded_in is not None:
        artifact.record(recorded_in, "qa", summary(report))
    return 0


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return what an artifact keeps of a report: where it was measured, and each run's scores."""
    source = report["inputs"]["data"]
    return {
        "data": "/".join(Path(source).parts[-2:]) if Path(source).is_file() else source,
        "data_sha256": report["inputs"]["data_sha256"],
        "count": next(iter(report["runs"].values()))["count"],
        "weights": report["inputs"]["weights"].removeprefix("torch."),
        **{name: report["options"][name] for name in ("prefill", "max_new_tokens")},
        "runs": {
            name: {
                "skip_rate": run["skip_rate"]["mean"],
                "EM": run["em"]["value"],
                "F1": run["f1"]["value"],
            }
            for name, run in report["runs"].items()
        },
    }


def table(report: dict[str, Any]) -> str:
    """Return a report of `firstlm eval` as text, one line a run."""
    columns = ("run", "EM", "95%", "F1", "95%", "of run_all", "skipped", "p5-p95", "masks", "calls")
    lines = ["{:<14}{:>6}{:>13}{:>7}{:>13}{:>12}{:>9}{:>10}{:>7}{:>10}".format(*columns)]
    for name, result in report["runs"].items():
        em, f1, rate = result["em"], result["f1"], result["skip_rate"]
        kept = report["retention"].get(name, {}).get("value")
        percent = "" if kept is None or kept != kept else f"{kept:.1%}"
        calls = sum(result["layer_calls"].values())
        spread = f"{100 * rate['p5']:.0f}-{100 * rate['p95']:.0f}%"
        lines.append(
            f"{name:<14}{em['value']:>6.1f}{_interval(em):>13}{f1['value']:>7.1f}{_interval(f1):>13}"
            f"{percent:>12}{rate['mean']:>9.1%}{spread:>10}{result['distinct_masks']:>7}{calls:>10}"
        )
    count = next(iter(report["runs"].values()))["count"] if report["runs"] else 0
    return "\n".join([*lines, f"{count} items; EM and F1 in percent; of run_all: share of its F1."])


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['low']:.1f}-{estimate['high']:.1f}"


def _retention(runs: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return each run's F1 over that of run_all, item by item."""
    if "run_all" not in runs:
        return {}
    scores = {name: [item["f1"] for item in result["items"]] for name, result in runs.items()}
    found: dict[str, Estimate] = {
        name: retention(values, scores["run_all"], seed=seed)
        for name, values in scores.items()
        if name != "run_all"
    }
    return {name: asdict(value) for name, value in found.items()}


def _check_template(template: str | None) -> None:
    if template in TEMPLATES and template != "qa":
        _refuse_task(f"--template {template}")


def _check_task(examples: Sequence[Example]) -> None:
    for example in examples:
        task = example.row.get("task")
        if task not in (None, "qa"):
            _refuse_task(f"{example.where}: task {task!r}")


def _refuse_task(what: str) -> None:
    raise ConfigError(
        f"{what}: `firstlm eval` scores question answering only; other tasks come later. "
        "Expected rows of task 'qa', or rows without a task and short answers."
    )


def _start(options: EvalConfig, model: FirstModel, examples: Sequence[Example]) -> dict[str, Any]:
    """Return a new report, or what --output holds of the same one."""
    compared = {k: v for k, v in to_dict(options).items() if k not in FREE_OPTIONS}
    inputs = {
        "artifact": options.artifact,
        "artifact_sha256": _model_hash(model),
        "weights": str(model.base.dtype),
        "data": options.data,
        "data_sha256": _data_hash(options.data, examples),
    }
    report = {"task": "qa", "options": compared, "inputs": inputs, "runs": {}, "retention": {}}
    if options.output is None or not Path(options.output).exists():
        return report
    try:
        old = json.loads(Path(options.output).read_text(encoding="utf-8"))
        before = {**old["options"], **old["inputs"]}
        report["runs"], report["retention"] = old["runs"], old["retention"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{options.output} holds no results of `firstlm eval`; name another --output."
        ) from error
    now = {**compared, **inputs}
    paths = ("artifact", "data")
    other = [k for k in now if k not in paths and now[k] != before.get(k)]
    if other:
        raise ConfigError(
            f"{options.output} holds results for other inputs ({', '.join(other)}). Name another "
            "--output, or repeat the options to add runs to it."
        )
    return report


def _model_hash(model: FirstModel) -> str:
    """Return a hash of routers, thresholds and adapter: what an artifact adds to its base."""
    digest = hashlib.sha256(to_json(model.thresholds.table).encode())
    for name, tensor in model.named_parameters():
        if name.startswith("routers.") or is_lora(name):
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _data_hash(source: str, examples: Sequence[Example]) -> str:
    if Path(source).is_file():
        return sha256_of(source)
    rows = [[example.id, example.prompt, example.references] for example in examples]
    return hashlib.sha256(to_json(rows).encode()).hexdigest()
