# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go get the answers that each would get alone."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
from conftest import tiny_llama, tiny_routed

import firstlm.scheduler
from firstlm import FirstModel, FixedMask
from firstlm.baselines import Baseline
from firstlm.errors import ConfigError
from firstlm.fast_batch import FastBatch
from firstlm.generate import stream
from firstlm.policies import RunAll
from firstlm.scheduler import Ask, ClosedError, Piece, QueueFullError, Request, Scheduler


@pytest.fixture(scope="module")
def model() -> FirstModel:
    return tiny_routed()


@pytest.fixture
def scheduler(model: FirstModel) -> Iterator[Scheduler]:
    one = Scheduler(model, batch_size=4, queue_size=50)
    yield one
    one.close(10)


class Client:
    """Collects what a request is told."""

    def __init__(self, scheduler: Scheduler, ask: Ask) -> None:
        self.pieces: queue.Queue[Piece] = queue.Queue()
        self.request: Request = scheduler.submit(ask, self.pieces.put)

    def wait(self) -> list[Piece]:
        found = [self.pieces.get(timeout=30)]
        while found[-1].finish is None:
            found.append(self.pieces.get(timeout=30))
        return found


def ids_of(pieces: list[Piece]) -> list[int]:
    return [p.token for p in pieces if p.token is not None]


