# SPDX-License-Identifier: Apache-2.0
"""Requests that come and go, answered together: one thread owns the model and its batch.

Each request has its own policy, skip rate, sampling and length. It joins the rows that are being
decoded as soon as there is room, and leaves when it ends or is cancelled. Knows token ids only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from firstlm.errors import ConfigError, FirstError
from firstlm.fast_batch import FastBatch, in_blocks
from firstlm.generate import Decoding, check_sampling, decode_step, end_ids, pick, prefill
from firstlm.inputs import check_ids, pad_left
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Policy, SteppedPolicy

LOG = logging.getLogger(__name__)
GROUP_TOKENS = 4096  # of prompts that run together, padding among them


class QueueFullError(FirstError):
    """As many requests wait as may."""


class ClosedError(FirstError):
    """No new requests are taken: the scheduler was closed, or its thread has died."""


@dataclass(frozen=True)
class Ask:
    """What a request wants.

    Attributes:
        ids: tokens of the prompt.
        policy: what decides which layers run; default the routers.
        skip_rate: share of layers to skip.
        prefill: "skip" or "full".
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token, above 0 samples.
        top_p: sample from the likeliest tokens that make up this share.
        seed: of sampling; what a request draws depends on nothing else.
        eos_token_ids: ids that end the answer; default the model's own.
        logprobs: how many of the likeliest tokens to tell at each step; None: no probabilities.
    """

    ids: Sequence[int]
    policy: Policy | None = None
    skip_rate: float | None = None
    prefill: str = "skip"
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    eos_token_ids: Sequence[int] | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Piece:
    """A token of an answer, or its end.

    Attributes:
        token: the token; None at an end that brings none.
        finish: "stop", "length", "cancelled", "error", or None where the answer goes on.
        logprob: natural logarithm of the token's probability before temperature; None if not asked.
        top: the likeliest tokens with theirs.
        error: what went wrong.
    """

    token: int | None
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None


@dataclass(eq=False)
class Request:
    """A request that was taken.

    Attributes:
        ask: what it wants.
        tell: is called with every piece, in the scheduler's thread; if it raises, the request is
            cancelled.
        ends: ids that end the answer.
        keep: [layers] bool, once the prompt has run.
        arrived: when it came, on `time.perf_counter`'s clock.
        started: when its prompt began to run.
        room: for how many tokens it has memory from then on.
        first: when its first token was there.
        finished: when it ended.
        count: tokens so far.
    """

    ask: Ask
    tell: Callable[[Piece], None]
    ends: frozenset[int]
    keep: torch.Tensor | None = None
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    room: int = 0
    first: float | None = None
    finished: float | None = None
    count: int = 0
    last: int = 0
    cancelled: bool = False
    generator: torch.Generator | None = None
    decoding: Decoding | None = None  # where no fast engine decodes


class Scheduler:
    """Answers requests in a thread of its own.

    Args:
        model: a routed model; nothing else may use it meanwhile.
        batch_size: rows that are decoded together.
        queue_size: requests that may wait.
        engine: "fast" or "hf"; without the fast engine, or where the artifact's policy lets layers
            go with each step, requests are answered side by side, each by itself.
        weights: number format of "fast".
        batch_tokens: for how many tokens there is memory: rows that are decoded together, times the
            longest that one of them may become. Requests wait for it. None: as many as come.

    Attributes:
        tokens: of all requests so far, told or not.
    """

    def __init__(
        self,
        model: FirstModel,
        batch_size: int = 16,
        queue_size: int = 256,
        engine: str = "fast",
        weights: str = "same",
        batch_tokens: int | None = None,
    ) -> None:
        if batch_size < 1 or queue_size < 1:
            raise ConfigError(
                f"batch_size is {batch_size} and queue_size {queue_size}; expected 1 or more each."
            )
        if isinstance(model.policy_for(), SteppedPolicy):
            engine = "hf"  # the fast one knows masks for whole answers only
        # Nothing else may use the model while an engine is made, so it is made now.
        self._fast = model.engine_for(engine, weights, max(batch_size, 2)) is not None
        self.model = model
        self.batch_size, self.queue_size = batch_size, queue_size
        self.batch_tokens = batch_tokens
        self.engine, self.weights = engine, weights
        self.waiting: deque[Request] = deque()
        self.starting: list[Request] = []  # whose prompts run now
        self.rows: list[Request] = []  # of the batch, in its order
        self.alone: list[Request] = []  # that no engine decodes
        self.tokens = 0
        self._batch: FastBatch | None = None
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="firstlm-scheduler", daemon=True)
        self._thread.start()

    def submit(self, ask: Ask, tell: Callable[[Piece], None]) -> Request:
        """Take a request.

        Args:
            ask: what it wants.
            tell: is called with every piece in the scheduler's thread; must return at once.

        Raises:
            ConfigError: it cannot be answered as asked.
            QueueFullError: too many wait.
            ClosedError: `close` was called, or the thread has died.
        """
        self.check(ask)
        ends = frozenset(end_ids(self.model, ask.eos_token_ids).tolist())
        request = Request(ask, tell, ends)
        if ask.seed is not None:
            request.generator = torch.Generator(self.model.device).manual_seed(ask.seed)
        with self._wake:
            if self._closed:
                raise ClosedError("The server is shutting down; ask another one.")
            if not self.alive:
                raise ClosedError("The thread that answers has died; restart the server.")
            waiting = sum(not other.cancelled for other in self.waiting)
            # Those for whom there is room in the batch do not wait.
            if waiting >= self.queue_size + self.batch_size - self.active:
                raise QueueFullError(f"{waiting} requests wait already; try again later.")
            self.waiting.append(request)
            self._wake.notify()
        return request

    def check(self, ask: Ask) -> None:
        """Raise `ConfigError` where a request cannot be answered as asked."""
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        check_ids(ask.ids, vocab, "The prompt")
        check_sampling(ask.max_new_tokens, ask.temperature, ask.top_p)
        if isinstance(ask.policy, FixedMask) and ask.policy.keep.dim() != 1:
            raise ConfigError("keep is for several prompts; expected [layers], for one.")
        if ask.logprobs is not None and not 0 <= ask.logprobs <= vocab:
            raise ConfigError(f"logprobs is {ask.logprobs}; expected 0 to {vocab}, or None.")
        longest = self.model.context_length
        if longest is not None and len(ask.ids) + ask.max_new_tokens > longest:
            raise ConfigError(
                f"The prompt has {len(ask.ids)} tokens and {ask.max_new_tokens} more are asked "
                f"for; the model takes {longest} in all."
            )
        most = self.batch_tokens
        if most is not None and in_blocks(len(ask.ids) + ask.max_new_tokens) > most:
            raise ConfigError(
                f"The prompt has {len(ask.ids)} tokens and {ask.max_new_tokens} more are asked "
                f"for; the server has memory for {most} in all (--batch-tokens)."
            )
        one = torch.ones(1, 1, dtype=torch.long)
        state = self.model.new_state(one, ask.policy, ask.skip_rate, ask.prefill, input_ids=one)
        if state.stepped and self._fast:
            raise ConfigError(
                "A policy that lets layers go with each step needs a scheduler with engine='hf'."
            )

    def cancel(self, request: Request) -> None:
        """Let a request go; one that has ended stays as it is."""
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread that answers runs."""
        return self._thread.is_alive()

    @property
    def active(self) -> int:
        """Requests that are being answered, those whose prompts run now among them."""
        return len(self._present)

    @property
    def _present(self) -> set[Request]:
        return {*self.starting, *self.rows, *self.alone}

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values of the batch."""
        batch = self._batch  # it may be let go meanwhile
        return 0 if batch is None else batch.kv_bytes

    def close(self, timeout: float | None = None) -> bool:
        """Take no more requests, end those that are there; True if all did within `timeout`.

        After the time is over those that are left are cancelled.
        """
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)
        done = not self._thread.is_alive()
        if not done:
            with self._wake:
                for request in (*self.waiting, *self._present):
                    request.cancelled = True
                self._wake.notify()
            self._thread.join()
        return done

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self.waiting or self.active or self._closed):
                    self._wake.wait()
                if self._closed and not (self.waiting or self.active):
                    return
            try:
                with torch.no_grad():
                    self._turn()
            except Exception as error:  # nobody may wait for ever
                self._fail([*self.rows, *self.alone], error)
                self.rows, self.alone, self._batch = [], [], None

    def _turn(self) -> None:
        """Let go of who left, take who fits, and go one token on."""
        self._drop_cancelled()
        # One group a turn: those that are being decoded shall not wait for all that come.
        if group := self._next_group():
            try:
                self._admit(group)
            except Exception as error:
                self._fail(group, error)
            self.starting = []
        if self.rows and self._batch is not None:
            last = torch.tensor([r.last for r in self.rows], device=self.model.device)
            going = self._note(self.rows, self._batch.step(last))
            self._keep_rows(going)
        for request in list(self.alone):
            assert request.decoding is not None
            last = torch.tensor([request.last], device=self.model.device)
            try:
                going = self._note([request], decode_step(self.model, request.decoding, last))
            except Exception as error:
                self._fail([request], error)
                going = []
            if not going:
                self.alone.remove(request)

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [r for r in self.waiting if r.cancelled]
            self.waiting = deque(r for r in self.waiting if not r.cancelled)
        for request in (*gone, *(r for r in (*self.rows, *self.alone) if r.cancelled)):
            self._end(request, Piece(None, "cancelled"))
        self.alone = [r for r in self.alone if not r.cancelled]
        self._keep_rows([i for i, r in enumerate(self.rows) if not r.cancelled])

    def _next_group(self) -> list[Request]:
        """Take those that came first and want the same of their prompts, as many as fit."""
        group: list[Request] = []
        longest = 0
        with self._wake:
            room = self.batch_size - self.active
            # Rows that end cannot leave where no engine decodes, so each starts by itself.
            most = room if self._fast else min(room, 1)
            while self.waiting and len(group) < most:
                first = self.waiting[0]
                ask, other = first.ask, group[0].ask if group else None
                alike = other is None or (
                    ask.policy is other.policy
                    and (ask.skip_rate, ask.prefill) == (other.skip_rate, other.prefill)
                )
                longest = max(longest, len(ask.ids))
                small = (len(group) + 1) * longest <= GROUP_TOKENS
                if not alike or (group and not small) or not self._has_memory([*group, first]):
                    break
                group.append(self.waiting.popleft())
            self.starting = group
        return group

    def _has_memory(self, coming: Sequence[Request]) -> bool:
        """Whether some may join the batch, whose rows take as much as the longest of them."""
        if self.batch_tokens is None:
            return True
        there = [*self.rows, *self.alone]
        longest = max([_room(coming), *(request.room for request in there)])
        return (len(there) + len(coming)) * longest <= self.batch_tokens

    def _admit(self, group: list[Request]) -> None:
        """Run prompts, and put them to the rows that are being decoded."""
        now = time.perf_counter()
        room = _room(group)
        for request in group:
            request.started, request.room = now, room
        ids, mask = pad_left([r.ask.ids for r in group], self.model.pad_id)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        ask = group[0].ask
        decoding = prefill(
            self.model,
            ids,
            mask,
            policy=ask.policy,
            skip_rate=ask.skip_rate,
            prefill=ask.prefill,
            max_new_tokens=max(r.ask.max_new_tokens for r in group),
            engine=self.engine,
            weights=self.weights,
        )
        if self._fast and decoding.cache.engine is None:  # weights were changed: one by one now
            self._fast = False
            with self._wake:
                self.waiting.extendleft(reversed(group))
            return
        for request, keep in zip(group, decoding.state.keep, strict=True):
            request.keep = keep
        if not self._fast:
            if self._note(group, decoding.logits):
                group[0].decoding = decoding
                self.alone.append(group[0])
            return
        new = decoding.cache.hand_over(mask)
        going = self._note(group, decoding.logits)
        new.select(going)
        if not going:
            return
        if self._batch is None:
            self._batch = new
        else:
            self._batch.join([new])
        self.rows += [group[row] for row in going]

    def _keep_rows(self, going: Sequence[int]) -> None:
        if self._batch is None or len(going) == len(self.rows):
            return
        if going:
            self._batch.select(going)
        else:
            self._batch = None
        self.rows = [self.rows[row] for row in going]

    def _note(self, requests: Sequence[Request], logits: torch.Tensor) -> list[int]:
        """Take a token for each request; returns which of them go on."""
        tokens = logits.argmax(-1).tolist()
        going = []
        for row, request in enumerate(requests):
            ask = request.ask
            token = tokens[row]
            if ask.temperature:
                one = logits[row : row + 1]
                token = int(pick(one, ask.temperature, ask.top_p, request.generator))
            request.last = token
            request.count += 1
            self.tokens += 1
            if request.first is None:
                request.first = time.perf_counter()
            finish = None
            if token in request.ends:
                finish = "stop"
            elif request.count >= ask.max_new_tokens:
                finish = "length"
            piece = Piece(token, finish, *_likeliest(logits[row], token, ask.logprobs))
            if finish:
                self._end(request, piece)
            else:
                self._tell(request, piece)
                going.append(row)
        return going

    def _end(self, request: Request, piece: Piece) -> None:
        request.finished = time.perf_counter()
        request.decoding = None
        self._tell(request, piece)

    def _tell(self, request: Request, piece: Piece) -> None:
        try:
            request.tell(piece)
        except Exception:  # a client's fault is no other's
            LOG.exception("A request is cancelled, because its tell raised")
            request.cancelled = True

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        LOG.error("%d requests failed", len(requests), exc_info=error)
        for request in requests:
            if request.finished is None:
                self._end(request, Piece(None, "error", error=f"{type(error).__name__}: {error}"))


def _room(group: Sequence[Request]) -> int:
    """Return for how many tokens each of some requests has memory that are read together."""
    longest = max(len(r.ask.ids) for r in group)
    return in_blocks(longest + max(r.ask.max_new_tokens for r in group))


def _likeliest(
    logits: torch.Tensor, token: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Return a token's log probability, and the likeliest tokens with theirs."""
    if count is None:
        return None, ()
    shares = logits.float().log_softmax(-1)
    top = shares.topk(count) if count else None
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True) if top else ()
    return float(shares[token]), tuple(pairs)
