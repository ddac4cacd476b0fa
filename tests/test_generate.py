# SPDX-License-Identifier: Apache-2.0
"""The loop takes the tokens that transformers' generate takes, and tells their times."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from conftest import tiny_llama

from firstlm import FirstModel, FixedMask, RunAll
from firstlm.errors import ConfigError
from firstlm.generate import decode_step, pick, prefill, stream

NEW = 8
MASKS = [[True, True, True, True], [False, True, True, False], [True, False, False, True]]


def small(family: str):
    """Return a tiny routed model; GPT-2 needs position_ids, Mistral's window slides."""
    if family == "llama":
        return FirstModel.from_base(tiny_llama())
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_layer": 4, "n_embd": 32, "n_head": 4, "n_positions": 128},
        "bloom": {"n_layer": 4, "hidden_size": 32, "n_head": 4},
        "mistral": {
            "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "sliding_window": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        },
    }  # fmt: skip
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=259, **special, **sizes[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FirstModel.from_base(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(params=["llama", "gpt2", "bloom", "mistral"])
def model(request):
    return small(request.param)


@pytest.fixture
def llama():
    return small("llama")


def batch(lengths=(9, 4, 1)):
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(3, 259, (length,), generator=generator)
        mask[row, -length:] = 1
    return ids, mask


def tokens_of(*args, **kwargs):
    return torch.stack([token.ids for token in stream(*args, **kwargs)], dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("mode", ["skip", "full"])
def test_same_tokens_as_generate_with_a_mask_per_row(model, mode, cache):
    ids, mask = batch()
    policy = FixedMask(torch.tensor(MASKS))
    if cache == "static" and model.config.model_type == "bloom":
        with pytest.raises(ConfigError, match="dynamic"):
            prefill(model, ids, mask, policy=policy, cache=cache)
        return
    hf = model.generate(
        ids, mask, policy=policy, prefill=mode, max_new_tokens=NEW, cache_implementation=cache
    )
    found = list(
        stream(model, ids, mask, policy=policy, prefill=mode, max_new_tokens=NEW, cache=cache)
    )
    width = hf.sequences.shape[1] - ids.shape[1]
    assert len(found) == width
    assert torch.equal(torch.stack([t.ids for t in found], 1), hf.sequences[:, -width:])
    last = found[-1].decoding
    assert torch.equal(last.state.keep, torch.tensor(MASKS))
    assert last.state.layer_calls == hf.layer_calls
    assert last.cache.kv_bytes == hf.kv_bytes


def test_padding_on_the_right_is_the_same_as_on_the_left(llama):
    ids, mask = batch()
    order = mask.argsort(dim=1, descending=True, stable=True)
    right = (ids.gather(1, order), mask.gather(1, order))
    assert not torch.equal(right[1], mask)
    assert torch.equal(
        tokens_of(llama, ids, mask, max_new_tokens=NEW),
        tokens_of(llama, *right, max_new_tokens=NEW),
    )


def test_steps_are_the_models_own_logits_under_the_same_mask(model):
    ids, mask = batch((7,))
    policy = FixedMask(torch.tensor(MASKS[1]))
    decoding = prefill(model, ids, mask, policy=policy)
    for _ in range(4):
        with torch.no_grad():
            whole, _ = model(ids, torch.ones_like(ids), policy=policy)
        torch.testing.assert_close(decoding.logits, whole.logits[:, -1])
        chosen = decoding.logits.argmax(-1)
        ids = torch.cat([ids, chosen.unsqueeze(1)], 1)
        assert decode_step(model, decoding, chosen) is decoding.logits


def test_routers_decide_as_in_generate_and_run_all_is_obeyed(llama):
    for i, router in enumerate(llama.routers):
        router.bias.data.fill_(1.0 if i % 2 else -1.0)
    ids, mask = batch()
    kept = llama.generate(ids, mask, max_new_tokens=2).keep
    assert torch.equal(prefill(llama, ids, mask).state.keep, kept)
    assert not kept.all()
    with llama.run_all():
        assert prefill(llama, ids, mask).state.keep.all()


def test_a_row_that_ends_gives_pad_tokens_and_all_ended_rows_end_the_stream(llama):
    ids, mask = batch()
    free = tokens_of(llama, ids, mask, policy=RunAll(), max_new_tokens=NEW, eos_token_ids=())
    assert free.shape == (3, NEW)
    end = int(free[0, 2])
    hf = llama.generate(ids, mask, policy=RunAll(), max_new_tokens=NEW, eos_token_id=end)
    found = list(stream(llama, ids, mask, policy=RunAll(), max_new_tokens=NEW, eos_token_ids=[end]))
    got = torch.stack([t.ids for t in found], 1)
    assert torch.equal(got, hf.sequences[:, ids.shape[1] :])
    assert bool(found[2].done[0])
    alone = tokens_of(
        llama, ids[:1], mask[:1], policy=RunAll(), max_new_tokens=NEW, eos_token_ids=end
    )
    assert alone.shape[1] == 1 + free[0].tolist().index(end) <= 3


def test_a_full_static_cache_says_so(llama):
    ids, mask = batch()
    decoding = prefill(llama, ids, mask, policy=RunAll(), cache="static", max_new_tokens=1)
    decode_step(llama, decoding, decoding.logits.argmax(-1))
    with pytest.raises(ConfigError, match="full with 10 tokens"):
        decode_step(llama, decoding, decoding.logits.argmax(-1))


def test_times_rise_from_the_call_and_leave_the_reader_out(llama):
    ids, mask = batch()
    times = []
    for token in stream(llama, ids, mask, max_new_tokens=3, eos_token_ids=()):
        times.append(token.seconds)
        time.sleep(2)
    assert len(times) == 3
    assert times[0] > 0
    assert times == sorted(times)
    assert times[-1] < 2


def test_a_seed_fixes_the_samples(llama):
    ids, mask = batch()
    options = {"temperature": 1.0, "max_new_tokens": NEW, "eos_token_ids": ()}
    one = tokens_of(llama, ids, mask, seed=1, **options)
    assert torch.equal(one, tokens_of(llama, ids, mask, seed=1, **options))
    assert not torch.equal(one, tokens_of(llama, ids, mask, seed=2, **options))


def test_pick_takes_the_likeliest_tokens_that_make_up_the_share():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    assert pick(logits).unique().tolist() == [0]
    seen = pick(logits, 1.0, 0.7, generator).bincount(minlength=4) / 4000
    assert seen[2:].tolist() == [0, 0]
    assert seen[0] == pytest.approx(0.5 / 0.8, abs=0.03)
    assert pick(logits, 1.0, 0.01, generator).unique().tolist() == [0]
    colder = pick(logits, 0.5, 1.0, generator).bincount(minlength=4) / 4000
    assert colder[0] == pytest.approx(0.25 / 0.365, abs=0.03)


@pytest.mark.parametrize("top_p", [5e-324, 1e-40, 1e-9])
def test_next_to_no_share_leaves_the_likeliest_token(top_p: float) -> None:
    assert pick(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 2.9]]), 1.0, top_p).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-38, 1e-6, 1e-4])
