# SPDX-License-Identifier: Apache-2.0
"""Many clients at once get their own answers, whole; and the load test can tell if they do not."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import make_byte_tokenizer, tiny_routed

from firstlm.calibration import calibrate

pytest.importorskip("httpx")
SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "load.py"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    where = tmp_path_factory.mktemp("load")
    model, tokenizer = tiny_routed(), make_byte_tokenizer()
    model.base.save_pretrained(where / "base")
    tokenizer.save_pretrained(where / "base")
    model.tokenizer = tokenizer
    calibrate(model, [list(range(3, 9 + i)) for i in range(40)], [0.1, 0.4], progress=False)
    model.save_pretrained(str(where / "artifact"))
    return str(where / "artifact"), str(where / "base")


@pytest.mark.slow
def test_forty_clients_and_a_vandal(artifact: tuple[str, str], tmp_path: Path) -> None:
    load: dict[str, Any] = runpy.run_path(str(SCRIPT), run_name="load")
    words = [artifact[0], "--model", artifact[1], "--clients", "40", "--seconds", "8"]
    found = load["main"]([*words, "--cases", "24", "--output", str(tmp_path / "load.json")])
    assert found["answers"] > 40
    assert found["wrong"] == []
    assert found["masks"] >= 6
    assert found["health_after"] == 200
    assert {s for s in found["statuses"] if s.startswith(("answer", "stream"))} == {
        "answer 200",
        "stream 200",
    }
    assert {"malformed 400", "too long 400", "wrong key 401", "left amid"} <= set(found["statuses"])
    end = found["sigterm"]
    assert end["wrong"] == []
    assert end["exit_code"] == 0
    assert end["asked_after"] in ("503", "ConnectError", "RemoteProtocolError")


def test_an_answer_that_is_anothers_is_seen() -> None:
    import asyncio

    import httpx

    load: dict[str, Any] = runpy.run_path(str(SCRIPT), run_name="load")
    body = {"choices": [{"text": "no", "firstlm": {"keep": [True]}, "finish_reason": "stop"}]}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=body))
    case, seen = load["Case"]({"prompt": "x"}, "yes", [True]), load["Seen"]()

    async def ask() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            await asyncio.wait_for(
                load["client"](http, [case], seen, load["time"].time() + 0.2, 0), 5
            )

    asyncio.run(ask())
    assert seen.wrong or seen.statuses["stream broken off"]
