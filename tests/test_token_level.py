# SPDX-License-Identifier: Apache-2.0
"""Diagnostics that look at the scored prompts: routing token by token, and their majority mask."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import tiny_llama

from firstlm import FirstModel
from firstlm.config import RouterConfig
from firstlm.errors import ConfigError
from firstlm.eval_policies import choose
from firstlm.evaluate import evaluate
from firstlm.examples import Example
from firstlm.inputs import pad_left
from firstlm.policies import FixedMask
from firstlm.token_level import TokenLevel, usage

LAYERS = 8
PROMPTS = [[97 + (7 * i + j) % 26 for j in range(4 + i % 5)] for i in range(12)]


def model_with(biases: list[float], scale: float = 0.0, **options) -> FirstModel:
    """Return a model whose routers have these biases, and weights drawn at a scale."""
    torch.manual_seed(1)
    model = FirstModel.from_base(tiny_llama(layers=LAYERS), RouterConfig(**options))
    with torch.no_grad():
        for router, bias in zip(model.routers, biases, strict=True):
            router.bias.fill_(bias)
            router.weight.normal_(0, scale) if scale else router.weight.zero_()
    return model.eval()


def policy_of(model: FirstModel, rate: float = 0.25) -> TokenLevel:
    stack = model.routing.stack
    return TokenLevel(model.routers, stack.modules, stack.locked, rate)


def test_usage_counts_pairs_that_later_tokens_need():
    keep = torch.tensor([[[1, 0], [0, 0], [1, 1], [0, 1]], [[0, 0], [0, 0], [1, 0], [1, 0]]]).bool()
    own = torch.tensor([[True] * 4, [False, False, True, True]])
    rates, again = usage(keep, own)
    # Row 0 skips 4 of 8 pairs. Layer 0 at token 1 and layer 1 at tokens 0 and 1 are needed later;
    # layer 0 at token 3 is not. Row 1 has two tokens of its own, and never runs layer 1.
    assert rates == [0.5, 0.5]
    assert again == [0.75, 0.0]


@torch.no_grad()
def test_tokens_that_all_skip_a_layer_leave_it_out():
    model = model_with([-3.0 if layer == 2 else 3.0 for layer in range(LAYERS)], scale=1e-4)
    ids, mask = pad_left(PROMPTS, 0)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    mask_of_it = FixedMask([layer != 2 for layer in range(LAYERS)])
    wanted = model.generate(ids, policy=mask_of_it, **options)
    policy = policy_of(model)
    with policy.applied():
        found = model.generate(ids, policy=policy, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.layer_calls["decode"] > wanted.layer_calls["decode"]
    keep, rates, again = policy.take(mask, [4] * len(PROMPTS))
    assert torch.equal(keep, mask_of_it.keep.expand(len(PROMPTS), -1))
    assert rates == pytest.approx([1 / LAYERS] * len(PROMPTS))
    assert again == [0.0] * len(PROMPTS)
    plain = model.generate(ids, policy=FixedMask([True] * LAYERS), **options)
    assert not torch.equal(plain.sequences, wanted.sequences)  # layer 2 does something


@torch.no_grad()
def test_decoding_with_a_cache_is_computing_all_anew():
    model, prompt = model_with([0.3] * LAYERS, scale=1.0).double(), PROMPTS[4]
    policy, ids = policy_of(model), torch.tensor([prompt])
    policy.fit(lambda: model.decide(ids, torch.ones_like(ids), policy), torch.ones_like(ids))
    with policy.applied():
        found = model.generate(ids, policy=policy, max_new_tokens=6, do_sample=False)
        text = ids
        for _ in range(6):
            logits = model.base(input_ids=text, use_cache=False).logits[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    assert found.sequences.tolist() == text.tolist()


@pytest.mark.parametrize("rate", [0.15, 0.25, 0.4])
def test_the_rate_is_met_over_tokens(rate):
    model = model_with([0.3] * LAYERS, scale=1.0)
    policy = policy_of(model, rate)
    ids, mask = pad_left(PROMPTS, 0)
    policy.fit(lambda: model.decide(ids, mask, policy), mask)
    with policy.applied():
        model.decide(ids, mask, policy)
    _, rates, again = policy.take(mask, [0] * len(ids))
    tokens = torch.tensor([float(len(prompt)) for prompt in PROMPTS])
    assert float((torch.tensor(rates) * tokens).sum() / tokens.sum()) == pytest.approx(
        rate, abs=0.02
    )
    assert 0 < sum(again) / len(again) < 1


def test_untrained_routers_are_refused():
    with pytest.raises(ConfigError, match="say the same of all tokens"):
        policy_of(model_with([0.3] * LAYERS))


def test_where_a_rate_cannot_be_met_the_nearest_is_taken():
    """Layers whose routers hardly look at tokens go as a whole: here 1, 4 or all of 8."""
    model = model_with([-6.0] + [-3.0] * 3 + [3.0] * 4, scale=1e-4)
    policy, (ids, mask) = policy_of(model, 0.25), pad_left(PROMPTS, 0)
    policy.fit(lambda: model.decide(ids, mask, policy), mask)
    with policy.applied():
        model.decide(ids, mask, policy)
    assert policy.take(mask, [0] * len(ids))[1] == pytest.approx([1 / 8] * len(ids))


@pytest.fixture
def calibrated(byte_tokenizer) -> FirstModel:
    from firstlm.calibration import calibrate

    model = model_with([0.3] * LAYERS, scale=1.0)
    model.tokenizer = byte_tokenizer
    calibrate(model, PROMPTS, [0.15, 0.25, 0.4], ["skip"], 8)
    return model


def test_they_are_scored_beside_the_routers(calibrated):
    examples = [Example(str(i), "".join(map(chr, p)), " a", ("a",)) for i, p in enumerate(PROMPTS)]
    runs = {
        policy: evaluate(
            calibrated,
            examples,
            policy,
            0.25,
            max_new_tokens=4,
            batch_size=5,
            timed=1,
            progress=False,
        )
        for policy in ("router", "majority_here", "token_level")
    }
    routed, majority, tokens = runs.values()
    assert majority["skip_rate"]["mean"] == pytest.approx(routed["skip_rate"]["mean"], abs=0.05)
    skipped = Counter(
        layer for item in routed["items"] for layer, kept in enumerate(item["keep"]) if kept == "0"
    )
    for item in majority["items"]:
        gone = [layer for layer, kept in enumerate(item["keep"]) if kept == "0"]
        rest = set(range(LAYERS)) - set(gone)
        assert min(skipped[layer] for layer in gone) >= max(skipped[layer] for layer in rest)
    assert tokens["skip_rate"]["mean"] == pytest.approx(0.25, abs=0.05)
    assert 0 < tokens["kv_recomputed"] < 1
    assert tokens["tpot_ratio"] is None
    assert routed["tpot_ratio"] is not None
    assert "kv_recomputed" not in routed
    assert tokens["perplexity"] != routed["perplexity"]


def test_what_cannot_be_routed_by_token_is_refused(calibrated):
    with pytest.raises(ConfigError, match="unit='block' and prefill='skip'"):
        choose(calibrated, "token_level", 0.25, "full", 0)
    with pytest.raises(ConfigError, match="'token_level' needs a skip_rate"):
        choose(calibrated, "token_level", None, "skip", 0)
    with pytest.raises(ConfigError, match="routers that read states"):
        policy_of(model_with([0.0] * LAYERS, reads="length"))