def test_next_to_no_temperature_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([[1e3, 1.0, -1e3], [-1e3, -30.0, -2e3]])
    for top_p in (1.0, 0.5):
        assert pick(logits, temperature, top_p).tolist() == [0, 1]


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"prefill": "half"}]
)
def test_options_that_cannot_work(llama, wrong):
    with pytest.raises(ConfigError):
        next(stream(llama, *batch(), **wrong))


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(1, 3), r"\(1, 3\); expected \(1, 5\)"),
        (torch.ones(1, 7), r"\(1, 7\); expected \(1, 5\)"),
        (torch.ones(2, 5), r"\(2, 5\); expected \(1, 5\)"),
        (torch.zeros(1, 5), "hides every token"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: torch.Tensor, says: str) -> None:
    model = FirstModel.from_base(tiny_llama())
    for door in (model.generate, model.decide, partial(prefill, model)):
        with pytest.raises(ConfigError, match=says):
            door(torch.arange(5)[None], attention_mask=mask.long())


def test_a_detached_model_says_so() -> None:
    model = FirstModel.from_base(tiny_llama())
    base = model.detach()
    with pytest.raises(ConfigError, match="was detached"):
        model.generate(torch.arange(5)[None], max_new_tokens=2)
    assert base.generate(torch.arange(5)[None], max_new_tokens=2).shape == (1, 7)


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_the_vocabulary_matmul_reads_no_strided_view(way):
    """For one, the CPU copies the whole matrix once a row."""
    model = FirstModel.from_base(tiny_llama())
    seen = []
    model.base.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = torch.randint(5, 200, (3, 7))
    if way == "generate":
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    else:
        list(stream(model, ids, max_new_tokens=3))
    assert [tuple(states.shape[:2]) for states in seen] == [(3, 1)] * 3
    assert all(states.is_contiguous() for states in seen)


def test_beams_share_no_vocabulary_matmul_twice():
    model = FirstModel.from_base(tiny_llama())
    seen = []
    model.base.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    ids = torch.randint(5, 200, (3, 7))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    model.generate(ids, num_beams=4, **options)
    assert {tuple(shape) for shape in seen[1:]} == {(12, 1)}
    assert seen[0][1] == 1
