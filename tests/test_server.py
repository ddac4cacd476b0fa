# SPDX-License-Identifier: Apache-2.0
"""The server, over real sockets and by the real client: right answers, right refusals."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from browser import PROGRAM, Browser
from conftest import make_byte_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model

from firstlm import FirstModel, FixedMask
from firstlm.command_config import ServeConfig
from firstlm.errors import ConfigError
from firstlm.policies import RunAll
from firstlm.pretrained import load_base
from firstlm.scheduler import Ask, Piece, Request, Scheduler
from firstlm.serve import load, run
from firstlm.thresholds import Threshold

openai = pytest.importorskip("openai", reason="pip install 'firstlm[dev]'")
uvicorn = pytest.importorskip("uvicorn", reason="pip install 'firstlm[serve]'")
from firstlm.api import Answer, Form, TextSoFar  # noqa: E402
from firstlm.server import Server, create_app  # noqa: E402

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def make_model() -> FirstModel:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return FirstModel.from_base(tiny_llama(), tokenizer=tokenizer)


class Running:
    """A server in a thread of this process."""

    def __init__(self, **options: Any) -> None:
        self.model = make_model()
        config = ServeConfig(artifact="tiny", **options)
        sizes = config.batch_size, config.queue_size
        self.scheduler = Scheduler(self.model, *sizes, batch_tokens=config.batch_tokens)
        self.server = Server(self.model, self.scheduler, config, "tiny")
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = create_app(self.server)
        self.uvicorn = uvicorn.Server(
            uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2)
        )
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.uvicorn.serve([self.socket])), daemon=True
        )
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(10)
        self.scheduler.close(5)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        head = {"Content-Type": "application/json"}
        return httpx.post(self.url + path, content=json.dumps(body), headers=head, timeout=60)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    one = Running(batch_size=4, queue_size=40)
    yield one
    one.close()


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def watch(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Return the requests that a scheduler takes from now on."""
    found: list[Request] = []
    submit = scheduler.submit

    def watched(ask: Ask, tell: Any) -> Request:
        found.append(submit(ask, tell))
        return found[-1]

    monkeypatch.setattr(scheduler, "submit", watched)
    return found


@pytest.fixture
def taken(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    return watch(running.scheduler, monkeypatch)


def wanted(running: Running, text: str, tokens: int, policy: Any) -> str:
    """Return what a direct call answers, in a model of the same weights."""
    model = make_model()
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    out = model.generate(ids, policy=policy, max_new_tokens=tokens, do_sample=False)
    answer = out.sequences[0, ids.shape[1] :].tolist()
    end = model.base.generation_config.eos_token_id
    return model.tokenizer.decode([t for t in answer if t != end], skip_special_tokens=True)


def test_completions_and_chats_by_openais_client(running: Running, client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    done = client.completions.create(
        model="tiny", prompt="bees", max_tokens=9, temperature=0, extra_body={"policy": "run_all"}
    )
    choice = done.choices[0]
    assert choice.text == wanted(running, "bees", 9, RunAll())
    assert choice.finish_reason in ("length", "stop")
    assert done.usage.prompt_tokens == len(running.model.tokenizer("bees")["input_ids"])
    assert choice.firstlm["keep"] == [1, 1, 1, 1]
    assert choice.firstlm["kv_bytes"] > 0
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "bees"}],
        max_completion_tokens=9,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"keep": [True, False, True, True]},
    )
    mask = FixedMask([True, False, True, True])
    assert chat.choices[0].message.content == wanted(running, "user: bees\nassistant:", 9, mask)
    assert chat.choices[0].firstlm["skip_rate"] == 0.25
    told = chat.choices[0].logprobs.content
    assert len(told) == chat.usage.completion_tokens
    assert told[0].top_logprobs[0].logprob == told[0].logprob  # greedy takes the likeliest


