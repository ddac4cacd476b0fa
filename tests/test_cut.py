# SPDX-License-Identifier: Apache-2.0
"""A model that was cut for good computes what the whole one does with its mask, on its weights."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from families import make_model

from firstlm import FirstModel
from firstlm.cut import cut
from firstlm.errors import ConfigError
from firstlm.layers import decoder_layers
from firstlm.policies import FixedMask


@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "gpt2", "qwen2", "gpt_neox", "smollm3", "bloom"]
)
def test_it_computes_what_the_mask_does(family: str) -> None:
    base = make_model(family).eval()
    stack = decoder_layers(base)
    keep = [i % 3 != 1 for i in range(len(stack))]
    short = cut(base, stack, keep)
    assert len(decoder_layers(short)) == sum(keep) < len(keep)
    assert "forward" not in vars(decoder_layers(short).modules[0])
    ids = torch.arange(1, 8)[None]
    routed = FirstModel.from_base(base)
    wanted = routed.generate(ids, policy=FixedMask(keep), max_new_tokens=5, eos_token_id=None)
    found = short.generate(ids, max_new_tokens=5, eos_token_id=None, do_sample=False)
    assert torch.equal(found, wanted.sequences)


def test_its_weights_are_those_of_the_whole_model() -> None:
    base = tiny_llama()
    short = cut(base, decoder_layers(base), [True, False, False, True])
    mine = {p.data_ptr() for p in short.parameters()}
    assert mine < {p.data_ptr() for p in base.parameters()}
    old, new = base.model.layers[3].mlp.up_proj.weight, short.model.layers[1].mlp.up_proj.weight
    assert old.data_ptr() == new.data_ptr()
    assert base.config.num_hidden_layers == 4


def test_a_mask_that_does_not_fit_is_refused() -> None:
    base = tiny_llama()
    for keep in ([True], [False] * 4):
        with pytest.raises(ConfigError, match="keep"):
            cut(base, decoder_layers(base), keep)
