# SPDX-License-Identifier: Apache-2.0
"""Reports in what vLLM streams; with vLLM's own server it is tested in tests/on_vllm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from firstlm.vllm_plugin import streamed

REPORTS = [{"keep": [True, False], "skip_rate": 0.5}, {"keep": [True, True], "skip_rate": 0.0}]
DONE = "data: [DONE]\n\n"


async def serve(
    name: str, result_generator: AsyncGenerator[Any], end: str = DONE
) -> AsyncGenerator[str]:
    """Stream as vLLM does: an event for each choice of an output, what was used, and an end."""
    prompt = 0
    async for result in result_generator:
        prompt, output = result if isinstance(result, tuple) else (prompt, result)
        for one in output.outputs:
            choice = {"index": prompt, "text": one.text, "finish_reason": one.finish_reason}
            body = {"id": name, "choices": [choice]}
            yield f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
    yield f"data: {json.dumps({'id': name, 'choices': [], 'usage': {'total_tokens': 9}})}\n\n"
    yield end


def output(report: Any, *answers: str) -> SimpleNamespace:
    """Return an output; an answer that ends says so with a full stop."""
    outputs = [
        SimpleNamespace(text=text, finish_reason="stop" if text.endswith(".") else None)
        for text in answers
    ]
    params = None if report is None else {"first": report}
    return SimpleNamespace(outputs=outputs, kv_transfer_params=params)


async def each(results: Sequence[Any], closed: list[bool]) -> AsyncGenerator[Any]:
    try:
        for result in results:
            yield result
    finally:
        closed.append(True)


def events(results: Sequence[Any], stop_after: int | None = None) -> tuple[list[str], list[bool]]:
    """Return what is streamed, up to where a client goes, and whether the engine was told."""

    async def found() -> tuple[list[str], list[bool]]:
        seen, closed = [], []
        stream = streamed(serve)("a", result_generator=each(results, closed))
        async for event in stream:
            seen.append(event)
            if len(seen) == stop_after:
                break
        await stream.aclose()
        return seen, list(closed)

    return asyncio.run(found())


def reports(results: Sequence[Any]) -> list[Any]:
    bodies = [json.loads(event[6:]) for event in events(results)[0] if event.startswith("data: {")]
    return [body.get("kv_transfer_params", {}).get("first") for body in bodies]


@pytest.mark.parametrize("paired", [False, True])
def test_the_event_that_ends_an_answer_says_which_layers_ran(paired: bool) -> None:
    results: list[Any] = [output(REPORTS[0], "é"), output(REPORTS[0], "b.")]
    if paired:
        results = [(3, result) for result in results]
    found, _ = events(results)
    assert reports(results) == [None, REPORTS[0], None]
    assert found[-1] == DONE
    assert [json.loads(event[6:])["choices"][0]["text"] for event in found[:2]] == ["é", "b."]
    assert all(event.endswith("}\n\n") for event in found[:-1])


def test_answers_of_several_prompts_each_have_their_own() -> None:
    results = [
        (0, output(REPORTS[0], "a")),
        (1, output(REPORTS[1], "b.")),
        (0, output(REPORTS[0], "c.")),
    ]
    assert reports(results) == [None, REPORTS[1], REPORTS[0], None]


def test_of_several_answers_in_one_output_those_that_end_have_it() -> None:
    results = [output(REPORTS[0], "a.", "b"), output(REPORTS[0], "c.")]
    assert reports(results) == [REPORTS[0], None, REPORTS[0], None]


def test_streams_of_other_models_are_left_as_they_were() -> None:
    async def plain() -> list[str]:
        return [event async for event in serve("a", each(results, []))]

    results = [output(None, "a"), output(None, "b.")]
    assert events(results)[0] == asyncio.run(plain())


def test_when_a_client_goes_the_engine_is_told_at_once() -> None:
    seen, closed = events([output(REPORTS[0], text) for text in "abc"], stop_after=1)
    assert len(seen) == 1
    assert closed == [True]