@pytest.mark.parametrize("chat", [False, True])
def test_streams_say_the_same_as_whole_answers(client: Any, chat: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 30, "temperature": 1, "seed": 5}
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    if chat:
        options["messages"] = [{"role": "user", "content": "honey"}]
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, **more))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
    else:
        options["prompt"] = "honey"
        whole = client.completions.create(**options)
        chunks = list(client.completions.create(**options, **more))
        assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_several_answers_and_prompts(client: Any) -> None:
    options = {"model": "tiny", "max_tokens": 12, "temperature": 1, "seed": 3}
    done = client.completions.create(prompt=["a", "bb"], n=3, **options)
    texts = [choice.text for choice in done.choices]
    assert [choice.index for choice in done.choices] == list(range(6))
    assert len(set(texts[:3])) > 1
    again = client.completions.create(prompt=["a", "bb"], n=3, **options)
    assert [choice.text for choice in again.choices] == texts


def test_probabilities_of_completions_say_where_their_tokens_are(client: Any) -> None:
    options = {"model": "tiny", "prompt": "bees", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    choice = client.completions.create(**options).choices[0]
    told = choice.logprobs
    for token, place in zip(told.tokens, told.text_offset, strict=True):
        broken = token.startswith("bytes:")
        assert choice.text[place : place + (1 if broken else len(token))] in (token, "\ufffd")
    parts = [c.choices[0].logprobs for c in client.completions.create(**options, stream=True)]
    assert [place for part in parts if part for place in part.text_offset] == told.text_offset
    assert all(len(top) == 2 for top in told.top_logprobs)


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(
    running: Running, client: Any, taken: list[Request]
) -> None:
    options = {"model": "tiny", "prompt": "bees", "max_tokens": 400, "temperature": 0}
    whole = client.completions.create(**options).choices[0].text
    stop = whole[5:8]
    cut = client.completions.create(**options, stop=["nowhere in it", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole[: whole.index(stop)]
    idle(running)
    assert [request.cancelled for request in taken] == [False, True, True]
    assert all(request.count < 400 for request in taken[1:])


def test_text_that_may_still_change_is_held_back() -> None:
    tokenizer = make_byte_tokenizer()
    ids = tokenizer("aé€b", add_special_tokens=False)["input_ids"]
    text = TextSoFar(tokenizer, ["€c"])
    told = [text.add(token, False) for token in ids]
    assert "".join(told) == "aé€b"
    assert all("\ufffd" not in part for part in told)
    held = TextSoFar(tokenizer, ["stop"])
    ids = tokenizer("xstop", add_special_tokens=False)["input_ids"]
    assert [held.add(token, False) for token in ids] == ["x", "", "", "", ""]
    assert held.stopped


def test_text_is_that_of_all_tokens_and_each_is_decoded_but_a_few_times() -> None:
    tokenizer = make_byte_tokenizer()
    decoded: list[int] = []

    class Watched:
        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, **options)

    rng = random.Random(0)
    letters = tokenizer("häuser €5 und 木, " * 40, add_special_tokens=False)["input_ids"]
    for ids in ([rng.randrange(259) for _ in range(400)], letters):
        text = TextSoFar(Watched(), [])
        told = "".join(text.add(token, False) for token in ids) + text.add(None, True)
        assert told == text.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert max(decoded[-2 * len(letters) :]) < 8


def answer_of(ids: list[int], stops: list[str], tokenizer: Any) -> tuple[Answer, list[int], str]:
    """Return an answer of these tokens, and the offsets and the text that its stream tells."""
    request = Request(
        Ask([5, 6], logprobs=0), print, frozenset(), count=len(ids) + 7
    )  # it runs ahead
    answer = Answer(0, request, TextSoFar(tokenizer, stops), 1)
    form = Form(False, "tiny", tokenizer)
    offsets, text = [], ""
    for place, token in enumerate(ids):
        new = answer.take(Piece(token, "length" if place == len(ids) - 1 else None, -1.0))
        if new or answer.finish:
            choice = form.part(answer, new)["choices"][0]
            offsets += (choice["logprobs"] or {"text_offset": []})["text_offset"]
            text += choice["text"]
        if answer.finish:
            break
    return answer, offsets, text


@pytest.mark.parametrize(
    ("text", "stops", "offsets"),
    [
        ("éa€b", [], [0, 0, 1, 2, 2, 2, 3]),
        ("xabd", ["bc"], [0, 1, 3]),
        ("xabcd", ["bc"], [0, 1, 2]),
        ("qaaab", ["aab"], [0, 1, 2, 2]),
    ],
)
def test_offsets_say_where_each_token_begins(
    text: str, stops: list[str], offsets: list[int]
) -> None:
    tokenizer = make_byte_tokenizer(merges=[("a", "b")])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, streamed, told = answer_of(ids, stops, tokenizer)
    whole = Form(False, "tiny", tokenizer).whole([answer], 2)
    choice = whole["choices"][0]
    assert choice["logprobs"]["text_offset"] == streamed == offsets
    assert told == choice["text"]


def test_what_runs_ahead_of_a_stop_text_is_not_counted() -> None:
    tokenizer = make_byte_tokenizer()
    ids = tokenizer("xstops", add_special_tokens=False)["input_ids"]
    answer, _, _ = answer_of(ids, ["stop"], tokenizer)
    answer.request.keep = torch.tensor([True, False])
    answer.request.first = answer.ended - 1
    whole = Form(False, "tiny", tokenizer).whole([answer], 2)
    assert whole["usage"]["completion_tokens"] == len(answer.pieces) == 5
    about = whole["choices"][0]["firstlm"]
    assert about["kv_bytes"] == 2 + 5
    assert about["tpot_ms"] == pytest.approx(250)


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "no tokens"),
        ({"prompt": []}, 400, "no prompt"),
        ({"prompt": [99999]}, 400, "token id outside"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "n": 99}, 400, "n:"),
        ({"prompt": "a", "n": True}, 400, "expected a number"),
        ({"prompt": "a", "logprobs": True}, 400, "expected a number"),
        ({"prompt": "a", "max_tokens": "9"}, 400, "expected a number"),
        ({"prompt": "a", "stream": 1}, 400, "stream"),
        ({"prompt": "a", "keep": [1, 1, 1, 1]}, 400, "keep"),
        ({"prompt": "a", "skip_rate": 1.5}, 400, "skip_rate"),
        ({"prompt": "a", "skip_rate": 0.25}, 400, "calibrat"),
        ({"prompt": "a", "policy": "magic"}, 400, "Input should be 'router'"),
        ({"prompt": "a", "policy": "unified"}, 400, "needs a skip_rate"),
        ({"prompt": "a", "policy": "run_all", "skip_rate": 0.5}, 400, "skips no layers"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "half a surrogate pair"),
        ({"prompt": "a", "stop": ["\udc00"], "stream": True}, 400, "half a surrogate pair"),
        ({"prompt": ["a"] * 8, "n": 8}, 400, "at most 44"),
        ({"prompt": "a", "keep": [True]}, 400, "keep is for 1 layers"),
        ({"prompt": "a", "keep": [True] * 4, "policy": "run_all"}, 400, "leave out policy"),
        ({"prompt": "a" * 3000}, 400, "the model takes"),
        ({"prompt": "a" * 3_000_000}, 413, "larger than"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "no model 'gpt-4'"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of is not offered here; leave it out"),
        ({"prompt": "a", "tools": [{"type": "function"}]}, 400, "tools is not offered"),
    ],
)
def test_bad_requests_are_refused(
    running: Running, body: dict[str, Any], code: int, message: str
) -> None:
    response = running.post(**body)
    assert response.status_code == code
    assert message in response.json()["error"]["message"]
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


