# SPDX-License-Identifier: Apache-2.0
"""What clients of the server may send, and what they get: OpenAI's forms with our options added.

Text and JSON only; `server` connects them with the scheduler.
"""

from __future__ import annotations

import bisect
import difflib
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    field_validator,
    model_validator,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from firstlm.scheduler import Piece, Request

TOKEN_LIMIT = 2**31 - 1
SPACE = "\u2581"  # how sentencepiece writes one
REPLACEMENT = "\ufffd"  # what a part of a character is decoded to
NUMBERS = (
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "n",
    "seed",
    "skip_rate",
    "top_logprobs",
)


def _no_bool(value: Any) -> Any:
    """Take neither true nor "1" for the number 1."""
    if isinstance(value, bool | str):
        raise ValueError("expected a number")
    return value


EXTENSIONS = ("skip_rate", "policy", "keep", "skip_layers", "prefill")  # that OpenAI has not
SIMILARITY = 0.85  # from which on an unknown name is taken for one of these with a slip in it

_Layer = Annotated[int, BeforeValidator(_no_bool)]

# Fields of OpenAI's that change answers and are not offered, with values that change nothing.
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


class Options(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _as_openai_has_it(cls, body: Any) -> Any:
        """Let null mean what a field that is left out does; refuse fields that are not offered."""
        if isinstance(body, dict):
            body = {name: value for name, value in body.items() if value is not None}
            for name, without in NOT_OFFERED.items():
                if body.get(name, without[0]) not in without:
                    raise ValueError(f"{name} is not offered here; leave it out")
        return body

    @model_validator(mode="before")
    @classmethod
    def _without_slips(cls, body: Any) -> Any:
        """Pass unknown names over, as other servers' may be, unless they look like one of ours."""
        if isinstance(body, dict) and len(unknown := body.keys() - cls.model_fields.keys()) < 99:
            for name in unknown:
                if near := difflib.get_close_matches(str(name)[:99], EXTENSIONS, 1, SIMILARITY):
                    raise ValueError(f"there is no field {name!r}; did you mean {near[0]}?")
        return body

    _numbers = field_validator(*NUMBERS, mode="before", check_fields=False)(_no_bool)

    model: str | None = Field(None, description="name from /v1/models; may be left out")
    max_tokens: int | None = Field(None, ge=1, le=TOKEN_LIMIT, description="longest answer")
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16, description="answers to each prompt")
    seed: int | None = Field(None, description="modulo 2**63")
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = Field(
        None, description="texts that end an answer, up to 16"
    )
    stream: StrictBool = False
    stream_options: dict[str, Any] | None = None
    skip_rate: float | None = Field(None, ge=0, lt=1, description="share of layers to skip")
    policy: Literal["router", "run_all", "majority", "unified", "random"] | None = Field(
        None, description="what decides which layers run"
    )
    keep: Annotated[list[StrictBool], Field(fail_fast=True)] | None = Field(
        None, description="per layer, whether it runs: a mask of yours"
    )
    skip_layers: Annotated[list[_Layer], Field(fail_fast=True)] | None = Field(
        None, description="in place of `keep`: the layers that do not run"
    )
    prefill: Literal["skip", "full"] = Field("skip", description="whether the prompt skips, too")

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in found if text]


def _kind(part: Any) -> type:
    """Return a part's type; JSON tells no 1.0 from 1."""
    return int if isinstance(part, float) and part.is_integer() else type(part)


def _of_one_kind(prompt: Any) -> Any:
    """Refuse a prompt of mixed parts at once: pydantic would tell of each, in each of four ways."""
    parts = prompt if isinstance(prompt, list) else []
    kinds, allowed = set(map(_kind, parts)), {str, int}
    if kinds == {list}:
        kinds, allowed = {_kind(token) for part in parts for token in part}, {int}
    if len(kinds) > 1 or not kinds <= allowed:
        raise ValueError("expected a text, texts, token ids, or lists of token ids")
    return prompt


class CompletionRequest(Options):
    """Body of /v1/completions."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_of_one_kind)]
    logprobs: int | None = Field(None, ge=0, le=20, description="likeliest tokens to tell")

    _also_a_number = field_validator("logprobs", mode="before")(_no_bool)


class TextPart(BaseModel):
    """A part of a message; there are only texts."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(Options):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=TOKEN_LIMIT)
    logprobs: StrictBool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class Failure(BaseModel):
    """Body of an answer that says what was wrong."""

    error: dict[str, Any]