def alone(model: FirstModel, ask: Ask) -> tuple[list[int], list[bool]]:
    options: dict[str, Any] = {"policy": ask.policy, "max_new_tokens": ask.max_new_tokens}
    options |= {"temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed}
    tokens = list(
        stream(model, torch.tensor([ask.ids]), eos_token_ids=ask.eos_token_ids, **options)
    )
    return [int(t.ids[0]) for t in tokens], tokens[-1].decoding.state.keep[0].tolist()


def make_asks(count: int) -> list[Ask]:
    rng = random.Random(0)
    policies = [
        None,
        RunAll(),
        FixedMask([True, False, True, True]),
        FixedMask([False] * 3 + [True]),
    ]
    return [
        Ask(
            ids=[rng.randrange(3, 120) for _ in range(rng.randrange(1, 12))],
            policy=rng.choice(policies),
            max_new_tokens=rng.randrange(1, 14),
            temperature=rng.choice([0.0, 0.0, 0.8]),
            top_p=0.9,
            seed=turn,
            eos_token_ids=tuple(range(3, 20)),
        )
        for turn in range(count)
    ]


def test_answers_are_those_of_each_request_alone(model: FirstModel, scheduler: Scheduler) -> None:
    asks = make_asks(40)
    clients: dict[int, Client] = {}

    def come(mine: range) -> None:
        for i in mine:
            clients[i] = Client(scheduler, asks[i])
            time.sleep(0.003)

    threads = [threading.Thread(target=come, args=(range(k, 40, 4),)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, ask in enumerate(asks):
        pieces = clients[i].wait()
        tokens, keep = alone(model, ask)
        request = clients[i].request
        assert ids_of(pieces) == tokens
        assert request.keep is not None
        assert request.keep.tolist() == keep
        assert pieces[-1].finish == ("stop" if tokens[-1] < 20 else "length")
        assert request.count == len(tokens)
    assert scheduler.active == 0
    assert scheduler.kv_bytes == 0


def test_requests_go_on_one_by_one_where_the_engine_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after weights were changed to some that it cannot run."""
    model = tiny_routed()
    scheduler = Scheduler(model)
    asks = [Ask([5, 6, 7 + i], max_new_tokens=6, eos_token_ids=()) for i in range(3)]
    try:
        monkeypatch.setattr(model.engines, "get", lambda *_: None)
        clients = [Client(scheduler, ask) for ask in asks]
        for client, ask in zip(clients, asks, strict=True):
            assert ids_of(client.wait()) == alone(model, ask)[0]
    finally:
        scheduler.close()


def test_rows_with_other_masks_share_steps(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    step = FastBatch.step

    def watched(batch: FastBatch, ids: torch.Tensor) -> torch.Tensor:
        sizes.append(batch.count)
        return step(batch, ids)

    monkeypatch.setattr(FastBatch, "step", watched)
    masks = [FixedMask([True, i % 2 == 0, True, i % 3 == 0]) for i in range(8)]
    clients = [
        Client(scheduler, Ask([5, 6, 7], policy=mask, max_new_tokens=20, eos_token_ids=()))
        for mask in masks
    ]
    for client in clients:
        client.wait()
    assert max(sizes) == 4


def test_probabilities_are_told(model: FirstModel, scheduler: Scheduler) -> None:
    ask = Ask([5, 6, 7], policy=RunAll(), max_new_tokens=2, logprobs=3, eos_token_ids=())
    first, second = Client(scheduler, ask).wait()
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, first.token]]), policy=RunAll())[0].logits[0]
    for piece, row in zip((first, second), logits[-2:].log_softmax(-1), strict=True):
        values, ids = row.topk(3)
        assert [token for token, _ in piece.top] == ids.tolist()
        assert [value for _, value in piece.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert piece.logprob == pytest.approx(float(row[piece.token]), abs=1e-4)
    plain = Client(scheduler, Ask([5, 6], max_new_tokens=1)).wait()[0]
    assert plain.logprob is None
    assert plain.top == ()


def test_a_request_that_is_cancelled_leaves_the_others_alone(
    model: FirstModel, scheduler: Scheduler
) -> None:
    long = Ask([5, 6, 7], policy=RunAll(), max_new_tokens=400, eos_token_ids=())
    clients = [Client(scheduler, long) for _ in range(6)]  # two of them wait
    clients[1].pieces.get(timeout=30)
    for gone in (1, 5):
        scheduler.cancel(clients[gone].request)
    for gone in (1, 5):
        assert clients[gone].wait()[-1].finish == "cancelled"
    wanted = alone(model, long)[0]
    for i in (0, 2, 3, 4):
        assert ids_of(clients[i].wait()) == wanted


def test_a_full_queue_and_bad_asks_are_refused(scheduler: Scheduler, model: FirstModel) -> None:
    for ask, message in (
        (Ask([]), "no tokens"),
        (Ask([5], max_new_tokens=0), "max_new_tokens"),
        (Ask([5], temperature=-1.0), "temperature"),
        (Ask([5], logprobs=10**6), "logprobs is 1000000; expected 0 to 259"),
        (Ask([5], logprobs=-1), "logprobs is -1"),
        (Ask([5, 259]), "token id outside 0 to 258"),
        (Ask([-1, 5]), "token id outside"),
        (Ask([5], max_new_tokens=10**6), "the model takes"),
        (Ask([5], skip_rate=0.3), "calibrat"),
        (Ask([5], prefill="half"), "prefill"),
    ):
        with pytest.raises(ConfigError, match=message):
            scheduler.submit(ask, print)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Scheduler(model, batch_size=0)
    long = Ask([5, 6, 7], max_new_tokens=300, eos_token_ids=())
    clients: list[Client] = []

    def come() -> None:
        while len(clients) < 200:
            clients.append(Client(scheduler, long))

    with pytest.raises(QueueFullError):
        come()
    assert 54 <= len(clients) <= 60  # those that fit the batch do not wait
    for client in clients:
        scheduler.cancel(client.request)


def test_a_step_that_fails_ends_its_requests_and_no_others(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = FastBatch.step

    def broken(batch: FastBatch, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FastBatch, "step", broken)
    failed = Client(scheduler, Ask([5, 6], max_new_tokens=5, eos_token_ids=())).wait()[-1]
    assert (failed.finish, failed.error) == ("error", "RuntimeError: out of memory")
    monkeypatch.setattr(FastBatch, "step", step)
    done = Client(scheduler, Ask([5, 6], max_new_tokens=5, eos_token_ids=())).wait()
    assert len(ids_of(done)) == 5


def test_a_client_that_raises_is_cancelled_and_no_other(
    model: FirstModel, scheduler: Scheduler
) -> None:
    long = Ask([5, 6, 7], policy=RunAll(), max_new_tokens=300, eos_token_ids=())
    good = Client(scheduler, long)
    good.pieces.get(timeout=30)
    told: list[Piece] = []

    def raising(piece: Piece) -> None:
        told.append(piece)
        raise ValueError("a client's bug")

    bad = scheduler.submit(Ask([5], max_new_tokens=50, eos_token_ids=()), raising)
    assert ids_of(good.wait()) == alone(model, long)[0][1:]
    assert bad.cancelled
    assert told[-1].finish == "cancelled"
    assert len(told) < 5
    assert scheduler.alive


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_died_takes_no_requests(scheduler: Scheduler) -> None:
    def ending(_: Piece) -> None:
        raise SystemExit

    scheduler.submit(Ask([5], max_new_tokens=5), ending)
    scheduler._thread.join(30)
    with pytest.raises(ClosedError, match="has died"):
        scheduler.submit(Ask([5]), print)


def test_prompts_that_run_are_active_and_closing_ends_them(
    model: FirstModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    prefill = firstlm.scheduler.prefill

    def held(*args: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return prefill(*args, **options)

    monkeypatch.setattr(firstlm.scheduler, "prefill", held)
    scheduler = Scheduler(model, batch_size=2)
    client = Client(scheduler, Ask([5, 6, 7], max_new_tokens=450, eos_token_ids=()))
    assert begun.wait(30)
    assert scheduler.active == 1
    closing = threading.Thread(target=scheduler.close, args=(0.01,))
    closing.start()
    while not client.request.cancelled:
        time.sleep(0.001)
        assert closing.is_alive()
    go_on.set()
    closing.join(30)
    pieces = client.wait()
    assert pieces[-1].finish == "cancelled"
    assert len(pieces) < 5


def test_closing_ends_what_is_there_and_takes_nothing_more(model: FirstModel) -> None:
    scheduler = Scheduler(model, batch_size=2)
    ask = Ask([5, 6, 7], max_new_tokens=100, eos_token_ids=())
    clients = [Client(scheduler, ask) for _ in range(5)]
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while not scheduler._closed:
        time.sleep(0.001)
    with pytest.raises(ClosedError):
        scheduler.submit(ask, print)
    closing.join(30)
    assert [len(ids_of(client.wait())) for client in clients] == [100] * 5
    hasty = Scheduler(model, batch_size=2)
    client = Client(hasty, Ask([5], max_new_tokens=450, eos_token_ids=()))
    assert not hasty.close(0.01)
    assert client.wait()[-1].finish == "cancelled"


def test_models_without_a_fast_engine_are_answered_side_by_side() -> None:
    first = FirstModel.from_base(families.make_model("bloom"))
    with pytest.warns(UserWarning, match="engine='hf' instead"):
        scheduler = Scheduler(first, batch_size=3)
    asks = [Ask([5 + i, 6, 7], max_new_tokens=6, eos_token_ids=()) for i in range(5)]
    clients = [Client(scheduler, ask) for ask in asks]
    found = [ids_of(client.wait()) for client in clients]
    scheduler.close()
    assert found == [alone(first, ask)[0] for ask in asks]


@pytest.mark.parametrize("where", ["prefill", "decode_step"])
def test_one_that_fails_side_by_side_ends_no_other(
    model: FirstModel, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    sizes: list[int] = []
    prefill, step = firstlm.scheduler.prefill, firstlm.scheduler.decode_step

    def watched(model: FirstModel, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(len(ids))
        if where == "prefill" and 99 in ids:
            raise RuntimeError("out of memory")
        return prefill(model, ids, *args, **options)

    def stepping(model: FirstModel, decoding: Any, last: torch.Tensor) -> torch.Tensor:
        if where == "decode_step" and decoding is bad.request.decoding:
            raise RuntimeError("out of memory")
        return step(model, decoding, last)

    monkeypatch.setattr(firstlm.scheduler, "prefill", watched)
    monkeypatch.setattr(firstlm.scheduler, "decode_step", stepping)
    scheduler = Scheduler(model, batch_size=4, engine="hf")
    policy = RunAll()
    asks = [
        Ask(ids, policy=policy, max_new_tokens=30, eos_token_ids=()) for ids in ([5, 6], [7], [8])
    ]
    with scheduler._wake:  # so that all are there when it looks
        good = [Client(scheduler, ask) for ask in asks[:2]]
        bad = Client(scheduler, Ask([99], policy=policy, max_new_tokens=30, eos_token_ids=()))
        good.append(Client(scheduler, asks[2]))
    assert bad.wait()[-1].error == "RuntimeError: out of memory"
    assert [ids_of(client.wait()) for client in good] == [alone(model, ask)[0] for ask in asks]
    assert sizes == [1, 1, 1, 1]  # no prompt runs twice
    assert scheduler.close(10)


def test_rows_that_are_decoded_do_not_wait_for_all_that_come(
    model: FirstModel, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    prefill, step = firstlm.scheduler.prefill, FastBatch.step

    def starting(*args: Any, **options: Any) -> Any:
        turns.append("prompts")
        return prefill(*args, **options)

    def stepping(batch: FastBatch, ids: torch.Tensor) -> torch.Tensor:
        turns.append("step")
        return step(batch, ids)

    monkeypatch.setattr(firstlm.scheduler, "prefill", starting)
    monkeypatch.setattr(FastBatch, "step", stepping)
    with scheduler._wake:
        row = Client(scheduler, Ask([5, 6], max_new_tokens=40, eos_token_ids=()))
        short = [Client(scheduler, Ask([5, 6], max_new_tokens=1)) for _ in range(30)]
    for client in (row, *short):
        client.wait()
    assert turns.count("prompts") >= 10
    assert "prompts prompts" not in " ".join(turns)


def test_a_long_prompt_pads_no_crowd_of_short_ones(
    model: FirstModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    prefill = firstlm.scheduler.prefill

    def watched(model: FirstModel, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(tuple(ids.shape))
        return prefill(model, ids, *args, **options)

    monkeypatch.setattr(firstlm.scheduler, "prefill", watched)
    monkeypatch.setattr(firstlm.scheduler, "GROUP_TOKENS", 64)
    scheduler = Scheduler(model, batch_size=16)
    lengths = [5, 6, 5, 100, 5, 5, 20, 20, 20, 20]
    with scheduler._wake:
        clients = [Client(scheduler, Ask([7] * n, max_new_tokens=9)) for n in lengths]
    for client in clients:
        client.wait()
    scheduler.close()
    assert shapes == [(3, 6), (1, 100), (3, 20), (3, 20)]


def test_policies_that_let_layers_go_are_answered_side_by_side() -> None:
    policy = Baseline("skip_decode", 4, (0, 1, 2, 3), 0.25, answers=(0, 1, 2, 3))
    first = FirstModel.from_base(tiny_llama())
    ask = Ask([5, 6, 7], max_new_tokens=6, eos_token_ids=())
    stepped = replace(ask, policy=policy.at())
    fast = Scheduler(first, batch_size=2)
    with pytest.raises(ConfigError, match="engine='hf'"):
        fast.submit(stepped, print)
    fast.close()
    first.baseline = policy
    scheduler = Scheduler(first, batch_size=2)
    assert ids_of(Client(scheduler, ask).wait()) == alone(first, ask)[0] == alone(first, stepped)[0]
    scheduler.close()