def test_malformed_json_and_bodies_without_a_length(running: Running) -> None:
    url = f"{running.url}/v1/completions"
    assert httpx.post(url, content=b"{nope", timeout=10).status_code == 400
    head = {"Content-Type": "application/json"}
    broken = httpx.post(url, content=b'{"prompt": nope', headers=head, timeout=10)
    assert broken.status_code == 400
    error = broken.json()["error"]
    assert error["message"].startswith("The body is no JSON: ")
    assert error["message"].endswith(", at character 12.")
    assert error["param"] is None

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"a" * 50_000

    assert httpx.post(url, content=endless(), timeout=10).status_code == 413
    nowhere = httpx.get(f"{running.url}/nowhere")
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "status_404")
    wrong = httpx.get(url)
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "status_405")
    assert wrong.headers["Allow"] == "POST"


def test_the_description_says_what_this_model_takes(running: Running) -> None:
    found = httpx.get(f"{running.url}/openapi.json").json()["components"]["schemas"]
    for name, prompt in (("CompletionRequest", {"prompt": "a"}), ("ChatRequest", {"messages": []})):
        schema = {**found[name], "$defs": found} if name == "CompletionRequest" else found[name]
        fields = schema["properties"]
        (keep,) = (part for part in fields["keep"]["anyOf"] if part["type"] == "array")
        assert keep["minItems"] == keep["maxItems"] == running.model.layer_count
        assert {"type": "null"} in fields["temperature"]["anyOf"]
        if name == "ChatRequest":
            continue
        for body, valid in (
            ({"keep": [True] * 4}, True),
            ({"keep": [True] * 3}, False),
            ({"keep": [True] * 4, "skip_layers": [1]}, False),
            ({"keep": [True] * 4, "skip_layers": None, "policy": None}, True),
            ({"keep": [True] * 4, "policy": "router"}, False),
            ({"skip_layers": [4]}, False),
            ({"policy": "random"}, False),
            ({"policy": "run_all", "skip_rate": 0}, True),
            ({"skip_rate": 0.25}, False),  # nothing was calibrated
            ({"seed": None, "temperature": None}, True),
        ):
            assert jsonschema.Draft202012Validator(schema).is_valid({**prompt, **body}) == valid
            status = running.post(max_tokens=1, **prompt, **body).status_code
            assert (status == 200) == valid, body


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_its_row(
    running: Running, taken: list[Request], streams: bool
) -> None:
    body = {"prompt": "a", "n": 16, "max_tokens": 400, "temperature": 0, "policy": "run_all"}
    body |= {"stream": streams, "logit_bias": {}}  # fields of others are let be
    before = running.scheduler.tokens
    client = http.client.HTTPConnection(running.url.removeprefix("http://"))
    client.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    while len(taken) < 16:
        time.sleep(0.001)
    client.close()
    idle(running)
    assert sum(request.cancelled for request in taken) >= 4
    told = sum(request.count for request in taken)
    assert running.scheduler.tokens - before == told < 16 * 400


