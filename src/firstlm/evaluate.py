# SPDX-License-Identifier: Apache-2.0
"""Score a model's greedy answers under one policy: as the base, with all layers, or routed.

Scores come from the task, and what a policy is, only `FirstModel` knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from firstlm import metrics
from firstlm.bertscore import BertScore
from firstlm.data import Encoded, check_room, encode, spread_by_length
from firstlm.errors import DataError
from firstlm.eval_policies import choose, run_name, saves_time, settle, usage
from firstlm.examples import Example
from firstlm.inputs import pad_left
from firstlm.journal import Journal
from firstlm.losses import item_losses
from firstlm.masks import describe_masks, describe_rates, from_bits, to_bits
from firstlm.metrics import Scores, grouped
from firstlm.model import FirstModel
from firstlm.policies import Policy
from firstlm.probes import decode_times
from firstlm.tasks import Task, find_task

RHO_BINS = 20  # of the histogram of router outputs


def evaluate(
    model: FirstModel,
    examples: Sequence[Example],
    policy: str | Policy = "router",
    skip_rate: float | None = None,
    *,
    task: Task | None = None,
    prefill: str = "skip",
    batch_size: int = 16,
    max_new_tokens: int = 32,
    timed: int = 0,
    seed: int = 0,
    perplexity: bool = True,
    bert_score: BertScore | None = None,
    progress: bool = True,
    items: bool = True,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Answer every example greedily under one policy, and score the answers.

    Args:
        model: a model with its tokenizer.
        examples: what to answer; answers are compared with each example's `references`.
        policy: "base" (adapter off, all layers), "run_all" (adapter on, all layers), "router", one
            of `config.BASELINES` or `config.DIAGNOSTICS`, or a policy object.
        skip_rate: share of layers to skip, for "router" and baselines; None is what was trained.
        task: what is scored, and how; default the one that the examples' rows name.
        prefill: "skip" or "full".
        batch_size: prompts per batch; batches hold prompts of similar length.
        max_new_tokens: longest answer; where the task's answers have one line, they end with it.
        timed: prompts, evenly drawn by length, after which decoding is timed.
        seed: seed of the bootstrap, and of the policies that draw layers.
        perplexity: scores the wanted answers' perplexity, in a second pass over the prompts.
        bert_score: scores the answers' meaning too; None leaves that out.
        progress: show a progress bar.
        items: put every answer with its scores and mask into the result.
        journal: what an interrupted call has answered; batches in it are not answered again.

    Returns:
        One JSON object: each metric of the task in percent, and perplexity per token of wanted
        answers where it is asked for, with 95% intervals; skip rates per prompt and layer,
        number of distinct masks, layer calls, how many prompts were to be timed (`timed`) and
        `tpot_ratio` (time per token over that with all layers) where they were, `rho_histogram`
        [layers, bins] where routers decide, `kv_recomputed` where tokens decide by themselves
        (`token_level.usage`), and the items in the order of `examples`, whose scores are shares
        where a metric is a mean over items, and percent for BLEU and chrF.
    """
    if not examples:
        raise DataError("There are no examples to score.")
    name = run_name(policy, skip_rate)
    task = task or find_task(examples)
    rows = encode_rows(model, examples, max_new_tokens)
    prompts = [row.prompt_ids for row in rows]
    model.eval()
    chosen, scope = choose(model, policy, skip_rate, prefill, seed)
    chosen = settle(chosen, model, prompts, prefill, batch_size)
    answer = partial(_answer, model, chosen, prefill, task, max_new_tokens)
    with scope:
        answers, keep, rates, totals = _answer_all(
            prompts, answer, batch_size, journal or Journal(None), name, progress
        )
        scores = dict[str, Scores]()
        if perplexity:
            scores["perplexity"] = _perplexity(model, rows, chosen, batch_size, prefill)
        ratio = _tpot_ratio(model, chosen, prefill, prompts, timed)
    references = [example.references for example in examples]
    if bert_score is not None:
        scores = {"bertscore": bert_score(answers, references)} | scores
    scores = task.score(answers, references) | scores
    groups = grouped([example.group for example in examples])
    result = {
        "policy": policy if isinstance(policy, str) else type(policy).__name__,
        "asked_skip_rate": skip_rate,
        "prefill": prefill,
        "count": len(examples),
        "groups": int(groups.max()) + 1,
        **{
            metric: asdict(value.estimate(groups=groups, seed=seed))
            for metric, value in scores.items()
        },
        "skip_rate": describe_rates(*rates.T),
        **describe_masks(from_bits(keep)),
        **totals,
        "tpot_ratio": ratio,
        "timed": timed,
        "batch_size": batch_size,
    }
    if items:
        result["items"] = [
            {
                "id": example.id,
                "prediction": answers[i],
                "prompt_tokens": len(prompts[i]),
                "answer_tokens": len(rows[i].answer_ids),
                **{metric: round(value.items[i], 4) for metric, value in scores.items()},
                "keep": keep[i],
            }
            for i, example in enumerate(examples)
        ]
    return result


