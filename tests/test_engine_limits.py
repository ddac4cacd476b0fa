# SPDX-License-Identifier: Apache-2.0
"""What the fast engine must not take for its own, and options that come another way."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from families import batch, make_model
from peft import LoraConfig, get_peft_model
from test_engine import by_operation
from transformers import GenerationConfig

import firstlm.engine
from firstlm import FirstModel, FixedMask
from firstlm.batching import generate_many
from firstlm.engine import DecodeEngine
from firstlm.errors import ConfigError, UnsupportedModelError
from firstlm.generate import prefill, stream

KEEP = [True, False, False, True]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models make engines that need no compiler."""

    class Uncompiled(DecodeEngine):
        def __init__(self, base: Any, stack: Any, weights: str = "same") -> None:
            super().__init__(base, stack, weights, compiled=False)

    monkeypatch.setattr(firstlm.engine, "DecodeEngine", Uncompiled)


def with_two_rotations(limit: int = 24) -> FirstModel:
    """Return a Phi-3 that turns longer rows by other factors."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [2.0] * 4, "original_max_position_embeddings": limit}
    options = {"rope_parameters": rope, "original_max_position_embeddings": limit}
    return FirstModel.from_base(make_model("phi3", **options))


@pytest.mark.parametrize("length", [20, 30])
def test_generate_that_drops_its_cache_does_not_run_all_layers(length: int) -> None:
    first = with_two_rotations()
    ids, mask = batch((length,))
    options: dict[str, Any] = {"policy": FixedMask(KEEP), "max_new_tokens": 12}
    with pytest.raises(ConfigError, match="drops this model's cache"):
        first.generate(ids, mask, **options)
    tokens = list(stream(first, ids, mask, eos_token_ids=(), **options))
    assert len(tokens) == 12
    assert tokens[-1].decoding.state.keep.tolist() == [KEEP]
    options["max_new_tokens"] = 4
    if length == 20:
        assert first.generate(ids, mask, **options).sequences.shape == (1, 24)
    first.plain_base(ids)  # without a cache, outside of generate, all layers run


def test_rows_that_a_longer_one_turns_are_not_decoded_together() -> None:
    first = with_two_rotations()
    engine = by_operation(first)
    engine.step(1)
    with pytest.raises(UnsupportedModelError, match="A long row changes what short ones"):
        engine.step(4)
    by_operation(FirstModel.from_base(make_model("phi3"))).step(4)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tied", [True, False])
def test_lora_on_one_of_two_tied_layers_is_refused(target: str, tied: bool) -> None:
    base = tiny_llama(tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own about tied layers
        first = FirstModel.from_base(
            get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", target]))
        )
    if tied:
        with pytest.raises(UnsupportedModelError, match="two layers that share a weight"):
            by_operation(first).step(1)
        with first.disable_adapter():
            by_operation(first).step(1)
    elif target == "lm_head":
        by_operation(first).step(1)


@pytest.mark.usefixtures("uncompiled")
def test_several_answers_to_one_prompt_fall_back_where_several_rows_cannot_be_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = FirstModel.from_base(tiny_llama())
    capture = firstlm.engine.capture

    def one_row(base: Any, stack: Any, rows: int) -> Any:
        if rows > 1:
            raise UnsupportedModelError("It treats several rows in its own way.")
        return capture(base, stack, rows)

    monkeypatch.setattr(firstlm.engine, "capture", one_row)
    ids, mask = batch((9,))
    options: dict[str, Any] = {"policy": FixedMask(KEEP), "max_new_tokens": 4}
    for more in (
        {"num_return_sequences": 3, "do_sample": True},
        {"generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)},
    ):
        first.engines.clear()
        with pytest.warns(UserWarning, match="decodes with engine='hf'.*several rows"):
            found = first.generate(ids, mask, engine="fast", **options, **more)
        assert found.sequences.shape == (3, 13)


@pytest.mark.usefixtures("uncompiled")
def test_what_a_given_config_leaves_open_the_models_own_fills_in() -> None:
    first = FirstModel.from_base(tiny_llama())
    first.base.generation_config.max_new_tokens = 60
    ids, mask = batch((9,))
    options: dict[str, Any] = {"policy": FixedMask(KEEP)}
    for engine in ("hf", "fast"):
        given = GenerationConfig(do_sample=False)
        found = first.generate(ids, mask, engine=engine, generation_config=given, **options)
        assert found.sequences.shape == (1, 69)
    static = {"cache_implementation": "static", "generation_config": given}
    assert first.generate(ids, mask, **static, **options).sequences.shape == (1, 69)
    first.base.generation_config.num_beams = 2
    with pytest.raises(ConfigError, match="Beam search"):
        first.generate(ids, mask, engine="fast", generation_config=given, **options)
    first.base.generation_config.num_beams = None
    first.base.generation_config.prompt_lookup_num_tokens = 2
    with pytest.raises(ConfigError, match="prompt_lookup_num_tokens rolls"):
        first.generate(ids, mask, generation_config=given, **options)


@pytest.mark.parametrize("compiled", [True, False])
def test_prompts_that_run_under_autocast_are_decoded_as_they_are_outside(compiled: bool) -> None:
    """Compiled layers check no number formats; the wrong ones would be read past their ends."""
    first = FirstModel.from_base(tiny_llama())
    engine = DecodeEngine(first.plain_base, first.routing.stack, compiled=compiled)
    ids, mask = batch((9, 5))
    found = []
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoding = prefill(first, ids, mask, policy=FixedMask(KEEP))
            ours = engine.start(decoding.cache, mask, 4)
            found.append(torch.stack([ours.step(torch.tensor([5, 6])) for _ in range(4)]))
    assert found[0].dtype == found[1].dtype == torch.float32
    # Prompts are rounded to bfloat16, steps are not.
    assert 0 < (found[0] - found[1]).abs().max() / found[1].abs().max() < 0.02
    assert "bfloat16" not in str(engine.step(1).graphs.kinds[0].graph.graph)


@pytest.mark.usefixtures("uncompiled")
def test_a_model_that_has_decoded_can_be_copied() -> None:
    first = FirstModel.from_base(tiny_llama())
    ids, mask = batch((9,))
    options: dict[str, Any] = {"policy": FixedMask(KEEP), "max_new_tokens": 4, "engine": "fast"}
    wanted = first.generate(ids, mask, **options).sequences
    first.detach()
    other = copy.deepcopy(first)
    other.routing.attach()
    assert torch.equal(other.generate(ids, mask, **options).sequences, wanted)


@pytest.mark.usefixtures("uncompiled")
def test_each_prompt_of_many_has_the_mask_of_its_place() -> None:
    first = FirstModel.from_base(tiny_llama())
    prompts = [torch.tensor([5, 6]), [7, 8, 9, 10], [3]]
    masks = torch.tensor([KEEP, [True] * 4, [False, True, True, False]])
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_ids": (), "progress": False}
    for size in (2, 3):
        found = generate_many(first, prompts, FixedMask(masks), batch_size=size, **options)
        assert torch.equal(torch.stack([answer.keep for answer in found]), masks)
        for prompt, mask, answer in zip(prompts, masks, found, strict=True):
            (wanted,) = generate_many(first, [prompt], FixedMask(mask), **options)
            assert answer.ids == wanted.ids
    with pytest.raises(ConfigError, match="3 masks for 2 prompts"):
        generate_many(first, prompts[:2], FixedMask(masks), **options)
    with pytest.raises(ConfigError, match="Prompt 1 has a token id outside 0 to"):
        generate_many(first, [[5], [5, 10**6]], **options)