def idle(running: Running) -> None:
    """Wait until nothing is answered."""
    end = time.monotonic() + 60
    while running.scheduler.active or running.scheduler.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_too_many_get_429_and_are_told_when_to_come_back(running: Running) -> None:
    body = {"prompt": ["a"] * 11, "n": 4, "max_tokens": 400, "temperature": 0}
    with httpx.stream(
        "POST", f"{running.url}/v1/completions", json={**body, "stream": True}
    ) as response:
        assert response.status_code == 200  # as many as may be there at all
        lines = response.iter_lines()  # kept: without it the stream would be closed
        next(lines)
        refused = running.post(**body)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    idle(running)
    assert running.post(prompt="a", max_tokens=2).status_code == 200


def test_what_openai_allows_is_taken(running: Running) -> None:
    nothing = dict.fromkeys(("n", "temperature", "top_p", "stream", "stop", "echo", "prefill"))
    default = {"frequency_penalty": 0.0, "best_of": 1, "logit_bias": {}, "tools": []}
    response = running.post(prompt="bees", max_tokens=3, seed=1, **nothing, **default)
    assert response.status_code == 200
    assert len(response.json()["choices"]) == 1
    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": "es"}]
    path, options = "/v1/chat/completions", {"max_tokens": 5, "temperature": 0}
    texts = []
    for content in ("bees", parts):
        messages = [{"role": "user", "content": content}]
        response = running.post(path, messages=messages, **options)
        texts.append(response.json()["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]
    parts = [{"type": "image_url", "image_url": {"url": "a"}}]
    response = running.post(path, messages=[{"role": "user", "content": parts}])
    assert response.status_code == 400


def test_roles_that_the_template_refuses_are_the_clients_fault(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('Roles must alternate') }}"
    monkeypatch.setattr(running.model.tokenizer, "chat_template", template)
    messages = [{"role": "user", "content": "a"}]
    response = running.post("/v1/chat/completions", messages=messages)
    assert response.status_code == 400
    assert "Roles must alternate" in response.json()["error"]["message"]


def test_keys_are_asked_for_where_one_is_set() -> None:
    one = Running(api_key="secret")
    try:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/metrics"):
                response = httpx.get(one.url + path, headers=headers)
                assert response.status_code == 401
        right = {"Authorization": "Bearer secret"}
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} secret"}
            assert httpx.get(f"{one.url}/v1/models", headers=headers).status_code == 200
        for path in ("/nowhere", "/nowhere/else"):
            httpx.get(one.url + path, headers=right)
        told = httpx.get(f"{one.url}/metrics", headers=right).text
        for route, status, count in (
            ("/v1/models", 401, 3),
            ("/metrics", 401, 3),
            ("other", 404, 2),
        ):
            line = f'firstlm_requests_total{{route="{route}",status="{status}"}} {count}.0'
            assert line in told
        assert httpx.get(f"{one.url}/health").status_code == 200
        assert httpx.get(f"{one.url}/").status_code == 200
    finally:
        one.close()


