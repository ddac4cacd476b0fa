# SPDX-License-Identifier: Apache-2.0
"""The caches with holes: what they count, hold and forget; and that each part is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import batch, decode, family, make_model, masks, mixed
from transformers import Cache, GenerationConfig

from firstlm import FirstModel, FixedMask
from firstlm.cache import SkipCache, make_cache
from firstlm.errors import ConfigError

NEW = 6


def error(name: str, keep: Any, kind: str) -> float:
    """Return how far cached decoding is from recomputation, relative to the largest logit."""
    first = FirstModel.from_base(family(name))
    try:
        ids, mask = batch((9, 5))
        more = {"cache_implementation": kind, "policy": FixedMask(keep)}
        tokens, logits = decode(first, ids, mask, NEW, **more)
        whole = torch.cat([mask, torch.ones(2, NEW - 1, dtype=mask.dtype)], 1)
        with torch.no_grad():
            output, _ = first(tokens[:, :-1], whole, policy=FixedMask(keep))
        wanted = output.logits[:, -NEW:]
        return float((logits - wanted).abs().max() / wanted.abs().max())
    finally:
        first.detach()


def with_cache(first: FirstModel, cache: SkipCache) -> dict[str, Any]:
    """Return the base model's cache argument, whose name depends on transformers."""
    return {first.routing.stack.cache_argument: cache}


def only_count(self: SkipCache, layer: int, tokens: int, stored: bool) -> None:
    self.tokens_seen[layer] += tokens


FIX = {
    "get_seq_length": Cache.get_seq_length,
    "get_mask_sizes": Cache.get_mask_sizes,
    "advance": only_count,
}
# Which part of the fix each kind of model and cache leans on.
NEEDED = [
    ("llama", "dynamic", "get_seq_length"),
    ("llama", "dynamic", "get_mask_sizes"),
    ("llama", "static", "get_seq_length"),
    ("gemma3", "dynamic", "get_seq_length"),
    ("gemma3", "dynamic", "get_mask_sizes"),
    ("gemma3", "dynamic", "advance"),
    ("gemma3", "static", "get_seq_length"),
    ("gemma3", "static", "advance"),
    ("mistral", "dynamic", "advance"),
    ("mistral", "static", "advance"),
]


