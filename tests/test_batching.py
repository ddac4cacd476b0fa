# SPDX-License-Identifier: Apache-2.0
"""Many prompts through one batch: the answers are those of each prompt alone."""

from __future__ import annotations

import random

import families
import pytest
import torch
from conftest import tiny_routed

from firstlm import FirstModel, FixedMask
from firstlm.batching import Answer, _Run, alike, generate_many
from firstlm.errors import ConfigError
from firstlm.fast_batch import FastBatch
from firstlm.generate import stream
from firstlm.policies import Prompts


@pytest.fixture(scope="module")
def model() -> FirstModel:
    return tiny_routed()


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 120) for _ in range(rng.randrange(1, 12))] for _ in range(count)]


def alone(model: FirstModel, prompt: list[int], **options: object) -> Answer:
    answer = Answer()
    for token in stream(model, torch.tensor([prompt]), **options):
        answer.ids.append(int(token.ids[0]))
        answer.keep = token.decoding.state.keep[0]
    return answer


def test_prompts_that_wait_hold_at_most_twice_their_own_memory(
    model: FirstModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also rare masks, which wait for others like them while those beside them have gone."""
    admit, held = _Run.admit, []

    def watched(run: _Run, count: int) -> None:
        admit(run, count)
        held.append((sum(pool.batch.count for pool in run.pools), len(run.ahead)))

    monkeypatch.setattr(_Run, "admit", watched)
    masks = torch.tensor([True, False, True, True]).repeat(240, 1)
    masks[::12] = torch.tensor([True, True, False, True])
    generate_many(
        model,
        prompts(240),
        FixedMask(masks),
        batch_size=8,
        max_new_tokens=12,
        eos_token_ids=list(range(3, 40)),
        progress=False,
    )
    assert max(waiting for _, waiting in held) >= 8
    assert all(rows <= 2 * waiting for rows, waiting in held)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_answers_are_those_of_each_prompt_alone(model: FirstModel, batch_size: int) -> None:
    texts = prompts(23)
    ends = list(range(3, 40))  # so that answers end at different steps
    found = generate_many(
        model,
        texts,
        max_new_tokens=12,
        batch_size=batch_size,
        eos_token_ids=ends,
        progress=False,
    )
    lengths = set()
    for prompt, answer in zip(texts, found, strict=True):
        wanted = alone(model, prompt, max_new_tokens=12, eos_token_ids=ends)
        assert answer.ids == wanted.ids
        assert torch.equal(answer.keep, wanted.keep)
        lengths.add(len(answer.ids))
    assert len(lengths) > 3
    assert len({tuple(answer.keep.tolist()) for answer in found}) > 3


def test_rows_come_in_while_others_go_on_and_memory_is_bounded(
    model: FirstModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, joins = [], []
    step, join = FastBatch.step, FastBatch.join

    def watched(batch: FastBatch, ids: torch.Tensor) -> torch.Tensor:
        sizes.append((batch.count, batch.kv_bytes))
        return step(batch, ids)

    def counted(batch: FastBatch, others: list[FastBatch]) -> None:
        joins.append((batch.count, sum(other.count for other in others)))
        join(batch, others)

    monkeypatch.setattr(FastBatch, "step", watched)
    monkeypatch.setattr(FastBatch, "join", counted)
    ends = list(range(3, 40))
    options = {"max_new_tokens": 12, "batch_size": 4, "eos_token_ids": ends, "progress": False}
    generate_many(model, prompts(40), **options)
    assert joins
    assert all(here > 0 and here + more <= 4 for here, more in joins)
    assert max(count for count, _ in sizes) == 4
    # Four rows, four layers, keys and values, two heads, 32 tokens, 8 numbers of 4 bytes.
    assert max(size for _, size in sizes) <= 4 * 4 * 2 * 2 * 32 * 8 * 4


class TwoMasks:
    """Prompts of an odd key skip other layers than the rest."""

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        return torch.tensor([layer in ((0, 1) if key % 2 else (2, 3)) for key in prompts.keys])


@pytest.mark.parametrize("lookahead", [0, 3])
def test_prompts_with_like_masks_share_a_batch(
    model: FirstModel, monkeypatch: pytest.MonkeyPatch, lookahead: int
) -> None:
    calls, ahead = [], []
    step, pick = FastBatch.step, FastBatch.pick

    def watched(batch: FastBatch, ids: torch.Tensor) -> torch.Tensor:
        calls.append(batch.layer_calls)
        return step(batch, ids)

    def counted(batch: FastBatch, rows: list[int]) -> FastBatch:
        ahead.append(batch.count)
        return pick(batch, rows)

    monkeypatch.setattr(FastBatch, "step", watched)
    monkeypatch.setattr(FastBatch, "pick", counted)
    texts = prompts(40)
    options = {"policy": TwoMasks(), "max_new_tokens": 6, "eos_token_ids": ()}
    found = generate_many(
        model, texts, batch_size=4, lookahead=lookahead, progress=False, **options
    )
    assert [a.ids for a in found] == [alone(model, text, **options).ids for text in texts]
    mixed = sum(count == 4 for count in calls) / len(calls)
    assert mixed < 0.3 if lookahead else mixed > 0.7
    assert max(ahead) <= 4  # a pool is a batch


def test_those_come_in_whose_layers_are_read_anyway() -> None:
    def masks(*rows: str) -> list[torch.Tensor]:
        return [torch.tensor([c == "1" for c in row]) for row in rows]

    assert alike([], [], 3) == []
    assert alike([], masks("1100", "0011", "1100", "0100"), 3) == [0, 2, 3]
    assert alike(masks("0011"), masks("1100", "0111", "0001", "0011"), 2) == [3, 2]
    assert alike(masks("1111"), masks("1000", "0110", "1000"), 9) == [1, 0, 2]


def test_models_without_a_fast_engine_answer_batch_by_batch() -> None:
    first = FirstModel.from_base(families.make_model("bloom"))
    texts = prompts(7)
    with pytest.warns(UserWarning, match="engine='hf'"):
        found = generate_many(first, texts, max_new_tokens=5, batch_size=3, progress=False)
    for prompt, answer in zip(texts, found, strict=True):
        assert answer.ids == alone(first, prompt, max_new_tokens=5).ids
    options = {"max_new_tokens": 5, "batch_size": 3, "temperature": 1.0, "progress": False}
    drawn = [generate_many(first, texts, seed=seed, **options) for seed in (1, 1, 2)]
    ids = [[answer.ids for answer in answers] for answers in drawn]
    assert ids[0] == ids[1] != ids[2]


def test_sampling_repeats_with_its_seed(model: FirstModel) -> None:
    options = {"max_new_tokens": 8, "batch_size": 3, "temperature": 1.0, "progress": False}
    first = [a.ids for a in generate_many(model, prompts(6), seed=1, **options)]
    assert [a.ids for a in generate_many(model, prompts(6), seed=1, **options)] == first
    assert [a.ids for a in generate_many(model, prompts(6), seed=2, **options)] != first


def test_bad_input_is_refused_before_anything_runs(model: FirstModel) -> None:
    assert generate_many(model, [], progress=False) == []
    with pytest.raises(ConfigError, match="Prompt 1 has no tokens"):
        generate_many(model, [[5], []], progress=False)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        generate_many(model, [[5]], batch_size=0, progress=False)
    with pytest.raises(ConfigError, match="lookahead is -1"):
        generate_many(model, [[5]], lookahead=-1, progress=False)
    with pytest.raises(ConfigError, match="temperature"):
        generate_many(model, [[5]], temperature=-1.0, progress=False)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate_many(model, [[5]], max_new_tokens=0, progress=False)
