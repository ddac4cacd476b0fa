# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server for one machine: rows with different masks in one batch.

One process, one model, one batch (`scheduler`). The page at `/` shows what is skipped.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

from firstlm.api import (
    Answer,
    ChatRequest,
    CompletionRequest,
    Failure,
    Form,
    TextSoFar,
    failure,
    usage,
)
from firstlm.command_config import ServeConfig
from firstlm.description import describe
from firstlm.errors import ConfigError, FirstError, first_line
from firstlm.fast_batch import BLOCK
from firstlm.inputs import kv_token_bytes
from firstlm.model import FirstModel
from firstlm.rows import is_text
from firstlm.scheduler import Ask, ClosedError, Piece, QueueFullError, Scheduler

LOG = logging.getLogger("firstlm.server")
RETRY_AFTER = 1  # seconds
LEFT = 499  # to a client that has gone; nobody reads it
BODY_SECONDS = 30.0  # in which the body of a request must have come
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure, "description": text}
    for code, text in {
        400: "the request cannot be answered as asked",
        401: "the API key is missing or wrong",
        404: "there is no such model",
        408: "the body took too long",
        413: "the body is too large",
        429: "too many requests wait",
        500: "the answer failed",
        503: "the server is shutting down",
        504: "the answer took too long",
    }.items()
}
ANSWERS = FAILURES | {
    200: {
        "description": "the answer; with `stream`, its parts as they come",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


class Metrics:
    """What Prometheus reads of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "firstlm_requests", "Requests by route and status", ["route", "status"], **more
        )
        self.tokens = Counter("firstlm_tokens", "Tokens of answers", **more)
        self.ttft = Histogram(
            "firstlm_ttft_seconds", "Time to the first token", buckets=SECONDS, **more
        )
        self.tpot = Histogram(
            "firstlm_tpot_seconds", "Time per token after it", buckets=SECONDS, **more
        )
        self.skip_rate = Histogram(
            "firstlm_skip_rate",
            "Share of layers an answer skipped",
            buckets=[x / 20 for x in range(1, 21)],
            **more,
        )
        for name, text, read in (
            ("firstlm_queue", "Requests that wait", lambda: len(scheduler.waiting)),
            ("firstlm_active", "Requests that are being answered", lambda: scheduler.active),
            ("firstlm_kv_bytes", "Bytes of keys and values", lambda: scheduler.kv_bytes),
        ):
            Gauge(name, text, **more).set_function(read)

    def ended(self, answer: Answer) -> None:
        """Count an answer that ended."""
        request = answer.request
        self.tokens.inc(answer.count)
        if request.first is not None:
            self.ttft.observe(request.first - request.arrived)
        if answer.tpot is not None:
            self.tpot.observe(answer.tpot)
        if request.keep is not None:
            self.skip_rate.observe(1 - float(request.keep.float().mean()))


@dataclass
class Server:
    """The state of one server; its methods are what routes do."""

    model: FirstModel
    scheduler: Scheduler
    options: ServeConfig
    name: str
    closing: bool = False

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.scheduler)
        self._reader = ThreadPoolExecutor(1, "firstlm-reader")
        base = self.model.plain_base
        self.kv_token_bytes = kv_token_bytes(base.config, base.dtype.itemsize)
        # One object for equal wishes: prompts whose policy is the same one are read together.
        self.policy = lru_cache(maxsize=64)(self.model.choices.asked)

    def check_name(self, model: str | None) -> None:
        """Answer 404 where another model than the one here is asked for."""
        if model not in (None, self.name):
            raise HTTPException(404, f"There is no model {model!r} here, but {self.name!r}.")

    def prompts(self, body: CompletionRequest | ChatRequest) -> list[list[int]]:
        """Return the token ids of each prompt."""
        tokenizer = self.model.tokenizer
        if isinstance(body, ChatRequest):
            if not getattr(tokenizer, "chat_template", None):
                raise ConfigError("This model has no chat template; use /v1/completions.")
            messages = [{"role": m.role, "content": m.text} for m in body.messages]
            try:
                found = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except TemplateError as error:
                raise ConfigError(
                    f"The model's chat template refuses these messages: {first_line(error)}"
                ) from error
            return [list(found)]
        prompt: Any = body.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise ConfigError("There is no prompt; expected a text, texts, or token ids.")
        if len(prompt) > self.options.max_prompts:
            raise ConfigError(f"{len(prompt)} prompts; at most {self.options.max_prompts} at once.")
        return [tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in prompt]

    def asks(self, body: CompletionRequest | ChatRequest) -> list[Ask]:
        """Return what a request asks for: n answers to each prompt."""
        if not is_text(json.dumps(body.model_dump(), ensure_ascii=False)):
            raise ConfigError("The request holds half a surrogate pair, which is no text.")
        masks = (None if m is None else tuple(m) for m in (body.keep, body.skip_layers))
        policy = self.policy(body.policy, body.skip_rate, *masks, body.prefill)
        longest = body.max_tokens
        logprobs = body.logprobs
        if isinstance(body, ChatRequest):
            longest = body.max_completion_tokens or longest
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
        default, most_tokens = self.options.default_tokens, self.options.max_tokens
        prompts, most = self.prompts(body), self.options.batch_size + self.options.queue_size
        if len(prompts) * body.n > most:
            raise ConfigError(
                f"{body.n} answers to each of {len(prompts)} prompts; at most {most} at once."
            )
        found = []
        for ids in prompts:
            for turn in range(body.n):
                seed = None if body.seed is None else (body.seed + turn) % 2**63
                ask = Ask(
                    ids=ids,
                    policy=policy,
                    prefill=body.prefill,
                    max_new_tokens=min(longest or self._left(ids, default), most_tokens),
                    temperature=body.temperature,
                    top_p=body.top_p,
                    seed=seed,
                    logprobs=logprobs if logprobs is None else int(logprobs),
                )
                self.scheduler.check(ask)
                found.append(ask)
        return found

    def _left(self, ids: Sequence[int], wanted: int) -> int:
        """Return how many tokens of an answer fit behind a prompt, at most as many as wanted."""
        limits = (self.model.context_length, self.options.batch_tokens // BLOCK * BLOCK)
        return max(min([wanted, *(n - len(ids) for n in limits if n is not None)]), 1)

    async def answer(self, body: CompletionRequest | ChatRequest, http: HttpRequest) -> Response:
        """Answer a request, whole or in parts."""
        if self.closing:
            raise HTTPException(503, "The server is shutting down; ask another one.")
        self.check_name(body.model)
        loop = asyncio.get_running_loop()
        # A long text takes seconds; one at a time, as they came.
        asks = await loop.run_in_executor(self._reader, self.asks, body)
        arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

        def teller(index: int) -> Any:
            return lambda piece: loop.call_soon_threadsafe(arrived.put_nowait, (index, piece))

        answers: list[Answer] = []
        try:
            for index, ask in enumerate(asks):
                request = self.scheduler.submit(ask, teller(index))
                text = TextSoFar(self.model.tokenizer, body.stops)
                answers.append(Answer(index, request, text, self.kv_token_bytes))
        except FirstError:
            self._cancel(answers)
            raise
        form = Form(isinstance(body, ChatRequest), self.name, self.model.tokenizer)
        parts = self._parts(answers, arrived)
        prompt_tokens = sum(len(ask.ids) for ask in asks[:: body.n])
        if body.stream:
            told = bool((body.stream_options or {}).get("include_usage"))
            stream = self._stream(form, answers, parts, prompt_tokens if told else None)
            return StreamingResponse(stream, media_type="text/event-stream")
        reading = asyncio.ensure_future(_read(parts))
        leaving = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=LEFT)
            reading.result()
        finally:
            for task in (reading, leaving):
                task.cancel()
            self._cancel(answers)
            # Python 3.11's wait_for may swallow a cancel, and something else be raised then.
            await asyncio.gather(reading, leaving, return_exceptions=True)
        return JSONResponse(form.whole(answers, prompt_tokens))

    async def _parts(
        self, answers: Sequence[Answer], arrived: asyncio.Queue[tuple[int, Piece]]
    ) -> AsyncIterator[tuple[Answer, str]]:
        """Yield text as it is certain, until all answers have ended."""
        until = time.monotonic() + self.options.timeout
        try:
            while any(answer.finish is None for answer in answers):
                left = until - time.monotonic()
                try:
                    index, piece = await asyncio.wait_for(arrived.get(), max(left, 0.001))
                except TimeoutError:
                    raise HTTPException(
                        504, f"The answer took longer than {self.options.timeout:g} s."
                    ) from None
                answer = answers[index]
                if answer.finish is not None:
                    continue
                if piece.finish == "error":
                    raise HTTPException(500, "The model failed; the server's log says how.")
                if piece.finish == "cancelled":  # not by us: we read no more of what we cancel
                    raise HTTPException(503, "The server has shut down amid this answer.")
                new = answer.take(piece)
                if answer.text.stopped:
                    self.scheduler.cancel(answer.request)
                if answer.finish:
                    self._ended(answer)
                if new or answer.finish:
                    yield answer, new
        finally:
            self._cancel(answers)

    def _ended(self, answer: Answer) -> None:
        self.metrics.ended(answer)
        LOG.info(
            "answer",
            extra={
                "fields": {
                    "prompt_tokens": len(answer.request.ask.ids),
                    "tokens": answer.count,
                    "finish": answer.finish,
                    **{k: v for k, v in answer.about().items() if k != "keep"},
                }
            },
        )

    def _cancel(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            if answer.finish is None:
                self.scheduler.cancel(answer.request)

    async def _stream(
        self, form: Form, answers: Sequence[Answer], parts: Any, prompt_tokens: int | None
    ) -> AsyncIterator[str]:
        """Yield server-sent events."""
        if form.chat:
            for answer in answers:
                yield _event(form.role(answer))
        try:
            async for answer, text in parts:
                yield _event(form.part(answer, text))
        except HTTPException as error:
            yield _event(failure(str(error.detail), f"status_{error.status_code}"))
        else:
            if prompt_tokens is not None:
                tokens = sum(answer.count for answer in answers)
                yield _event(
                    {**form.head(part=True), "choices": [], "usage": usage(prompt_tokens, tokens)}
                )
        yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _read(parts: Any) -> None:
    async for _ in parts:
        pass


async def _gone(http: HttpRequest) -> None:
    """Return once the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def create_app(server: Server) -> FastAPI:
    """Return the application with all routes."""
    app = FastAPI(
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
        title="firstlm",
        description="Answers of a language model that skips layers a prompt does not need.",
        version="1",
    )
    app.add_middleware(Guard, server=server)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            why, place = first["ctx"]["error"], first["loc"][-1] + 1
            text = f"The body is no JSON: {why}, at character {place}."
            return JSONResponse(failure(text, "invalid_request"), 400)
        where = ".".join(str(part) for part in first["loc"][1:])
        text = first["msg"].removeprefix("Value error, ")  # pydantic's, before one of ours
        text = f"{where}: {text}" if where else text
        return JSONResponse(failure(text, "invalid_request", where or None), 400)

    @app.exception_handler(FirstError)
    async def refused(_: HttpRequest, error: FirstError) -> JSONResponse:
        if isinstance(error, QueueFullError):
            body = failure(str(error), "rate_limit")
            return JSONResponse(body, 429, headers={"Retry-After": str(RETRY_AFTER)})
        if isinstance(error, ClosedError):
            return JSONResponse(failure(str(error), "unavailable"), 503)
        return JSONResponse(failure(str(error), "invalid_request"), 400)

    @app.exception_handler(StarletteHTTPException)  # what there is no route for, too
    async def failed(_: HttpRequest, error: StarletteHTTPException) -> JSONResponse:
        body = failure(str(error.detail), f"status_{error.status_code}")
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.get("/health", responses={503: FAILURES[503]})
    async def health() -> JSONResponse:
        """Say whether new requests are taken."""
        status = "closing" if server.closing else "ok" if server.scheduler.alive else "dead"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={401: FAILURES[401]})
    async def metrics() -> Response:
        """Tell Prometheus."""
        text = generate_latest(server.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)

    @app.get("/v1/models", responses={401: FAILURES[401]})
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [about_model()]}

    @app.get("/v1/models/{name:path}", responses={401: FAILURES[401], 404: FAILURES[404]})
    async def one_model(name: str) -> dict[str, Any]:
        """Describe the model, if it is the one that is here."""
        server.check_name(name)
        return about_model()

    def about_model() -> dict[str, Any]:
        about = {
            "layers": server.model.layer_count,
            "skip_rates": sorted(
                {row.rate for row in server.model.thresholds.table.get("skip", [])}
            ),
            "chat": bool(getattr(server.model.tokenizer, "chat_template", None)),
        }
        one = {"id": server.name, "object": "model", "created": 0, "owned_by": "firstlm"}
        return one | {"firstlm": about}

    @app.post("/v1/completions", responses=ANSWERS, response_model=None)
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        """Go on with a text."""
        return await server.answer(body, http)

    @app.post("/v1/chat/completions", responses=ANSWERS, response_model=None)
    async def chats(body: ChatRequest, http: HttpRequest) -> Response:
        """Answer a chat."""
        return await server.answer(body, http)

    plain = app.openapi

    def described() -> dict[str, Any]:
        """Return the description, with what depends on the model that is here."""
        if app.openapi_schema is None:
            describe(plain()["components"]["schemas"], server.model)
        return app.openapi_schema or {}

    app.openapi = described

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        """Show a page to look at."""
        return resources.files("firstlm").joinpath("page.html").read_text(encoding="utf-8")

    return app


