# SPDX-License-Identifier: Apache-2.0
"""Routing holds over transformers' decoder families: identity, cache, rows, routers, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from families import FAMILIES, batch, decode, discarding, masks, mixed
from transformers import AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from firstlm import FirstModel, FixedMask
from firstlm.errors import ConfigError, UnsupportedModelError

NEW = 6
# Not made for static caches, as their classes say; and Falcon with alibi fails with them by itself.
NO_STATIC = {"aria_text", "ctrl", "dbrx", "doge", "falcon_alibi", "gpt_neo", "jetmoe", "mpt"}


@pytest.fixture(params=FAMILIES)
def routed(request: pytest.FixtureRequest) -> Iterator[FirstModel]:
    first = FirstModel.from_base(families.family(request.param))
    first.family = request.param
    yield first
    first.detach()


def usable(first: FirstModel, keep: Any) -> torch.Tensor:
    """Return the mask with the layers on that this model locks."""
    keep = torch.as_tensor(keep).clone()
    keep[..., sorted(first.routing.stack.locked)] = True
    return keep


def has_static(first: FirstModel) -> bool:
    if families.OLD and (first.family == "llama4" or not first.base._can_compile_fullgraph):
        return False
    return first.family not in NO_STATIC


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    assert wanted.isfinite().all()
    return float((found - wanted).abs().max() / wanted.abs().max())


def recompute(
    first: FirstModel, tokens: torch.Tensor, mask: torch.Tensor, keep: Any
) -> torch.Tensor:
    """Return the logits of the last NEW steps, from whole sequences without a cache."""
    more = torch.ones(len(mask), tokens.shape[1] - 1 - mask.shape[1], dtype=mask.dtype)
    with torch.no_grad():
        output, _ = first(tokens[:, :-1], torch.cat([mask, more], 1), policy=FixedMask(keep))
    return output.logits[:, -NEW:]


def oracle(first: FirstModel, ids: torch.Tensor, mask: torch.Tensor, keep: torch.Tensor) -> Any:
    """Generate with the base alone, computing and discarding what the mask does not keep."""
    first.detach()
    try:
        with discarding(keep, first.routing.stack.modules):
            return decode(first.base, ids, mask, NEW, use_cache=True)
    finally:
        first.routing.attach()


def test_run_all_is_the_base_to_the_bit(routed: FirstModel) -> None:
    ids, mask = batch()
    first_tokens, first_logits = decode(routed, ids, mask, NEW, policy=None, skip_rate=0.0)
    with routed.run_all(), torch.no_grad():
        tokens, logits = decode(routed, ids, mask, NEW)
        whole = routed(ids)[0].logits
    base = routed.detach()
    wanted_tokens, wanted_logits = decode(base, ids, mask, NEW, use_cache=True)
    assert torch.equal(tokens, wanted_tokens)
    assert torch.equal(logits, wanted_logits)
    assert torch.equal(first_tokens, wanted_tokens)
    assert torch.equal(first_logits, wanted_logits)
    with torch.no_grad():
        assert torch.equal(whole, base(input_ids=ids, use_cache=False).logits)


def test_cached_decoding_equals_recomputation(routed: FirstModel) -> None:
    ids, mask = batch()
    count = routed.layer_count
    for name, keep in {**masks(count), "mixed": mixed(len(ids), count)}.items():
        keep = usable(routed, keep)
        tokens, logits = decode(routed, ids, mask, NEW, policy=FixedMask(keep))
        assert far(logits, recompute(routed, tokens, mask, keep)) < 1e-4, name
        if name in ("mixed", "first"):
            wanted_tokens, wanted_logits = oracle(routed, ids, mask, keep)
            assert torch.equal(tokens, wanted_tokens), name
            assert far(logits, wanted_logits) < 1e-4, name
        if name in ("mixed", "first+last", "none kept") and has_static(routed):
            static_tokens, static_logits = decode(
                routed, ids, mask, NEW, policy=FixedMask(keep), cache_implementation="static"
            )
            assert torch.equal(static_tokens, tokens), name
            assert far(static_logits, logits) < 1e-4, name


def test_rows_of_a_mixed_batch_equal_rows_alone(routed: FirstModel) -> None:
    # Four prompts of four tokens for four heads and layers: any mix-up of dimensions shows.
    ids, mask = batch((4, 3, 1, 4))
    keep = usable(routed, mixed(4, routed.layer_count))
    tokens, logits = decode(routed, ids, mask, 3, policy=FixedMask(keep))
    right = decode(routed, *batch((4, 3, 1, 4), side="right"), 3, policy=FixedMask(keep))
    assert torch.equal(right[0], tokens)
    assert torch.equal(right[1], logits)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone_tokens, alone_logits = decode(
            routed,
            ids[row : row + 1, -length:],
            mask[row : row + 1, -length:],
            3,
            policy=FixedMask(keep[row]),
        )
        assert torch.equal(tokens[row, -3:], alone_tokens[0, -3:]), row
        assert far(logits[row], alone_logits[0]) < 1e-4, row


def test_same_prompt_same_mask(routed: FirstModel) -> None:
    torch.manual_seed(3)
    for router in routed.routers:
        router.weight.data.normal_(0, 3)
        router.bias.data.zero_()
    lengths = (9, 5, 1, 7)
    left, right = batch(lengths), batch(lengths, side="right")
    keep = routed.generate(*left, max_new_tokens=1).keep
    assert 0 < keep.float().mean() < 1
    assert torch.equal(routed.generate(*right, max_new_tokens=1).keep, keep)
    assert torch.equal(routed.decide(*left).keep, keep)
    assert torch.equal(routed.decide(*right).keep, keep)
    for row, length in enumerate(lengths):
        alone = routed.generate(left[0][row : row + 1, -length:], max_new_tokens=1)
        assert torch.equal(alone.keep[0], keep[row]), row


def test_many_families() -> None:
    assert len(FAMILIES) >= 30


@pytest.mark.skipif(families.OLD, reason="configs of older transformers do not name producers")
def test_shared_keys_and_values_lock_their_producers() -> None:
    first = FirstModel.from_base(families.family("gemma4_shared"))
    assert first.routing.stack.locked == {2, 3}
    ids, mask = batch()
    keep = torch.tensor([True, True, False, True, True, True])
    with pytest.raises(ConfigError, match=r"Layers \[2\] cannot be skipped"):
        first.generate(ids, mask, policy=FixedMask(keep))
    for router in first.routers:
        router.bias.data.fill_(-1)
    output = first.generate(ids, mask, max_new_tokens=3)
    assert output.keep.tolist() == [[False, False, True, True, False, False]] * 4
    first.detach()


REFUSED = {
    "mamba": "state-space",
    "falcon_mamba": "state-space",
    "jamba": "state-space",
    "rwkv": "state-space",
    "recurrent_gemma": "state-space",
    "qwen3_next": "linear-attention",
    "minimax": "linear-attention",
    "lfm3": "state",
    "deepseek_v4": "compressed",
    "openai-gpt": "takes no KV cache",
    "bert": "no list of 4 decoder layers",
    "longcat_flash": "no list of .* decoder layers",
    "hy_v4": "choose for later layers",
    "glm_moe_dsa": "choose for later layers",
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name in CONFIG_MAPPING])
def test_refused_families_say_why(name: str) -> None:
    base = families.make_model(name, torch.float32, **families.EXTRA.get(name, {}))
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        FirstModel.from_base(base)
    assert all("forward" not in vars(module) for module in base.modules())


def test_gemma3n_is_refused() -> None:
    base = families.make_model(
        "gemma3n_text",
        torch.float32,
        num_hidden_layers=6,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 6,
        layer_types=["sliding_attention", "full_attention"] * 3,
    )
    with pytest.raises(UnsupportedModelError, match="does not pass"):
        FirstModel.from_base(base)


@pytest.mark.skipif(not families.OLD, reason="newer configs name the layers that share")
def test_shared_keys_and_values_are_refused_by_older_transformers() -> None:
    base = families.make_model("gemma4_text", **families.GEMMA4_SHARED)
    with pytest.raises(UnsupportedModelError, match="newer transformers"):
        FirstModel.from_base(base)


def test_encoder_decoders_and_bare_models_are_refused() -> None:
    from transformers import BertConfig, BertModel, T5Config

    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(d_model=32, d_ff=32, num_layers=2, num_heads=4, d_kv=8, vocab_size=64)
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        FirstModel.from_base(t5)
    bert = BertModel(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            vocab_size=64,
        )
    )
    with pytest.raises(UnsupportedModelError, match="cannot generate"):
        FirstModel.from_base(bert)
    with pytest.raises(UnsupportedModelError, match="no transformers model"):
        FirstModel.from_base(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["gpt_neo", "doge"])
def test_static_caches_are_refused_where_the_family_has_none(name: str) -> None:
    first = FirstModel.from_base(families.family(name))
    with pytest.raises(ConfigError, match="not made for static caches"):
        first.generate(*batch(), max_new_tokens=2, cache_implementation="static")
    first.detach()