class _Ended(StoppingCriteria):
    """Ends a row as soon as its answer is complete: what follows is not scored."""

    def __init__(self, task: Task, tokenizer: Any, prompt_length: int) -> None:
        self.task, self.tokenizer, self.prompt_length = task, tokenizer, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_length :].tolist()
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return torch.tensor([self.task.ended(text) for text in texts], device=input_ids.device)


def _perplexity(
    model: FirstModel, rows: Sequence[Encoded], policy: Policy, batch_size: int, prefill: str
) -> Scores:
    """Return the perplexity of the wanted answers."""
    losses, tokens, _ = item_losses(model, rows, policy, batch_size, prefill)
    return metrics.perplexity(losses.tolist(), tokens.tolist())


def _tpot_ratio(
    model: FirstModel,
    policy: Policy,
    prefill: str,
    prompts: Sequence[Sequence[int]],
    timed: int,
) -> dict[str, float] | None:
    """Return time per token over that with all layers of the same model, steps in turns.

    Returns:
        Median over prompts, batch 1, with the 5th and 95th percentile and their number; None where
        nothing is timed, layers go as an answer grows, so that it depends on its length, or no
        layer is skipped for real.
    """
    if not timed or not saves_time(policy):
        return None
    ratios = []
    for prompt in spread_by_length(prompts, timed):
        found = decode_times(model, pad_left([prompt], model.pad_id), policy, prefill)
        seconds = {name: float(np.median(times)) for name, times in found["seconds"].items()}
        ratios.append(seconds["routed"] / seconds["run_all"])
    low, median, high = np.percentile(ratios, [5, 50, 95]).tolist()
    return {"value": median, "p5": low, "p95": high, "prompts": len(ratios)}


def _answer_all(
    prompts: Sequence[Sequence[int]],
    answer: Callable[[Sequence[Sequence[int]]], dict[str, Any]],
    batch_size: int,
    journal: Journal,
    name: str,
    progress: bool,
) -> tuple[list[str], list[str], np.ndarray, dict[str, Any]]:
    """Answer all prompts, long ones first.

    Returns:
        The answers, the masks as text, each prompt's skip rate and what it weighs [prompts, 2],
        and the batches' totals.
    """
    answers, keep = [""] * len(prompts), [""] * len(prompts)
    rates = np.empty((len(prompts), 2))
    calls, steps, seconds = {"prefill": 0, "decode": 0}, 0, 0.0
    rho: list[list[float]] = []
    recomputed: list[float] = []
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with tqdm(total=len(prompts), desc=name, unit="prompt", disable=not progress) as bar:
        for first in range(0, len(order), batch_size):
            picked = order[first : first + batch_size]
            done = journal.get(f"{name} {first}")
            if not _whole(done, len(picked)):
                done = answer([prompts[i] for i in picked])
                journal.put(f"{name} {first}", done)
            for row, i in enumerate(picked):
                answers[i], keep[i] = done["answers"][row], done["keep"][row]
                rates[i] = done["skip_rates"][row]
            calls = {phase: calls[phase] + done["layer_calls"][phase] for phase in calls}
            steps, seconds = steps + done["decode_steps"], seconds + done["seconds"]
            rho += done["rho"]
            recomputed += done["kv_recomputed"]
            bar.update(len(picked))
    totals = {"layer_calls": calls, "decode_steps": steps, "seconds": seconds}
    if rho:
        totals["rho_histogram"] = _histogram(np.array(rho))
    if recomputed:
        totals["kv_recomputed"] = float(np.mean(recomputed))
    return answers, keep, rates, totals


