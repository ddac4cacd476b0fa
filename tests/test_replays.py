# SPDX-License-Identifier: Apache-2.0
"""Steps that are recorded and replayed decode as steps that are called.

CUDA's part is played by a recorder that keeps a call with the tensors it was made with, and makes
it again: what it is not told in the places that it knows, it does not see.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from families import batch, mixed
from test_engine import by_operation

from firstlm import FirstModel, FixedMask, replays
from firstlm.engine import DecodeEngine
from firstlm.fast_batch import FastBatch
from firstlm.generate import decode_step, prefill
from firstlm.replays import Calls, Replays

STEPS = 6


class Recorder:
    """Counts what is recorded and how often that is replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


@pytest.fixture(scope="module")
def llama() -> FirstModel:
    return FirstModel.from_base(tiny_llama())


def test_only_cuda_is_recorded(llama: FirstModel) -> None:
    assert type(by_operation(llama).calls) is Calls


@pytest.mark.parametrize("lengths", [(9,), (9, 5, 1, 7), (300, 3)])
def test_replayed_steps_give_the_models_logits(llama: FirstModel, lengths: tuple[int, ...]) -> None:
    recorder = Recorder()
    engine = by_operation(llama, calls=Replays(recorder))
    ids, mask = batch(lengths)
    keep = mixed(len(lengths))
    theirs = prefill(llama, ids, mask, policy=FixedMask(keep))
    ours = engine.start(theirs.cache, mask, STEPS)
    for _ in range(STEPS):
        token = theirs.logits.argmax(-1)
        found, wanted = ours.step(token), decode_step(llama, theirs, token)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    layers = int(keep.any(0).sum())
    assert recorder.recorded == layers + 2
    # What comes before and after the layers was called when the engine was tried on 1 or 2 rows.
    assert recorder.replayed == recorder.recorded * (STEPS - 1) + (2 if len(ids) <= 2 else 0)


def test_another_mask_records_only_layers_that_did_not_run_yet(llama: FirstModel) -> None:
    recorder = Recorder()
    engine = by_operation(llama, calls=Replays(recorder))
    ids, mask = batch((9,))
    ours = engine.start(prefill(llama, ids, mask, policy=FixedMask([True] * 4)).cache, mask, 20)
    slabs = list(ours._slabs)
    counts = []
    for keep in (
        [1, 0, 1, 1],
        [1, 1, 0, 1],
        [0, 1, 1, 0],
        [1, 1, 1, 1],
    ):  # same memory, as a pool has
        ours._slabs = [s if k else None for s, k in zip(slabs, keep, strict=True)]
        ours._order = ours._plan(ours._slabs, 1)
        for token in (5, 6):
            ours.step(torch.tensor([token]))
        counts.append(recorder.recorded)
    assert counts == [5, 6, 6, 6]


def test_rows_that_join_and_leave(llama: FirstModel) -> None:
    """Batches change, and two of them take turns in the places of one engine."""
    recorder = Recorder()

    def start(engine: DecodeEngine, length: int, room: int) -> FastBatch:
        ids, mask = batch((length,))
        keep = [True, length % 2 == 0, True, length % 3 == 0]
        return engine.start(prefill(llama, ids, mask, policy=FixedMask(keep)).cache, mask, room)

    def run(engine: DecodeEngine) -> list[torch.Tensor]:
        one, other, found = start(engine, 5, 40), start(engine, 8, 40), []

        def steps(*batches: FastBatch) -> None:
            for token in range(5, 9):
                for chosen in batches:
                    ids = torch.arange(token, token + chosen.count)
                    found.append(chosen.step(ids))

        steps(one, other)
        one.join([start(engine, 6, 300), start(engine, 9, 20)])
        steps(one, other)
        one.select([0, 2])
        steps(other, one)
        one.select([1])
        steps(one, other)
        return found

    found, wanted = run(by_operation(llama, calls=Replays(recorder))), run(by_operation(llama))
    assert recorder.replayed > recorder.recorded > 0
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_where_recording_fails_steps_are_called_after_one_warning(llama: FirstModel) -> None:
    tries = 0

    def failing(_run: Callable[[], None]) -> Any:
        nonlocal tries
        tries += 1
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    engine = by_operation(llama, calls=Replays(failing))
    ids, mask = batch((9, 5))
    theirs = prefill(llama, ids, mask, policy=FixedMask(mixed(2)))
    ours = engine.start(theirs.cache, mask, STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            token = theirs.logits.argmax(-1)
            found, wanted = ours.step(token), decode_step(llama, theirs, token)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert tries == replays.FAILURES
    (warning,) = caught
    assert "kernel by kernel, not recorded: operation" in str(warning.message)


def test_what_is_known_holds_no_inputs_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording knows addresses, so keys and values of prompts that are done are let go."""
    monkeypatch.setattr(replays, "LIMIT", 3)

    def record(run: Callable[[], None]) -> Callable[[], None]:
        run()
        return lambda: None

    calls, held = Replays(record), []
    weights = [torch.ones(2)]

    def run(weight: torch.Tensor, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [weight + tensor]

    for value in range(5):
        tensor = torch.full((2,), float(value))
        held.append((weakref.ref(tensor), tensor.data_ptr()))
        for _ in range(3):
            assert calls(run, weights, [tensor])[0].tolist() == [value + 1.0] * 2
        del tensor
    gc.collect()
    assert all(ref() is None for ref, _ in held)
    assert len(calls._known) <= 3


def test_a_replay_reads_what_lies_in_the_same_place_now() -> None:
    """As CUDA does it: by address, not by tensor."""
    calls = Replays(Recorder())
    place, weights = torch.zeros(3), [torch.ones(3)]
    run = lambda weight, tensor: [weight + tensor]  # noqa: E731
    for value in (1.0, 2.0, 3.0):
        place.fill_(value)
        assert calls(run, weights, [place])[0].tolist() == [value + 1] * 3
    other = torch.full((3,), 9.0)  # elsewhere: called as it is
    assert calls(run, weights, [other])[0].tolist() == [10.0] * 3
    assert calls(run, [torch.zeros(3)], [place])[0].tolist() == [3.0] * 3  # other weights


def test_steps_in_inference_mode_and_outside_take_turns(llama: FirstModel) -> None:
    engine = by_operation(llama, calls=Replays(Recorder()))
    ids, mask = batch((9,))
    found = []
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            cache = prefill(llama, ids, mask, policy=FixedMask([True] * 4)).cache
            ours = engine.start(cache, mask, STEPS)
            found.append(torch.stack([ours.step(torch.tensor([5])) for _ in range(3)]).clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_results_outlive_the_next_step(llama: FirstModel) -> None:
    engine = by_operation(llama, calls=Replays(Recorder()))
    ids, mask = batch((9,))
    ours = engine.start(prefill(llama, ids, mask, policy=FixedMask([True] * 4)).cache, mask, STEPS)
    first = ours.step(torch.tensor([5]))
    before = first.clone()
    for _ in range(3):
        ours.step(torch.tensor([6]))
    assert torch.equal(first, before)
