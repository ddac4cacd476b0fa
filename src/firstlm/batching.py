# SPDX-License-Identifier: Apache-2.0
"""Many prompts, one after the other in the same batch: a row that is done makes room for the next.

Knows token ids only, no text. Each prompt has its own layers, and a step reads the weights of every
layer that some row keeps. So some prompts run ahead, and those come in whose layers the batch reads
anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from firstlm.errors import ConfigError
from firstlm.fast_batch import FastBatch
from firstlm.generate import Decoding, check_sampling, decode_step, end_ids, pick, prefill
from firstlm.inputs import check_ids, pad_left
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Policy


@dataclass
class Answer:
    """What one prompt was answered.

    Attributes:
        ids: new tokens, the one that ended the answer included.
        keep: [layers] bool, the layers that ran.
    """

    ids: list[int] = field(default_factory=list)
    keep: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


@torch.no_grad()
def generate_many(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    policy: Policy | None = None,
    skip_rate: float | None = None,
    prefill_mode: str = "skip",
    max_new_tokens: int = 128,
    batch_size: int = 16,
    lookahead: int = 2,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_ids: int | Sequence[int] | None = None,
    engine: str = "fast",
    weights: str = "same",
    progress: bool = True,
) -> list[Answer]:
    """Answer prompts, at most `batch_size` at a time; long ones first.

    Args:
        model: a routed model.
        prompts: token ids of each.
        policy: what decides; default the routers. A `FixedMask` of [prompts, layers] has a mask for
            each prompt.
        skip_rate: share of layers to skip; needs a calibrated model.
        prefill_mode: "skip" or "full".
        max_new_tokens: longest answer.
        batch_size: rows that are decoded together.
        lookahead: how many times as many prompts run ahead, to choose from those with like masks;
            their keys and values, and at most as many again, take memory meanwhile. 0: first come,
            first served.
        temperature: 0 takes the likeliest token, above 0 samples.
        top_p: sample from the likeliest tokens that make up this share.
        seed: of sampling; what a prompt draws depends on the prompts beside it.
        eos_token_ids: ids that end an answer; default the model's own; () never ends one.
        engine: what decodes. "hf", which is also what "fast" falls back to, answers batch by batch.
        weights: number format of "fast".
        progress: show a bar.

    Returns:
        Answers in the order of the prompts.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more.")
    if lookahead < 0:
        raise ConfigError(f"lookahead is {lookahead}; expected 0 or more.")
    prompts = [[operator.index(token) for token in prompt] for prompt in prompts]
    vocab = model.config.get_text_config(decoder=True).vocab_size
    for i, prompt in enumerate(prompts):
        check_ids(prompt, vocab, f"Prompt {i}")
    masks = policy.keep if isinstance(policy, FixedMask) else None
    if masks is not None and masks.dim() == 2 and len(masks) != len(prompts):
        raise ConfigError(f"The policy has {len(masks)} masks for {len(prompts)} prompts.")
    check_sampling(max_new_tokens, temperature, top_p)
    generator = None
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(seed)
    options: dict[str, Any] = {
        "policy": policy,
        "skip_rate": skip_rate,
        "prefill": prefill_mode,
        "max_new_tokens": max_new_tokens,
        "engine": engine,
        "weights": weights,
    }
    run = _Run(model, prompts, options, temperature, top_p, generator, eos_token_ids)
    waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:
        while waiting or run.ahead or run.rows:
            free = batch_size - len(run.rows)
            # A prompt that comes in moves what is there, so that several come at once.
            if (waiting or run.ahead) and (not run.rows or 4 * free >= batch_size):
                while waiting and (wanted := free + lookahead * batch_size - len(run.ahead)) > 0:
                    count = min(wanted, batch_size)
                    run.read(waiting[:count])
                    waiting = waiting[count:]
                    bar.update(run.finished - bar.n)
                run.admit(free)
            else:
                run.step()
            bar.update(run.finished - bar.n)
    return run.answers


@dataclass
class _Pool:
    """Prompts that have run together, and wait.

    Attributes:
        batch: their keys and values, and those of some that have come in: at most as many as wait.
        left: row -> the prompt, of those that wait.
    """

    batch: FastBatch
    left: dict[int, int]