# What `_answer` says of a batch.
BATCH_KEYS = {"answers", "keep", "skip_rates", "kv_recomputed", "rho", "layer_calls"}
BATCH_KEYS |= {"decode_steps", "seconds"}


def _whole(done: Any, count: int) -> bool:
    """Tell whether what a journal holds is what was said about so many prompts."""
    if not isinstance(done, dict) or not done.keys() >= BATCH_KEYS:
        return False
    return all(len(done[key]) == count for key in ("answers", "keep", "skip_rates"))


def _histogram(rho: np.ndarray) -> list[list[int]]:
    """Count router outputs [prompts, layers] in equal bins from 0 to 1, layer by layer."""
    return [np.histogram(layer, RHO_BINS, (0, 1))[0].tolist() for layer in rho.T]


def _answer(
    model: FirstModel,
    policy: Policy,
    prefill: str,
    task: Task,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Generate for one batch; returns what is kept of it, as JSON."""
    tokenizer, start = model.need_tokenizer(), time.perf_counter()
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
        stopping_criteria=StoppingCriteriaList([_Ended(task, tokenizer, ids.shape[1])]),
    )
    new, state = output.sequences[:, ids.shape[1] :], output.cache.state
    texts, rho = tokenizer.batch_decode(new.tolist(), skip_special_tokens=True), state.rho
    steps = decode_steps(new, [task.ended(text) for text in texts], model)
    used = usage(policy, state, mask, steps)
    return {
        "answers": [task.clean(text) for text in texts],
        "keep": to_bits(used.keep.tolist()),
        "skip_rates": list(zip(used.rates, used.weights, strict=True)),
        "kv_recomputed": used.kv_recomputed,
        "rho": [] if rho is None else [[round(x, 4) for x in row] for row in rho.tolist()],
        "layer_calls": output.layer_calls,
        "decode_steps": new.shape[1] - 1,
        "seconds": time.perf_counter() - start,
    }


def decode_steps(new: torch.Tensor, ended: Sequence[bool], model: FirstModel) -> list[int]:
    """Return how many decode steps each row's answer took; the first token comes from the prompt.

    Args:
        new: [prompts, tokens], rows that are done filled up with the pad token.
        ended: rows whose answer ended by itself, without an end token.
        model: says which tokens end a row.
    """
    ends = model.base.generation_config.eos_token_id
    stops = torch.tensor(np.append(model.pad_id, [] if ends is None else ends), device=new.device)
    said = (~torch.isin(new, stops.long())).sum(1).tolist()
    found = [n - 1 + (not done) for n, done in zip(said, ended, strict=True)]
    return [min(max(n, 0), new.shape[1] - 1) for n in found]


def encode_rows(
    model: FirstModel, examples: Sequence[Example], max_new_tokens: int
) -> list[Encoded]:
    """Return prompts with their wanted answers; those that do not fit the context are refused."""
    tokenizer = model.need_tokenizer()
    rows = [encode(example, tokenizer, model.context_length) for example in examples]
    for example, row in zip(examples, rows, strict=True):
        where = f"{example.where or 'example'} (id {example.id})"
        check_room(row.prompt_ids, max_new_tokens, model.context_length, where)
    return rows
