# SPDX-License-Identifier: Apache-2.0
"""A model that was cut for good computes what the whole one does with its mask, on its weights."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from conftest import tiny_llama
from families import FAMILIES, make_model

from firstlm import FirstModel
from firstlm.cut import cut
from firstlm.errors import ConfigError, UnsupportedModelError
from firstlm.layers import decoder_layers
from firstlm.policies import FixedMask

# Families in which some layers' weights or constants go by their number or by how many there are:
# without one of these layers, the others cannot move up.
TIED = {
    "beam": (0, 1),
    "diffllama": (0, 1),
    "flint": (0, 1),
    "gemma4": (0, 1),
    "gemma4_shared": (0, 1),
    "llama4": (0, 1),
    "minicpm3": (0, 1),
    **dict.fromkeys(["afmoe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe"], (0,)),
    "modernbert-decoder": (0,),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", [0, 1])
def test_it_computes_what_the_mask_does_or_is_refused(family: str, gone: int) -> None:
    base = families.family(family)
    stack = decoder_layers(base)
    keep = [i != gone or i in stack.locked for i in range(len(stack))]
    if gone in TIED.get(family, ()):
        with pytest.raises(UnsupportedModelError, match="goes by its number"):
            cut(base, stack, keep)
        return
    short = cut(base, stack, keep)
    assert len(decoder_layers(short)) == sum(keep)
    assert not any(module._forward_hooks for module in stack.modules)
    ids = torch.arange(1, 8)[None]
    routed = FirstModel.from_base(base)
    try:
        options = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": False}
        wanted = routed.generate(ids, policy=FixedMask(keep), **options)
        assert torch.equal(short.generate(ids, **options), wanted.sequences)
    finally:
        routed.detach()


@pytest.mark.parametrize(
    ("family", "more"),
    [("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("minicpm3", {"num_hidden_layers": 24})],
)
def test_a_constant_that_goes_by_a_layers_number_is_seen(family: str, more: Any) -> None:
    base = make_model(family, **more)
    stack = decoder_layers(base)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        cut(base, stack, [i != 1 for i in range(len(stack))])


def test_it_may_be_cut_while_it_is_routed_or_trains() -> None:
    base = make_model("gpt2", attn_pdrop=0.5).train()
    FirstModel.from_base(base)
    cut(base, decoder_layers(base), [True, False, True, True])
    assert base.training


def test_its_weights_are_those_of_the_whole_model() -> None:
    base = tiny_llama()
    short = cut(base, decoder_layers(base), [True, False, False, True])
    mine = {p.data_ptr() for p in short.parameters()}
    assert mine < {p.data_ptr() for p in base.parameters()}
    old, new = base.model.layers[3].mlp.up_proj.weight, short.model.layers[1].mlp.up_proj.weight
    assert old.data_ptr() == new.data_ptr()
    assert base.config.num_hidden_layers == 4


def test_it_ends_answers_where_the_whole_model_does() -> None:
    base = tiny_llama()
    base.generation_config.eos_token_id = [2, 7]
    short = cut(base, decoder_layers(base), [True, False, True, True])
    assert short.generation_config.eos_token_id == [2, 7]
    assert short.generation_config is not base.generation_config


def test_a_mask_that_does_not_fit_is_refused() -> None:
    base = tiny_llama()
    for keep in ([True], [False] * 4):
        with pytest.raises(ConfigError, match="keep"):
            cut(base, decoder_layers(base), keep)
