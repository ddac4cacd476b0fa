# SPDX-License-Identifier: Apache-2.0
"""`firstlm serve` under load: many clients with other masks, and some who misbehave.

    python experiments/load.py smollm2-qa --output results/load_smollm2.json

Every answer is compared with what the model answers when it is asked alone, in this process.
SIGTERM comes while clients still ask: answers that run must be finished, new requests get 503.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from firstlm import FirstModel
from firstlm.results import provenance, write_json

KEY = "a key"
TEXTS = ["bees", "what holds the roof of a house", "a b c d e f", "Sailing at night, in winter"]


@dataclass
class Case:
    """A request, and what must come back."""

    body: dict[str, Any]
    text: str
    keep: list[bool]


@dataclass
class Seen:
    """What came back from all clients."""

    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


def cases(model: FirstModel, count: int, tokens: int) -> list[Case]:
    """Ask the model alone, prompt by prompt."""
    tokenizer, found = model.need_tokenizer(), []
    rng = random.Random(0)
    for i in range(count):
        prompt = " ".join(rng.choice(TEXTS) for _ in range(rng.randrange(1, 6))) + f" {i}"
        keep = [rng.random() > 0.25 for _ in range(model.layer_count)]
        ask = rng.choice(
            [{"skip_rate": 0.2}, {"skip_rate": 0.3}, {"policy": "run_all"}, {"keep": keep}]
        )
        policy = model.choices.asked(ask.get("policy"), ask.get("skip_rate"), ask.get("keep"))
        ids, longest = tokenizer(prompt)["input_ids"], rng.randrange(2, tokens)
        output = model.generate(
            torch.tensor([ids]),
            max_new_tokens=longest,
            policy=policy,
            engine="fast",
            do_sample=False,
        )
        new = output.sequences[0, len(ids) :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        body = {"prompt": prompt, "max_tokens": longest, "temperature": 0, **ask}
        found.append(Case(body, text, output.keep[0].tolist()))
    return found


async def client(
    http: httpx.AsyncClient, known: Sequence[Case], seen: Seen, end: float, seed: int
) -> None:
    """Ask again and again, streaming every other time, and compare."""
    rng = random.Random(seed)
    while time.time() < end:
        case, begin = rng.choice(known), time.time()
        try:
            if rng.random() < 0.5:
                found = await http.post("/v1/completions", json=case.body)
                seen.statuses[f"answer {found.status_code}"] += 1
                if found.status_code != 200:
                    await asyncio.sleep(1)
                    continue
                choice = found.json()["choices"][0]
                text, keep = choice["text"], choice["firstlm"]["keep"]
            else:
                text, keep = await streamed(http, case, seen, slow=rng.random() < 0.05)
        except httpx.HTTPError as error:
            seen.statuses[f"answer {type(error).__name__}"] += 1
            await asyncio.sleep(1)
            continue
        if text is None:
            continue
        seen.answers += 1
        seen.seconds.append(time.time() - begin)
        if text != case.text or keep != case.keep:
            seen.wrong.append(f"{case.body}: {text!r}, expected {case.text!r}")


async def streamed(
    http: httpx.AsyncClient, case: Case, seen: Seen, slow: bool
) -> tuple[str | None, list[bool]]:
    """Read a stream, slowly if so wished; the text is None where there was none."""
    text, keep, finished = "", [], False
    async with http.stream("POST", "/v1/completions", json={**case.body, "stream": True}) as found:
        seen.statuses[f"stream {found.status_code}"] += 1
        if found.status_code != 200:
            return None, []
        async for line in found.aiter_lines():
            if slow:
                await asyncio.sleep(0.2)
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                seen.statuses["stream error"] += 1
                return None, []
            choice = event["choices"][0]
            text += choice["text"]
            keep = choice.get("firstlm", {}).get("keep", keep)
            finished = finished or choice["finish_reason"] is not None
    if not finished:
        seen.statuses["stream broken off"] += 1
        return None, []
    return text, keep


async def leaver(http: httpx.AsyncClient, known: Sequence[Case], seen: Seen, end: float) -> None:
    """Leave amid answers, and before them."""
    rng = random.Random(2)
    while time.time() < end:
        body = {**rng.choice(known).body, "max_tokens": 64, "stream": True}
        try:
            async with asyncio.timeout(rng.uniform(1, 20)):
                async with http.stream("POST", "/v1/completions", json=body) as found:
                    async for _ in found.aiter_lines():
                        break
            seen.statuses["left amid"] += 1
        except TimeoutError:
            seen.statuses["left before"] += 1
        except httpx.HTTPError:
            pass
        await asyncio.sleep(0.3)


async def vandal(http: httpx.AsyncClient, seen: Seen, end: float) -> None:
    """Send what is wrong; each must get its status."""
    bad: list[tuple[str, dict[str, Any], int]] = [
        ("malformed", {"content": b'{"prompt": "x'}, 400),
        ("huge", {"content": b'{"prompt": "' + b"x" * 2_000_000 + b'"}'}, 413),
        ("too long", {"json": {"prompt": "word " * 40_000}}, 400),
        ("no such rate", {"json": {"prompt": "x", "skip_rate": 0.89}}, 400),
        ("wrong key", {"json": {"prompt": "x"}, "headers": {"Authorization": "Bearer no"}}, 401),
    ]
    for name, what, status in itertools.cycle(bad):
        if time.time() >= end:
            return
        try:
            found = await http.post("/v1/completions", **what)
            seen.statuses[f"{name} {found.status_code}"] += 1
            if found.status_code != status and time.time() < end:
                seen.wrong.append(f"{name}: {found.status_code}, expected {status}")
        except httpx.HTTPError as error:  # a body that is refused before it is read
            seen.statuses[f"{name} {type(error).__name__}"] += 1
        await asyncio.sleep(0.3)


def memory_mb(pid: int) -> float:
    """Return the memory that a process has in use."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS")).split()[1]) / 1024