@pytest.mark.parametrize(("name", "kind", "part"), NEEDED)
def test_without_the_fix_decoding_is_wrong(
    name: str, kind: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = [False, False, True, True]  # holes in the first sliding and the first full layer
    assert error(name, keep, kind) < 1e-4
    monkeypatch.setattr(SkipCache, part, FIX[part])
    try:
        wrong = error(name, keep, kind)
    except (RuntimeError, IndexError, ValueError):
        return  # wrong, and loudly so
    assert wrong > 1e-2


@pytest.mark.parametrize("prefill", ["skip", "full"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_kept_layers_and_rows_alone_take_memory(kind: str, prefill: str) -> None:
    first = FirstModel.from_base(family("llama"))
    ids, mask = batch()
    more = {"max_new_tokens": NEW, "cache_implementation": kind, "prefill": prefill}
    whole = first.generate(ids, mask, policy=FixedMask([True] * 4), **more).kv_bytes
    for keep in (*masks().values(), mixed(4)):
        output = first.generate(ids, mask, policy=FixedMask(keep), **more)
        assert output.kv_bytes * output.keep.numel() == whole * int(output.keep.sum())
    first.detach()


@pytest.mark.parametrize(("unit", "share"), [("attention", 0.5), ("mlp", 1.0)])
def test_memory_of_units(unit: str, share: float) -> None:
    from firstlm import RouterConfig

    first = FirstModel.from_base(family("llama"), RouterConfig(unit=unit))
    ids, mask = batch()
    whole = first.generate(ids, mask, policy=FixedMask([True] * 4), max_new_tokens=NEW).kv_bytes
    half = first.generate(ids, mask, policy=FixedMask([False, True] * 2), max_new_tokens=NEW)
    assert half.kv_bytes == share * whole
    first.detach()


@pytest.mark.parametrize("prefill", ["skip", "full"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_layer_counts_every_token(name: str, prefill: str) -> None:
    first = FirstModel.from_base(family(name))
    ids, mask = batch()
    output = first.generate(
        ids, mask, policy=FixedMask(mixed(4)), prefill=prefill, max_new_tokens=NEW
    )
    seen = ids.shape[1] + NEW - 1
    assert output.cache.tokens_seen == [seen] * 4
    assert output.cache.get_seq_length() == seen
    assert not output.cache.layers[1].is_initialized  # mixed() keeps layer 1 for no row
    first.detach()


def test_crop_forgets_tokens_in_holes_too() -> None:
    first = FirstModel.from_base(family("llama"))
    ids, mask = batch((9, 7))
    keep = torch.tensor([[False, True, True, True], [False, False, True, True]])
    state = first.new_state(mask, FixedMask(keep))
    cache = make_cache(first.base.config, state)
    other = batch((4, 4), seed=9)[0]
    joined = torch.cat([ids, other], 1)
    whole = torch.cat([mask, torch.ones_like(other)], 1)
    positions = (whole.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        first.base(
            ids,
            attention_mask=mask,
            position_ids=positions[:, :9],
            **with_cache(first, cache),
        )
        wrong = batch((3, 3), seed=8)[0]
        first.base(
            wrong,
            attention_mask=torch.cat([mask, torch.ones_like(wrong)], 1),
            position_ids=positions[:, 9:12],
            **with_cache(first, cache),
        )
        cache.crop(-3)
        assert cache.tokens_seen == [9] * 4
        logits = first.base(
            other,
            attention_mask=whole,
            position_ids=positions[:, 9:],
            **with_cache(first, cache),
        ).logits
        wanted = first(joined, whole, policy=FixedMask(keep))[0].logits[:, 9:]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    first.detach()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_can_be_selected_and_repeated(kind: str) -> None:
    first = FirstModel.from_base(family("gemma3"))
    ids, mask = batch((9, 5, 7))
    keep = torch.tensor([[True, False, True, True], [False, False, True, True], [True] * 4])
    order = torch.tensor([2, 0, 0])
    logits = []
    for change in (None, "select", "repeat"):
        rows = torch.arange(3)
        use = keep if change != "repeat" else keep[:2]
        put, seen = (ids, mask) if change != "repeat" else (ids[:2], mask[:2])
        if change is None:
            put, seen, use = ids[order], mask[order], keep[order]
        cache = make_cache(first.base.config, first.new_state(seen, FixedMask(use)), kind, 12)
        positions = (seen.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            first.base(
                put,
                attention_mask=seen,
                position_ids=positions,
                **with_cache(first, cache),
            )
            if change == "select":
                cache.batch_select_indices(order)
                rows = order
            elif change == "repeat":
                cache.batch_repeat_interleave(2)
                rows = torch.tensor([0, 0, 1, 1])
            else:
                rows = order
            assert cache.batch_size == len(rows)
            step = torch.cat([mask[rows], torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
            output = first.base(
                ids[rows, -1:],
                attention_mask=step,
                **with_cache(first, cache),
                position_ids=step.sum(1, keepdim=True) - 1,
            )
        logits.append(output.logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[2][0], logits[0][1], rtol=0, atol=1e-5)
    first.detach()


def test_reset_forgets_the_decisions() -> None:
    first = FirstModel.from_base(family("llama"))
    output = first.generate(*batch(), policy=FixedMask(mixed(4)), max_new_tokens=2)
    output.cache.reset()
    assert output.cache.tokens_seen == [0] * 4
    assert not output.cache.state.complete
    with pytest.raises(ConfigError, match="has not passed all layers"):
        _ = output.cache.state.keep
    first.detach()


def test_unknown_kinds_are_refused() -> None:
    first = FirstModel.from_base(family("llama"))
    with pytest.raises(ConfigError, match="'quantized' cannot hold skipped layers"):
        first.generate(*batch(), max_new_tokens=2, cache_implementation="quantized")
    first.detach()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_config_that_says_no_cache_does_not_matter(kind: str) -> None:
    base = make_model("llama", use_cache=False)
    ids, mask = batch()
    wanted = decode(base, ids, mask, NEW, use_cache=True)
    first = FirstModel.from_base(base)
    with first.run_all():
        found = decode(first, ids, mask, NEW, cache_implementation=kind)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-6)
    assert first.base.config.use_cache is False
    base.generation_config.cache_implementation = "static"  # some hub models bring their own
    with first.run_all():
        assert torch.equal(decode(first, ids, mask, NEW, cache_implementation=kind)[0], wanted[0])
        config = GenerationConfig(max_new_tokens=NEW, cache_implementation=kind, do_sample=False)
        output = first.generate(ids, mask, generation_config=config)
    assert type(output.cache).__name__.lower().startswith(kind)
    assert torch.equal(output.sequences, wanted[0])
