# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plugin gives the tokens of the reference path, whatever masks share a batch."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` has it")

from vllm.exceptions import VLLMValidationError
from vllm_answers import LAYERS, PROMPTS, answers, engine, make_artifact, same_as_reference

from firstlm import FirstModel

MASK = [True, False, True, True, False, True]


ASKS: list[dict[str, Any]] = [
    {"skip_rate": 0.2},
    {"skip_rate": 0.4},
    {"policy": "run_all"},
    {"keep": MASK},
    {"skip_rate": 0.3},
    {"skip_layers": [0]},
    {"policy": "unified", "skip_rate": 0.33},
    {"skip_layers": list(range(LAYERS))},
]


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An artifact served by vLLM's Llama and by its Transformers backend, and the reference."""
    artifact, model = make_artifact(request.param, tmp_path_factory.mktemp("artifact"))
    return engine(artifact), model


def test_mixed_masks_in_one_batch(served: tuple[Any, FirstModel]) -> None:
    llm, model = served
    masks = set()
    for output, prompt, ask in zip(answers(llm, PROMPTS, ASKS), PROMPTS, ASKS, strict=True):
        masks.add(same_as_reference(output, model, prompt, ask))
    assert len(masks) >= 6


def test_prompts_that_run_whole_and_answers_that_skip(served: tuple[Any, FirstModel]) -> None:
    llm, model = served
    asks = [{**ask, "prefill": "full"} for ask in ASKS]
    for output, prompt, ask in zip(answers(llm, PROMPTS, asks), PROMPTS, asks, strict=True):
        same_as_reference(output, model, prompt, ask)


def test_a_prompt_read_before_under_another_mask_is_read_anew(
    served: tuple[Any, FirstModel],
) -> None:
    llm, model = served
    prompt = PROMPTS[-1] * 6  # several blocks of the cache
    for ask in [*ASKS[:4], *ASKS[:4]]:
        output = answers(llm, [prompt], [ask])[0]
        same_as_reference(output, model, prompt, ask)
    assert output.num_cached_tokens > 0  # the same mask, once more
    assert answers(llm, [prompt], [ASKS[0]])[0].num_cached_tokens == 0  # the routers read it


@pytest.mark.parametrize("prefill", ["skip", "full"])
def test_a_second_turn_finds_no_keys_that_the_first_did_not_write(
    served: tuple[Any, FirstModel], prefill: str
) -> None:
    llm, model = served
    ask = {"keep": MASK, "prefill": prefill}
    prompt = PROMPTS[-1] * 2
    first = answers(llm, [prompt], [ask], tokens=70)[0]
    turn = [*prompt, *first.outputs[0].token_ids, 7, 8, 9]
    second = answers(llm, [turn], [ask])[0]
    same_as_reference(second, model, turn, ask)
    assert second.num_cached_tokens == 0 or prefill == "skip"


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        ({"skip_rate": 0.85}, "outside what was calibrated"),
        ({"skip_rate": "much"}, "skip_rate is 'much'"),
        ({"keep": [1, 0]}, "keep is for 2 layers"),
        ({"keep": [2] * LAYERS}, "expected true or false"),
        ({"skip_layers": [LAYERS]}, "from 0 to 5"),
        ({"skip_layers": [0], "keep": MASK}, "give one of them"),
        ({"keep": MASK, "skip_rate": 0.2}, "mask of its own"),
        ({"policy": "best"}, "expected one of router, run_all, random"),
        ({"policy": "unified"}, "needs a skip_rate"),
        ({"skip_layers": [True]}, "list of layers"),
        ({"keep": []}, "true or false for each"),
        ({"prefill": "half"}, "expected 'skip' or 'full'"),
    ],
)
def test_what_cannot_be_had_is_refused_and_others_are_answered(
    served: tuple[Any, FirstModel], ask: dict[str, Any], why: str
) -> None:
    llm, model = served
    with pytest.raises(VLLMValidationError, match=why):
        answers(llm, PROMPTS[:1], [ask])
    same_as_reference(answers(llm, PROMPTS[:1], ASKS[:1])[0], model, PROMPTS[0], ASKS[0])