async def load(url: str, pid: int, known: Sequence[Case], clients: int, seconds: float) -> tuple:
    """Run clients against a server; return what was seen and its memory over time."""
    seen, memory, end = Seen(), [], time.time() + seconds
    head = {"Authorization": f"Bearer {KEY}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=head, timeout=300, limits=limits) as http:

        async def watch() -> None:
            while time.time() < end:
                memory.append(round(memory_mb(pid), 1))
                await asyncio.sleep(min(5, seconds / 10))

        tasks = [client(http, known, seen, end, i) for i in range(clients)]
        others = [vandal(http, seen, end), *(leaver(http, known, seen, end) for _ in range(3))]
        await asyncio.gather(*tasks, *others, watch())
        health = (await http.get("/health")).status_code
    return seen, memory, health


async def ending(url: str, process: subprocess.Popen, known: Sequence[Case]) -> dict[str, Any]:
    """Send SIGTERM while answers run; return how those, and later ones, ended."""
    head, seen = {"Authorization": f"Bearer {KEY}"}, Seen()
    async with httpx.AsyncClient(base_url=url, headers=head, timeout=120) as http:
        running = [
            asyncio.create_task(client(http, known, seen, time.time() + 0.5, i)) for i in range(12)
        ]
        await asyncio.sleep(0.4)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        try:
            late = str((await http.post("/v1/completions", json=known[0].body)).status_code)
        except httpx.HTTPError as error:  # nothing ran any more, and the server is gone
            late = type(error).__name__
        await asyncio.gather(*running)
    code = process.wait(60)
    finished = {"answers": seen.answers, "wrong": seen.wrong, "statuses": dict(seen.statuses)}
    return {**finished, "asked_after": late, "exit_code": code}


def serve(artifact: str, more: Sequence[str]) -> tuple[subprocess.Popen, str]:
    """Start the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", artifact, "--port", str(port), "--api-key", KEY, *more]
    process = subprocess.Popen([sys.executable, "-m", "firstlm", *words], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
            return process, url
        except httpx.HTTPError:
            if process.poll() is not None:
                raise SystemExit("The server did not start.") from None
            time.sleep(0.5)
    process.kill()
    raise SystemExit("The server did not start.")


def measure(artifact: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what came of the load."""
    model = FirstModel.from_pretrained(artifact, base=options.model, dtype="float32")
    known = cases(model, options.cases, options.tokens)
    more = ["--dtype", "float32", "--queue-size", str(2 * options.clients)]
    process, url = serve(artifact, [*more, *(["--model", options.model] if options.model else [])])
    try:
        seen, memory, health = asyncio.run(
            load(url, process.pid, known, options.clients, options.seconds)
        )
        end = asyncio.run(ending(url, process, known))
    finally:
        process.kill()
    times = sorted(seen.seconds) or [0.0]
    return {
        "clients": options.clients,
        "seconds": options.seconds,
        "answers": seen.answers,
        "wrong": seen.wrong[:20],
        "masks": len({tuple(case.keep) for case in known}),
        "statuses": dict(sorted(seen.statuses.items())),
        "latency_s": {q: round(times[int(q * (len(times) - 1))], 2) for q in (0.5, 0.95, 1.0)},
        "memory_mb": memory,
        "health_after": health,
        "sigterm": end,
        "provenance": provenance(),
    }


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--model", help="base model, where the artifact does not name it")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--cases", type=int, default=60, help="distinct requests")
    parser.add_argument("--tokens", type=int, default=12, help="longest answer")
    parser.add_argument("--output", required=True)
    options = parser.parse_args(words)
    found = measure(options.artifact, options)
    write_json(options.output, found)
    print(json.dumps({k: v for k, v in found.items() if k != "provenance"}, indent=1))
    return found


if __name__ == "__main__":
    main()
