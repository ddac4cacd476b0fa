# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers' decoder families, and an oracle to hold routing against.

The oracle computes every layer with stock caches and throws away what a mask does not keep. It
shares no code with firstlm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def _words(text: str) -> list[str]:
    return text.split()


LAYERS = 4
HEADS = 4
VOCAB = 128
WINDOW = 6  # shorter than every padded prompt here

# Given to every config that knows the name.
COMMON = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_positions": 128,
    "n_inner": 64,
    "max_seq_len": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MLA = {
    "num_key_value_heads": HEADS,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GEMMA4 = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
GEMMA4_SHARED = GEMMA4 | {
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}

EXTRA = {"longcat_flash": MLA, "glm_moe_dsa": MLA}  # for families that are refused
# Their own code is not for float64: fully masked rows become nan, or dtypes clash.
FLOAT32 = _words("""
    afmoe aria_text beam bloom cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 ernie4_5_moe
    exaone_moe flex_olmo flint gemma2 glm4_moe glm4_moe_lite gpt_oss granite_swa
    granitemoe granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 kolibri1 laguna mellum
    mimo_v2_flash minimax_m2 minimax_m3_vl_text mixtral mpt olmoe phimoe qwen2_moe qwen3_moe
    solar_open vaultgemma xglm
""")

# Every family that must work: name -> (model_type, what its config needs besides COMMON).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {})
    for name in _words("""
        afmoe apertus arcee aria_text beam biogpt bitnet bloom cohere cohere2 cohere2_moe cwm
        diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 glm
        glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss granite granite_swa
        granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
        hyperclovax jais2 jetmoe kolibri1 laguna llama mellum mimo_v2_flash minimax_m2 ministral
        ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3
        olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
        solar_open stablelm starcoder2 vaultgemma xglm lfm2 minimax_m3_vl_text ctrl
    """)
}
FAMILIES |= {
    "codegen": ("codegen", {"rotary_dim": 4}),
    "dbrx": (
        "dbrx",
        {
            "d_model": 32,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    "deepseek_v2": ("deepseek_v2", MLA),
    "deepseek_v3": ("deepseek_v3", MLA),
    "deepseek_v32": ("deepseek_v32", MLA),
    "falcon": ("falcon", {"multi_query": True}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "gemma3": ("gemma3_text", SLIDING_THEN_FULL),
    "gemma4": ("gemma4_text", GEMMA4 | SLIDING_THEN_FULL),
    "gemma4_shared": ("gemma4_text", GEMMA4_SHARED),
    "glm4_moe_lite": ("glm4_moe_lite", MLA),
    "gpt_neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": WINDOW},
    ),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "llama4": ("llama4_text", {}),
    "minicpm3": ("minicpm3", MLA),
    "qwen3_sliding": ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}),
    "youtu": ("youtu", MLA),
}

# Older versions lack families; their Doge lets rows of a batch change each other, and their configs
# do not say which layers share keys and values.
OLD = Version(transformers.__version__) < Version("5.23")
FAMILIES = {
    name: kind
    for name, kind in FAMILIES.items()
    if kind[0] in CONFIG_MAPPING and not (OLD and name in ("doge", "gemma4_shared"))
}


def make_config(name: str, **more: Any) -> Any:
    """Return the tiny config of a family."""
    model_type, extra = FAMILIES.get(name, (name, {}))
    cls = CONFIG_MAPPING[model_type]
    known = cls()
    renamed = getattr(cls, "attribute_map", {})
    given = {key: value for key, value in COMMON.items() if _accepts(cls, known, key)}
    given |= extra | more
    return cls(**{k: v for k, v in given.items() if renamed.get(k) not in given})


def _accepts(cls: type, known: Any, key: str) -> bool:
    own = getattr(cls, key, None)
    if isinstance(own, property):
        return own.fset is not None
    return key in vars(known) or key in getattr(cls, "attribute_map", {}) or own is not None


def make_model(name: str, dtype: torch.dtype | None = None, seed: int = 0, **more: Any) -> Any:
    """Return a random model in eval mode, its weights large enough for every layer to matter."""
    dtype = dtype or (torch.float32 if name in FLOAT32 else torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(name, **more)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@cache
def family(name: str) -> Any:
    """Return the shared model of a family; put its forwards back after use."""
    return make_model(name)


def batch(
    lengths: tuple[int, ...] = (9, 5, 1, 7), side: str = "left", seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random prompts of these lengths, padded on one side, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(2, VOCAB, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


def masks(layers: int = LAYERS) -> dict[str, list[bool]]:
    """Return the masks that broke caches before: where the holes are matters."""
    every = range(layers)
    return {
        "first": [i != 0 for i in every],
        "first+last": [i not in (0, layers - 1) for i in every],
        "all but one": [i == layers // 2 for i in every],
        "none kept": [False for _ in every],
        "even": [i % 2 == 0 for i in every],
        "odd": [i % 2 == 1 for i in every],
    }


def mixed(rows: int, layers: int = LAYERS) -> torch.Tensor:
    """Return [rows, layers]: no row keeps layer 1, and most keep each of the others."""
    return torch.tensor(
        [[i != 1 and (7 * row + 5 * i) % 4 != 0 for i in range(layers)] for row in range(rows)]
    )


@contextmanager
def discarding(
    keep: torch.Tensor,
    layers: list[nn.Module],
    units: list[nn.Module] | None = None,
    decode_only: bool = False,
) -> Iterator[None]:
    """Compute every unit, but throw its output away where `keep` [rows, layers] is False.

    Without `units` a layer's output becomes its input; a sub-module's becomes zero, or the residual
    that it was given to add. `decode_only` leaves passes over several tokens alone.
    """

    def hook_for(layer: int, inner: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            new = output[0] if isinstance(output, tuple) else output
            if decode_only and new.shape[1] > 1:
                return output
            old = args[0] if args else kwargs["hidden_states"]
            if inner:
                residual = kwargs.get("residual")
                if residual is None and len(args) > 1 and "residual" in _names(module):
                    residual = args[1]
                old = torch.zeros_like(new) if residual is None else residual
            rows = keep[:, layer] if keep.dim() == 2 else keep[layer].expand(new.shape[0])
            rows = rows.repeat_interleave(new.shape[0] // len(rows))
            rows = rows.view(-1, *[1] * (new.dim() - 1))
            new = torch.where(rows, new, old)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    handles = [
        module.register_forward_hook(hook_for(i, units is not None), with_kwargs=True)
        for i, module in enumerate(units or layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _names(module: nn.Module) -> tuple[str, ...]:
    return type(module).forward.__code__.co_varnames


def decode(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int = 6, **more: Any) -> Any:
    """Generate greedily with a FirstModel or a base; return tokens, and logits per step."""
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
    output_hf = getattr(output, "hf", output)
    return output_hf.sequences, torch.stack(output_hf.logits, dim=1)