def test_answers_that_take_too_long_are_ended() -> None:
    one = Running(timeout=0.05, batch_size=1)
    try:
        body = {"prompt": "a", "n": 16, "max_tokens": 400, "temperature": 0}
        assert one.post(**body).status_code == 504
        lines = one.post(**body, stream=True).text
        assert "status_504" in lines
        assert lines.rstrip().endswith("[DONE]")
    finally:
        one.close()


def test_answers_that_the_end_cuts_off_get_503(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Running(batch_size=1)
    taken = watch(one.scheduler, monkeypatch)
    try:
        body = {"prompt": "a", "n": 16, "max_tokens": 400, "temperature": 0, "policy": "run_all"}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            whole = pool.submit(one.post, **body)
            stream = pool.submit(one.post, **body, stream=True)
            while len(taken) < 32:
                time.sleep(0.001)
            one.scheduler.close(0.01)
            assert whole.result().status_code == 503
            assert "shut down" in whole.result().json()["error"]["message"]
            assert "status_503" in stream.result().text
        assert httpx.get(f"{one.url}/health").status_code == 503
        assert one.post(prompt="a").status_code == 503
    finally:
        one.close()


@pytest.mark.skipif(not PROGRAM, reason="no Chromium is installed")
def test_the_page_shows_both_answers_and_which_layers_ran(running: Running, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(running.url)
        browser.wait("document.querySelectorAll('#routed .strip li').length == 4")
        browser.read("document.getElementById('prompt').value = 'bees'")
        browser.read("document.getElementById('rate').value = 0")
        browser.read("document.getElementById('tokens').value = 9")
        browser.read("document.getElementById('prompt').focus()")
        browser.type("Enter", modifiers=2)  # with control, as the keyboard alone must do
        browser.wait("document.getElementById('status').textContent.startsWith('Both')")
        for card in ("routed", "full"):
            query = f"document.querySelector('#{card} %s')"
            found = browser.read(query % ".answer" + ".textContent")
            assert found == wanted(running, "bees", 9, RunAll())
            label = query % ".strip" + ".getAttribute('aria-label')"
            assert browser.read(label) == "All layers are kept"
            assert "TTFT" in browser.read(query % "dl" + ".innerText")
        # Without thresholds no other rate can be met: the page says so, and goes on.
        browser.read("document.getElementById('rate').value = 25")
        browser.read("document.getElementById('go').click()")
        browser.wait("document.getElementById('status').className == 'bad'")
        assert "calibrat" in browser.read("document.getElementById('status').textContent")
        assert not browser.read("document.getElementById('go').disabled")
        unnamed = "[...document.querySelectorAll('textarea, input')].filter(x => !x.labels.length)"
        assert browser.read(f"{unnamed}.length") == 0
        browser.open(running.url, width=320)
        browser.wait("document.querySelectorAll('#routed .strip li').length == 4")
        assert browser.read("document.documentElement.scrollWidth") <= 320
        outside = "performance.getEntriesByType('resource').map(x => x.name)"
        assert all(name.startswith(running.url) for name in browser.read(outside))
    finally:
        browser.close()


@pytest.mark.skipif(not PROGRAM, reason="no Chromium is installed")
def test_the_page_asks_for_a_key_and_knows_rates_and_answers_that_break_off(tmp_path: Path) -> None:
    one = Running(api_key="secret")
    one.model.thresholds.table["skip"] = [Threshold(0.25, -1.0, 0.25), Threshold(0.4, -2.0, 0.402)]
    browser = Browser(tmp_path / "profile")
    try:
        browser.open(one.url)
        browser.wait("document.getElementById('key-row')?.hidden === false")
        browser.read("document.getElementById('key').value = 'wrong'")
        change = "document.getElementById('key').dispatchEvent(new Event('change'))"
        browser.read(change)
        browser.read("document.getElementById('key').value = 'secret'")
        browser.read(change)
        browser.wait("document.querySelectorAll('#routed .strip li').length == 4")
        browser.read("document.getElementById('rate').value = 50")
        assert browser.read("document.getElementById('rate').value") == "40"
        broken = 'data: {"choices": [{"text": "a"}]}\\n\\n'
        browser.read(f"window.fetch = async () => new Response('{broken}')")
        browser.read("document.getElementById('go').click()")
        browser.wait("document.getElementById('status').className == 'bad'")
        assert "broke off" in browser.read("document.getElementById('status').textContent")
    finally:
        browser.close()
        one.close()


def test_metrics_count_what_happened(running: Running) -> None:
    def read() -> dict[str, float]:
        lines = httpx.get(f"{running.url}/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = read()
    running.post(prompt="bees", max_tokens=5, temperature=0, keep=[True, False, True, False])
    running.post(prompt="bees", max_tokens=0)
    after = read()
    assert all(name.startswith("firstlm_") for name in after)
    route = 'firstlm_requests_total{route="/v1/completions",status="%d"}'
    assert after[route % 200] - before.get(route % 200, 0) == 1
    assert after[route % 400] - before.get(route % 400, 0) == 1
    assert after["firstlm_tokens_total"] - before["firstlm_tokens_total"] in (1, 2, 3, 4, 5)
    assert after["firstlm_ttft_seconds_count"] - before["firstlm_ttft_seconds_count"] == 1
    assert after["firstlm_skip_rate_sum"] - before["firstlm_skip_rate_sum"] == 0.5
    assert after["firstlm_active"] == 0


def test_many_clients_with_other_masks_get_their_own_answers(running: Running) -> None:
    masks = [[True, a, b, True] for a in (True, False) for b in (True, False)]
    texts = [f"bees {i}" for i in range(6)]
    right = {
        (text, tuple(mask)): wanted(running, text, 12, FixedMask(mask))
        for text in texts
        for mask in masks
    }
    assert len(set(right.values())) > 12

    def ask(turn: int) -> None:
        text, mask = texts[turn % 6], masks[turn % 4]
        while True:
            response = running.post(prompt=text, keep=mask, max_tokens=12, temperature=0)
            if response.status_code != 429:
                break
            time.sleep(0.05)
        assert response.json()["choices"][0]["text"] == right[text, tuple(mask)]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        list(pool.map(ask, range(96)))


def write_artifact(folder: Path, lora: LoraConfig | None = None) -> FirstModel:
    """Write a tiny model to `base` and routers for it, and LoRA, to `artifact`."""
    tiny_llama().save_pretrained(folder / "base")
    tokenizer = make_byte_tokenizer()
    tokenizer.model_max_length = 1000  # beyond which transformers warns
    tokenizer.save_pretrained(folder / "base")
    base, tokenizer = load_base(str(folder / "base"))
    first = FirstModel.from_base(get_peft_model(base, lora) if lora else base, tokenizer=tokenizer)
    first.save_pretrained(str(folder / "artifact"))
    return first


def test_what_is_served_has_its_lora_merged(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    first = write_artifact(tmp_path, lora)
    options = ServeConfig(artifact=str(tmp_path / "artifact"), model=str(tmp_path / "base"))
    served = load(options)
    ids = torch.arange(1, 9)[None]
    assert not served.has_adapter
    assert torch.allclose(served.forward(ids)[0].logits, first.forward(ids)[0].logits, atol=1e-5)


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} cannot .* in use\. Name another"):
            run(ServeConfig(artifact="nowhere", port=port))
    with pytest.raises(ConfigError, match=r"nobody.invalid:8000 cannot be listened on"):
        run(ServeConfig(artifact="nowhere", host="nobody.invalid", api_key="k"))
    assert "Serving" not in capsys.readouterr().err


class Serving:
    """`firstlm serve` in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        write_artifact(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "firstlm", "serve", str(folder / "artifact"), *words]
        self.process = subprocess.Popen(
            [*command, "--model", str(folder / "base"), "--port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Serving:
        """Wait until it answers."""
        for _ in range(600):
            try:
                assert self.health() == 200
                return self
            except httpx.TransportError:
                assert self.process.poll() is None
                time.sleep(0.1)
        raise AssertionError("it never answered")

    def __exit__(self, *_: object) -> None:
        self.process.kill()

    def health(self) -> int:
        return httpx.get(f"{self.url}/health").status_code

    def stream(self) -> Any:
        body = {"prompt": "a", "n": 16, "max_tokens": 400, "temperature": 0, "stream": True}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60)

    def terminate(self) -> None:
        """Send SIGTERM, and wait until it was heard."""
        self.process.send_signal(signal.SIGTERM)
        while self.health() == 200:
            time.sleep(0.01)


def test_sigterm_lets_answers_finish_and_sends_others_away(tmp_path: Path) -> None:
    with Serving(tmp_path, "--batch-size", "2") as one:
        # Longer than the model reads, of which transformers warns.
        long = {"prompt": "a" * 3000}
        assert httpx.post(f"{one.url}/v1/completions", json=long, timeout=10).status_code == 400
        with one.stream() as response:
            lines = response.iter_lines()
            next(lines)
            one.terminate()
            refused = httpx.post(f"{one.url}/v1/completions", json={"prompt": "b"}, timeout=10)
            assert refused.status_code == 503
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] in ("length", "stop")
        assert one.process.wait(20) == 0
        text = one.process.stderr.read().partition("Serving ")[2].splitlines()[1:]
        log = [json.loads(line) for line in text]  # each is one
        assert {"closing", "answer"} <= {line["event"] for line in log}


def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    words = ["--engine", "hf", "--batch-size", "1", "--grace", "50"]
    with Serving(tmp_path, *words) as one, one.stream() as response:
        lines = response.iter_lines()  # kept: without it the stream would be closed
        next(lines)
        one.terminate()
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(5) == 0
