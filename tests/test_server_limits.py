# SPDX-License-Identifier: Apache-2.0
"""What a server must bear: bodies that are large, wrong or late, and a model that fails."""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from conftest import tiny_routed
from fastapi import HTTPException
from pydantic import ValidationError
from test_scheduler import Client
from test_server import Running

import firstlm.server
from firstlm.api import ChatRequest, CompletionRequest
from firstlm.command_config import ServeConfig
from firstlm.errors import ConfigError
from firstlm.fast_batch import FastBatch
from firstlm.scheduler import Ask, Scheduler
from firstlm.serve import run


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    one = Running(batch_size=4, queue_size=40, batch_tokens=320)
    yield one
    one.close()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [0] * 1000 + ["x"]},
        {"prompt": ["x"] * 1000 + [0]},
        {"prompt": [[0]] * 1000 + [["x"]]},
        {"prompt": [True, False]},
        {"prompt": [[True]]},
        {"prompt": [1.5]},
        {"prompt": "a", "keep": [3] * 1000},
        {"messages": [{"role": "nobody"}] * 1000},
    ],
)
def test_a_wrong_list_is_refused_at_its_first_wrong_part(body: dict[str, Any]) -> None:
    """To tell of each took seconds in which nobody was answered."""
    kind = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 2


def test_prompts_of_every_kind_are_taken(running: Running) -> None:
    for prompt in ("a", ["a", "b"], [5, 6], [[5, 6], [7]]):
        found = running.post(prompt=prompt, max_tokens=2)
        assert found.status_code == 200, found.text
    found = running.post(prompt=[5, "a"])
    assert (found.status_code, found.json()["error"]["param"]) == (400, "prompt")
    assert "expected a text, texts, token ids" in found.json()["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firstlm.server, "BODY_SECONDS", 0.3)
    host, port = running.socket.getsockname()
    with socket.create_connection((host, port), timeout=20) as late:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n\r\n{{"
        late.sendall(head.encode())
        assert b" 408 " in late.recv(1000)


def test_a_model_that_fails_is_logged_and_not_told_to_clients(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_batch: FastBatch, _ids: Any) -> Any:
        raise RuntimeError("secret /path/to/weights broke")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="firstlm.server"):
        patch.setattr(FastBatch, "step", broken)
        found = running.post(prompt="a", max_tokens=4, temperature=0)
        stream = running.post(prompt="a", max_tokens=4, temperature=0, stream=True)
    assert found.status_code == 500
    for text in (found.text, stream.text):
        assert "The model failed" in text
        assert "secret" not in text
    traces = [record for record in caplog.records if record.exc_info]
    assert "secret" in str(traces[0].exc_info)
    assert running.post(prompt="a", max_tokens=2).status_code == 200


def test_refusals_are_logged(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="firstlm.server"):
        running.post(prompt="a", n=99)
        httpx.get(f"{running.url}/nowhere")
        deadline = time.monotonic() + 10
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    fields = [record.fields for record in caplog.records if record.getMessage() == "refused"]  # type: ignore[attr-defined]
    assert {(f["route"], f["status"]) for f in fields} == {("/v1/completions", 400), ("other", 404)}


def test_one_model_and_health_are_asked_for_as_clients_do(running: Running) -> None:
    assert httpx.get(f"{running.url}/v1/models/tiny").json()["id"] == "tiny"
    assert httpx.get(f"{running.url}/v1/models/gpt-4").status_code == 404
    assert httpx.head(f"{running.url}/health").status_code == 200
    assert httpx.get(f"{running.url}/docs").status_code == 404  # it loads scripts from elsewhere


def test_an_answer_of_no_named_length_takes_what_room_there_is(running: Running) -> None:
    prompt = [5] * (running.model.context_length or 0)
    ids = prompt[: 320 - 7]
    found = running.post(prompt=ids, temperature=0)
    assert found.status_code == 200, found.text
    assert found.json()["usage"]["completion_tokens"] <= 7
    found = running.post(prompt=ids, max_tokens=8)
    assert (found.status_code, "memory for 320" in found.text) == (400, True)


def test_requests_wait_for_memory() -> None:
    """A row takes as much as the longest beside it, so a long one is answered alone."""
    scheduler = Scheduler(tiny_routed(), batch_size=8, batch_tokens=128)
    sizes: list[int] = []
    step = FastBatch.step

    def watched(batch: FastBatch, ids: Any) -> Any:
        sizes.append(batch.count * batch.room)
        return step(batch, ids)

    try:
        FastBatch.step = watched  # type: ignore[method-assign]
        lengths = [4, 100, 4, 4, 60, 4, 4, 4]
        asks = [Ask([5] * n, max_new_tokens=20, eos_token_ids=()) for n in lengths]
        clients = [Client(scheduler, ask) for ask in asks]
        for client in clients:
            assert client.wait()[-1].finish == "length"
        with pytest.raises(ConfigError, match="has memory for 128 in all"):
            scheduler.check(Ask([5] * 109, max_new_tokens=20))
    finally:
        FastBatch.step = step  # type: ignore[method-assign]
        scheduler.close()
    assert max(sizes) <= 128
    assert len(sizes) < 20 * len(lengths)  # some did share steps


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="API key is empty"):
        run(ServeConfig(artifact="nowhere", api_key=""))
    monkeypatch.setenv("FIRSTLM_API_KEY", "")
    with pytest.raises(ConfigError, match="API key is empty"):
        run(ServeConfig(artifact="nowhere"))


def test_what_a_reader_says_once_its_client_has_left_is_nobodys(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In Python 3.11 a cancelled wait may go on to raise something else."""
    began, ended = threading.Event(), threading.Event()

    async def read(_: Any) -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.set()
            raise HTTPException(503) from None

    with monkeypatch.context() as patched:
        patched.setattr(firstlm.server, "_read", read)
        client = http.client.HTTPConnection(running.url.removeprefix("http://"))
        body = json.dumps({"prompt": "a"})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert began.wait(10)
        client.close()
        assert ended.wait(10)
    assert running.post(prompt="b", max_tokens=1).status_code == 200  # the loop goes on
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_layers_to_skip_are_a_mask(running: Running) -> None:
    asked = {"prompt": "a", "max_tokens": 3, "temperature": 0}
    layers = running.model.layer_count
    keep = [layer not in (1, 3) for layer in range(layers)]
    found = running.post(skip_layers=[1, 3], **asked).json()["choices"][0]
    assert found["firstlm"]["keep"] == keep
    assert found["text"] == running.post(keep=keep, **asked).json()["choices"][0]["text"]
    assert all(running.post(skip_layers=[], **asked).json()["choices"][0]["firstlm"]["keep"])
    for wrong in ([layers], [-1], [True], ["1"], "1", [layers] * 10**5):
        refused = running.post(skip_layers=wrong, **asked)
        assert refused.status_code == 400
        assert len(refused.text) < 300
    assert running.post(skip_layers=[1], keep=keep, **asked).status_code == 400


def test_large_texts_are_read_beside_the_event_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, found = running.model.tokenizer, []

    class Slow:
        chat_template = None

        def __call__(self, text: str) -> Any:
            begin = time.monotonic()
            status = httpx.get(f"{running.url}/health", timeout=5).status_code
            found.append((status, time.monotonic() - begin))
            return tokenizer(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    monkeypatch.setattr(running.model, "tokenizer", Slow())
    body = json.dumps({"prompt": "a", "max_tokens": 2})
    head = {"Content-Type": "application/json"}
    url = f"{running.url}/v1/completions"
    assert httpx.post(url, content=body, headers=head, timeout=20).status_code == 200
    assert [status for status, _ in found] == [200]