class _Run:
    """The prompts that are being answered, and the answers so far."""

    def __init__(
        self,
        model: FirstModel,
        prompts: Sequence[Sequence[int]],
        options: dict[str, Any],
        temperature: float,
        top_p: float,
        generator: torch.Generator | None,
        eos_token_ids: int | Sequence[int] | None,
    ) -> None:
        self.model, self.prompts, self.options = model, prompts, options
        self.sampling = (temperature, top_p, generator)
        self.ends = end_ids(model, eos_token_ids)
        self.answers = [Answer() for _ in prompts]
        self.rows: list[int] = []  # which prompt each row of the batch answers
        self.pools: list[_Pool] = []
        self.finished = 0
        self.batch: FastBatch | None = None

    @property
    def ahead(self) -> list[int]:
        """Prompts that have run and wait, oldest first."""
        return [i for pool in self.pools for i in pool.left.values()]

    def read(self, taken: list[int]) -> None:
        """Run prompts, and let them wait for room in the batch."""
        ids, mask = pad_left([self.prompts[i] for i in taken], self.model.pad_id)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        options = dict(self.options)
        if isinstance(options["policy"], FixedMask):
            options["policy"] = options["policy"].of(taken)
        decoding = prefill(self.model, ids, mask, **options)
        for i, keep in zip(taken, decoding.state.keep, strict=True):
            self.answers[i].keep = keep
        if decoding.cache.engine is None:
            self._answer_to_the_end(taken, decoding)
            return
        new = decoding.cache.hand_over(mask)
        going = self._note(taken, decoding.logits)
        new.select(going)
        if going:
            self.pools.append(_Pool(new, {row: taken[i] for row, i in enumerate(going)}))

    def admit(self, count: int) -> None:
        """Put some of those that wait to the rows that are being decoded."""
        running = [self.answers[i].keep for i in self.rows]
        ahead = self.ahead
        waiting = [self.answers[i].keep for i in ahead]
        chosen = {ahead[place] for place in alike(running, waiting, count)}
        coming = []
        for pool in self.pools:
            rows = [row for row, i in pool.left.items() if i in chosen]
            if rows:
                self.rows += [pool.left.pop(row) for row in rows]
                coming.append(pool.batch.pick(rows))
                if 0 < 2 * len(pool.left) <= pool.batch.count:  # not for each row that goes
                    pool.batch.select(list(pool.left))
                    pool.left = dict(enumerate(pool.left.values()))
        self.pools = [pool for pool in self.pools if pool.left]
        if self.batch is not None and self.batch.count:
            self.batch.join(coming)
        elif coming:
            first, *others = coming
            first.join(others)
            self.batch = first

    def step(self) -> None:
        """Append a token to every row, and let go of those that are done."""
        assert self.batch is not None
        tokens = [self.answers[i].ids[-1] for i in self.rows]
        logits = self.batch.step(torch.tensor(tokens, device=self.model.device))
        going = self._note(self.rows, logits)
        if len(going) < len(self.rows):
            self.batch.select(going)
            self.rows = [self.rows[row] for row in going]

    def _note(self, rows: Sequence[int], logits: torch.Tensor) -> list[int]:
        """Take a token for each prompt; returns which of them go on."""
        ids = pick(logits, *self.sampling).cpu()
        done = torch.isin(ids, self.ends).tolist()
        going = []
        for row, (i, token) in enumerate(zip(rows, ids.tolist(), strict=True)):
            answer = self.answers[i]
            answer.ids.append(token)
            if done[row] or len(answer.ids) == self.options["max_new_tokens"]:
                self.finished += 1
            else:
                going.append(row)
        return going

    def _answer_to_the_end(self, taken: Sequence[int], decoding: Decoding) -> None:
        """Answer prompts that have run by transformers' layers, rows that are done among them."""
        left, logits = list(range(len(taken))), decoding.logits
        while left := [left[i] for i in self._note([taken[r] for r in left], logits[left])]:
            tokens = [self.answers[i].ids[-1] for i in taken]
            ids = torch.tensor(tokens, device=self.model.device)
            logits = decode_step(self.model, decoding, ids)


def alike(
    running: Sequence[torch.Tensor], waiting: Sequence[torch.Tensor], count: int
) -> list[int]:
    """Choose prompts so that a step reads few layers.

    Args:
        running: masks [layers] of the rows that are being decoded.
        waiting: masks of those that wait, oldest first.
        count: how many to choose at most.

    Returns:
        Places in `waiting`. Each is the one that adds fewest layers to those of the rows before;
        of equals the one with most layers, then the oldest.
    """
    left = dict(enumerate(waiting))
    read = torch.stack(list(running)).any(0) if running else None
    chosen: list[int] = []
    while left and len(chosen) < count:
        if read is None:
            best = next(iter(left))
        else:
            masks = torch.stack(list(left.values()))
            added, kept = (masks & ~read).sum(1), masks.sum(1)
            best = list(left)[int((added * len(read) - kept).argmin())]
        mask = left.pop(best)
        read = mask if read is None else read | mask
        chosen.append(best)
    return chosen