def failure(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": kind}}


class TextSoFar:
    """The text of an answer as its tokens come; holds back what may still change.

    Args:
        tokenizer: decodes.
        stops: texts that end the answer, and are no part of it.

    Attributes:
        text: of all tokens so far, up to a stop.
        offsets: how many characters of it come before each token.
        told: how many characters were told.
        stopped: whether a stop has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.text = ""
        self.offsets: list[int] = []
        self.told = 0
        self.stopped = False
        self._settled = 0  # characters that no later token changes
        self._from, self._to = 0, 0  # tokens: the last that made some, and those after them

    def add(self, token: int | None, last: bool) -> str:
        """Take a token, or the end; returns text that is certain and was not told yet."""
        if token is not None:
            self.ids.append(token)
            self.offsets.append(self._settled)
            self._decode()
        # No stop begins in what was told: what may become one is held back.
        found = [place for stop in self.stops if (place := self.text.find(stop, self.told)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            self.offsets = [min(offset, len(self.text)) for offset in self.offsets]
        end = len(self.text)
        if not (last or self.stopped):
            end -= self._uncertain()
        new = self.text[self.told : end]
        self.told = max(self.told, end)
        return new

    def _decode(self) -> None:
        """Add what the last token says; the tokens before it say whether a space comes first."""
        known = self.tokenizer.decode(self.ids[self._from : self._to], skip_special_tokens=True)
        found = self.tokenizer.decode(self.ids[self._from :], skip_special_tokens=True)
        self.text = self.text[: self._settled] + found[len(known) :]
        if len(found) > len(known) and not found.endswith(REPLACEMENT):
            self._settled = len(self.text)
            self._from, self._to = self._to, len(self.ids)

    def _uncertain(self) -> int:
        """Return how many characters at the end may turn into others, or into a stop."""
        broken = len(self.text) - len(self.text.rstrip(REPLACEMENT))
        begun = [
            size
            for stop in self.stops
            for size in range(1, min(len(stop), len(self.text) + 1))
            if self.text.endswith(stop[:size])
        ]
        return max([broken, *begun])


@dataclass
class Answer:
    """One choice of a response while it comes.

    Attributes:
        index: of the choice.
        request: whose tokens these are; it may be some tokens ahead.
        text: of the answer.
        kv_token_bytes: bytes that a layer stores of a token.
        pieces: its tokens, without the one that ended it.
        shown: how many of them a stream has told.
        count: tokens so far, with the one that ended it.
        finish: how it ended; None while it goes on.
        ended: when, on `time.perf_counter`'s clock.
    """

    index: int
    request: Request
    text: TextSoFar
    kv_token_bytes: int
    pieces: list[Piece] = field(default_factory=list)
    shown: int = 0
    begun: bool = False
    count: int = 0
    finish: str | None = None
    ended: float | None = None

    def take(self, piece: Piece) -> str:
        """Take a piece; returns text that is certain and was not told yet."""
        # The token that ends an answer is no part of it.
        token = None if piece.finish == "stop" else piece.token
        new = self.text.add(token, piece.finish is not None)
        self.count += piece.token is not None
        if token is not None:
            self.pieces.append(piece)
        self.finish = "stop" if self.text.stopped else piece.finish
        if self.finish:
            self.ended = self.request.finished or time.perf_counter()
        return new

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first, of an answer that ended with two or more."""
        if self.ended is None or self.request.first is None or self.count < 2:
            return None
        return (self.ended - self.request.first) / (self.count - 1)

    def about(self) -> dict[str, Any]:
        """Return what we tell beyond OpenAI's form."""
        request = self.request
        keep = request.keep
        first = None if request.first is None else request.first - request.arrived
        return {
            "keep": None if keep is None else keep.tolist(),
            "skip_rate": None if keep is None else 1 - float(keep.float().mean()),
            "kv_bytes": None
            if keep is None
            else int(keep.sum()) * (len(request.ask.ids) + self.count) * self.kv_token_bytes,
            "ttft_ms": None if first is None else 1e3 * first,
            "tpot_ms": None if self.tpot is None else 1e3 * self.tpot,
        }


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return how many tokens there were."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }


@dataclass
class Form:
    """How answers are written down: as a completion or a chat, whole or in parts.

    Attributes:
        chat: whether it is a chat.
        model: its name.
        tokenizer: decodes tokens for log probabilities.
    """

    chat: bool
    model: str
    tokenizer: Any
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, part: bool) -> dict[str, Any]:
        """Return the fields around the choices."""
        kind = ("chat.completion" + (".chunk" if part else "")) if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def role(self, answer: Answer) -> dict[str, Any]:
        """Return the chunk with which a chat begins."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": answer.index, "delta": delta, "finish_reason": None}
        return {**self.head(part=True), "choices": [choice]}

    def part(self, answer: Answer, text: str) -> dict[str, Any]:
        """Return a chunk of a stream: text, and the tokens that begin in it or before."""
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": answer.finish}
        if self.chat:
            choice["delta"] = {"content": text} if text or not answer.finish else {}
        else:
            choice["text"] = text
        offsets, told = answer.text.offsets, answer.text.told
        end = len(offsets) if answer.finish else bisect.bisect_left(offsets, told)
        start, answer.shown = answer.shown, end
        choice["logprobs"] = self.logprobs(answer, start, end) if end > start else None
        # Layers are known from the first chunk on, times at the last.
        more = {} if answer.begun and not answer.finish else {"firstlm": answer.about()}
        answer.begun = True
        return {**self.head(part=True), "choices": [choice | more]}

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
        """Return a response."""
        choices = []
        for answer in answers:
            text = answer.text.text
            choice: dict[str, Any] = {"index": answer.index, "finish_reason": answer.finish}
            if self.chat:
                choice["message"] = {"role": "assistant", "content": text}
            else:
                choice["text"] = text
            choice["logprobs"] = self.logprobs(answer, 0, len(answer.pieces))
            choices.append(choice | {"firstlm": answer.about()})
        tokens = sum(answer.count for answer in answers)
        return {
            **self.head(part=False),
            "choices": choices,
            "usage": usage(prompt_tokens, tokens),
        }

    def logprobs(self, answer: Answer, start: int, end: int) -> dict[str, Any] | None:
        """Return log probabilities of some of an answer's tokens, or None where none were asked."""
        if answer.request.ask.logprobs is None:
            return None
        told = answer.pieces[start:end]
        if self.chat:
            return {
                "content": [
                    {
                        **self._token(piece.token, piece.logprob),
                        "top_logprobs": [self._token(*pair) for pair in piece.top],
                    }
                    for piece in told
                ],
                "refusal": None,
            }
        return {
            "tokens": [self._spelt(piece.token)[0] for piece in told],
            "token_logprobs": [piece.logprob for piece in told],
            "top_logprobs": [self._by_name(piece.top) for piece in told],
            "text_offset": answer.text.offsets[start:end],
        }

    def _token(self, token: Any, value: Any) -> dict[str, Any]:
        name, found = self._spelt(token)
        return {"token": name, "logprob": value, "bytes": list(found)}

    def _by_name(self, top: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return probabilities by name, likeliest first; of two with one name the likelier."""
        named: dict[str, float] = {}
        for token, value in top:
            named.setdefault(self._spelt(token)[0], value)
        return named

    def _spelt(self, token: Any) -> tuple[str, bytes]:
        """Return a token's name and bytes; parts of characters are named as OpenAI spells bytes."""
        found = token_bytes(self.tokenizer, token)
        try:
            return found.decode(), found
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found


@cache
def _byte_of_char() -> dict[str, int]:
    """Return the bytes that characters stand for in byte-level BPE's vocabularies (GPT-2's)."""
    return {char: byte for byte, char in bytes_to_unicode().items()}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token adds to a text; they may be a part of a character."""
    text, piece = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if isinstance(piece, bytes):
        return piece
    if REPLACEMENT in text:
        if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # of sentencepiece
            return bytes.fromhex(found[1])
        if all(char in _byte_of_char() for char in piece):
            return bytes(_byte_of_char()[char] for char in piece)
    if piece is not None and piece.startswith(SPACE):  # decoders strip it from a text's first token
        return piece.replace(SPACE, " ").encode()
    return text.encode()
