# SPDX-License-Identifier: Apache-2.0
"""Replicas that answer requests with layers skipped, simulated; `fleet.py` is the command.

Nothing here is measured: a step takes what `step_model.py` says. Requests arrive at random
(Poisson) and go to the replica with the fewest of them. A replica batches continuously: between
two steps it admits who waits, first come first served, while memory has room for their prompt and
whole answer; their prompts run in the step that follows, along with the others' tokens.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from step_model import Machine, Shape, step_seconds

GROUPS = {"one": 1, "few": 8, "own": None}  # masks among all requests; None: each has its own


@dataclass(frozen=True)
class Requests:
    """What is asked of the fleet, by request, in order of arrival.

    Attributes:
        arrival: [requests] seconds.
        prompt: [requests] tokens.
        answer: [requests] tokens.
        keep: [requests, layers] bool.
    """

    arrival: np.ndarray
    prompt: np.ndarray
    answer: np.ndarray
    keep: np.ndarray


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens, cut off at both ends."""

    median: float
    sigma: float
    most: int

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return as many lengths."""
        drawn = np.exp(rng.normal(np.log(self.median), self.sigma, count))
        return np.clip(drawn.round(), 1, self.most).astype(np.int64)


def draw(
    seed: int,
    rate: float,
    seconds: float,
    prompt: Lengths,
    answer: Lengths,
    layers: int,
    skip_rate: float,
    masks: str,
) -> Requests:
    """Return requests; lengths depend on the seed alone, not on rates or masks.

    Args:
        seed: of all that is drawn.
        rate: requests a second.
        seconds: for which they arrive.
        prompt: how long prompts are.
        answer: how long answers are.
        layers: of the model.
        skip_rate: share of layers that each request skips, rounded to whole layers.
        masks: how many there are, by a name of `GROUPS`. The first and the last layer always run.
    """
    rngs = [np.random.default_rng([seed, what]) for what in range(4)]  # so more begin with fewer
    arrival = np.cumsum(rngs[0].exponential(1 / rate, max(1, round(rate * seconds))))
    count = len(arrival)
    lengths = prompt.draw(rngs[1], count), answer.draw(rngs[2], count)
    rng = rngs[3]
    groups = GROUPS[masks] or count
    order = rng.random((groups, layers))
    order[:, [0, -1]] = 2.0
    keep = order.argsort(1).argsort(1) >= round(skip_rate * layers)
    which = np.arange(count) if groups == count else rng.integers(0, groups, count)
    return Requests(arrival, *lengths, keep[which])


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        first: [requests] seconds at which the first token is there; nan: never.
        last: [requests] seconds at which the answer is complete; nan: never.
        tokens: [requests] of the answer; 0 while it is not complete.
        steps: (end in seconds, tokens answered) of each step of each replica.
        most_running: sequences at once on a replica.
        most_kv_bytes: of keys and values reserved at once on a replica.
        starved: a replica was without anybody waiting at the end.
    """

    first: np.ndarray
    last: np.ndarray
    tokens: np.ndarray
    steps: list[tuple[float, int]]
    most_running: int = 0
    most_kv_bytes: float = 0.0
    starved: bool = False


@dataclass
class Replica:
    """One GPU: who waits, who runs, and the sums over those who run that a step's time needs."""

    layers: int
    waiting: deque[int] = field(default_factory=deque)
    starting: list[int] = field(default_factory=list)
    ends: dict[int, list[int]] = field(default_factory=dict)  # by number of the step
    step: int = 0
    running: int = 0
    kv_bytes: float = 0.0
    busy: bool = False

    def __post_init__(self) -> None:
        self.rows = np.zeros(self.layers)  # that run each layer
        self.context = np.zeros(self.layers)  # tokens that each layer reads in the next step

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self.waiting) + len(self.starting) + self.running