class Guard:
    """Refuses what is too large or has no key, before anything reads it; counts all answers."""

    OPEN = ("/health", "/")

    def __init__(self, app: Any, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.lower(): value for key, value in scope["headers"]}
        status = 500

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal, body = self._refusal(scope["path"], headers), b""
            if not refusal:
                try:
                    async with asyncio.timeout(BODY_SECONDS):
                        body = await self._read(receive)
                except TimeoutError:
                    text = f"The body did not come within {BODY_SECONDS:g} s."
                    refusal = JSONResponse(failure(text, "timeout"), 408)
            if body is None:
                refusal = self._too_large()
            await (refusal or self.app)(scope, self._again(body, receive), noting)
        finally:
            # What is refused here never comes to its route.
            known = {route.path for route in scope["app"].routes}
            route = scope["path"] if scope["path"] in known else "other"
            if route == "other" and scope["path"].startswith("/v1/models/"):
                route = "/v1/models/{name}"
            self.server.metrics.requests.labels(route, str(status)).inc()
            if status >= 400 and status != LEFT:
                fields = {"route": route, "method": scope["method"], "status": status}
                LOG.warning("refused" if status < 500 else "failed", extra={"fields": fields})

    async def _read(self, receive: Any) -> bytes | None:
        """Return a request's body, or None where it is too large."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.server.options.max_body:
                return None
            more = message.get("more_body", False)
        return b"".join(parts)

    def _again(self, body: bytes | None, receive: Any) -> Any:
        """Return a `receive` that brings the body first, then what else comes."""
        first = {"type": "http.request", "body": body or b"", "more_body": False}
        coming = [first]

        async def again() -> Any:
            return coming.pop() if coming else await receive()

        return again

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        key = self.server.options.api_key
        if key and path not in self.OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, key.encode()):
                body = failure("The API key is missing or wrong.", "unauthorized")
                return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.server.options.max_body:
            return self._too_large()
        return None

    def _too_large(self) -> JSONResponse:
        limit = self.server.options.max_body
        return JSONResponse(failure(f"The body is larger than {limit} bytes.", "too_large"), 413)
