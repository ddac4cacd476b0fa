# SPDX-License-Identifier: Apache-2.0
"""Reports in what vLLM streams; with vLLM's own server it is tested in tests/on_vllm."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from firstlm.vllm_plugin import streamed

REPORTS = [{"keep": [True, False], "skip_rate": 0.5}, {"keep": [True, True], "skip_rate": 0.0}]


async def serve(name: str, result_generator: AsyncIterator[Any], end: str) -> AsyncIterator[str]:
    """Stream as vLLM does: an event for each output, what it used, and an end."""
    place = 0
    async for result in result_generator:
        place, output = result if isinstance(result, tuple) else (place, result)
        choice = {"index": place, "text": output.text, "finish_reason": output.finish_reason}
        yield f"data: {json.dumps({'id': name, 'choices': [choice]}, separators=(',', ':'))}\n\n"
    yield f"data: {json.dumps({'id': name, 'choices': [], 'usage': {'total_tokens': 9}})}\n\n"
    yield end


def output(text: str, report: Any = None, others: bool = False) -> SimpleNamespace:
    """Return an output; the last one of an answer carries its report."""
    params = {"first": report} if report else {"another": 1} if others else None
    return SimpleNamespace(
        text=text, kv_transfer_params=params, finish_reason="length" if report else None
    )


async def each(results: list[Any]) -> AsyncIterator[Any]:
    for result in results:
        yield result


def events(results: list[Any]) -> list[str]:
    async def found() -> list[str]:
        stream = streamed(serve)("a", result_generator=each(results), end="data: [DONE]\n\n")
        return [event async for event in stream]

    return asyncio.run(found())


def reports(found: list[str]) -> list[Any]:
    bodies = [json.loads(event[6:]) for event in found if event.startswith("data: {")]
    return [body.get("kv_transfer_params") for body in bodies]


@pytest.mark.parametrize("paired", [False, True])
def test_the_event_that_ends_an_answer_says_which_layers_ran(paired: bool) -> None:
    results: list[Any] = [output("é"), output("b", REPORTS[0])]
    if paired:
        results = [(3, result) for result in results]
    found = events(results)
    assert reports(found) == [None, {"first": REPORTS[0]}, None]
    assert found[-1] == "data: [DONE]\n\n"
    assert [json.loads(event[6:])["choices"][0]["text"] for event in found[:2]] == ["é", "b"]
    assert all(event.endswith("}\n\n") for event in found[:-1])


def test_answers_of_several_prompts_each_have_their_own() -> None:
    results = [(0, output("a")), (1, output("b", REPORTS[1])), (0, output("c", REPORTS[0]))]
    assert reports(events(results)) == [None, {"first": REPORTS[1]}, {"first": REPORTS[0]}, None]


def test_streams_of_other_models_are_left_as_they_were() -> None:
    results = [output("a"), output("b", others=True)]
    assert events(results) == asyncio.run(_plain(results))


async def _plain(results: list[Any]) -> list[str]:
    return [event async for event in serve("a", each(results), "data: [DONE]\n\n")]