class Fleet:
    """Replicas, and what a request needs of them.

    Args:
        shape: of the model.
        machine: each replica.
        replicas: how many.
        kv_limit: bytes for keys and values on each.
        freed: skipped layers reserve no keys and values, as in our engine; in vLLM they do.
        prompt_tokens: that run in one step at most, but for a single longer prompt.
        most_rows: sequences at once at most, whatever memory says.
    """

    def __init__(
        self,
        shape: Shape,
        machine: Machine,
        replicas: int,
        kv_limit: float,
        freed: bool,
        prompt_tokens: int = 8192,
        most_rows: int = 1 << 30,
    ) -> None:
        self.shape, self.machine = shape, machine
        self.kv_limit, self.freed = kv_limit, freed
        self.prompt_tokens, self.most_rows = prompt_tokens, most_rows
        self.replicas = [Replica(shape.layers) for _ in range(replicas)]

    def run(self, requests: Requests, until: float = np.inf) -> Outcome:
        """Answer requests, all of them or until some second."""
        count = len(requests.arrival)
        held = requests.keep.sum(1) if self.freed else np.full(count, self.shape.layers)
        needs = (requests.prompt + requests.answer) * held * self.shape.kv_bytes
        if needs.max() > self.kv_limit:
            raise ValueError("a request needs more memory for keys and values than a replica has")
        self.asked, self.needs = requests, needs
        self.first_step = np.zeros(count, dtype=np.int64)
        nan = np.full(count, np.nan)
        self.found = Outcome(nan, nan.copy(), np.zeros(count, dtype=np.int64), [])
        ends: list[tuple[float, int]] = []  # of running steps, and whose they are
        for number, arrival in enumerate(requests.arrival):
            if arrival > until:
                break
            self._advance(ends, arrival)
            chosen = min(range(len(self.replicas)), key=lambda i: self.replicas[i].load)
            self.replicas[chosen].waiting.append(number)
            if not self.replicas[chosen].busy:
                self._start(ends, chosen, arrival)
        self._advance(ends, until)
        self.found.starved = any(not replica.waiting for replica in self.replicas)
        return self.found

    def _advance(self, ends: list[tuple[float, int]], until: float) -> None:
        """Let steps end, and others start, up to some second."""
        while ends and ends[0][0] <= until:
            now, number = heapq.heappop(ends)
            self._end(self.replicas[number], now)
            self._start(ends, number, now)

    def _start(self, ends: list[tuple[float, int]], number: int, now: float) -> None:
        """Admit who has room, and start a step if there is anything to do."""
        replica, asked = self.replicas[number], self.asked
        left = self.prompt_tokens
        while replica.waiting:
            request = replica.waiting[0]
            prompt = int(asked.prompt[request])
            if replica.kv_bytes + self.needs[request] > self.kv_limit:
                break
            if replica.running + len(replica.starting) >= self.most_rows:
                break
            if prompt > left and replica.starting:
                break
            left -= prompt
            replica.starting.append(replica.waiting.popleft())
            replica.kv_bytes += self.needs[request]
        new = replica.starting
        rows = replica.running + len(new)
        replica.busy = rows > 0
        if not rows:
            return
        self.found.most_running = max(self.found.most_running, rows)
        self.found.most_kv_bytes = max(self.found.most_kv_bytes, replica.kv_bytes)
        tokens, pairs, whole = replica.rows, replica.context, replica.running
        if new:
            prompt, keep = asked.prompt[new].astype(float), asked.keep[new]
            tokens = tokens + prompt @ keep
            pairs = pairs + (prompt * (prompt + 1) / 2) @ keep
            whole += int(prompt.sum())
        seconds = step_seconds(
            self.shape, self.machine, tokens, replica.context, pairs, rows, whole
        )
        heapq.heappush(ends, (now + seconds, number))

    def _end(self, replica: Replica, now: float) -> None:
        """Count the step's tokens, let go who is done, take in whose prompt has run."""
        asked, found = self.asked, self.found
        found.steps.append((now, replica.running + len(replica.starting)))
        replica.context += replica.rows
        for request in replica.ends.pop(replica.step, ()):
            replica.running -= 1
            replica.rows -= asked.keep[request]
            replica.context -= (asked.prompt[request] + asked.answer[request]) * asked.keep[request]
            self._done(replica, request, now, replica.step)
        for request in replica.starting:
            found.first[request] = now
            self.first_step[request] = replica.step
            if asked.answer[request] == 1:
                self._done(replica, request, now, replica.step)
                continue
            replica.running += 1
            replica.rows += asked.keep[request]
            replica.context += (asked.prompt[request] + 1) * asked.keep[request]
            last = replica.step + int(asked.answer[request]) - 1
            replica.ends.setdefault(last, []).append(request)
        replica.starting = []
        replica.step += 1

    def _done(self, replica: Replica, request: int, now: float, step: int) -> None:
        self.found.last[request] = now
        self.found.tokens[request] = step - self.first_step[request] + 1
        replica.kv_bytes -= self.needs[request]
