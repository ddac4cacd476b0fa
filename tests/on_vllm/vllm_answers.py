# SPDX-License-Identifier: Apache-2.0
"""vLLM on the CPU in this process, and the reference to compare it with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a failure is raised here, and not in another process
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}

import torch
from conftest import make_byte_tokenizer, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from firstlm import FirstModel
from firstlm.calibration import calibrate

LAYERS = 6
PROMPTS = [[1, *((7 * i + 13 * j) % 250 + 5 for j in range(3 + 5 * i))] for i in range(8)]


def tiny(kind: str) -> Any:
    """Return a random model whose layers change what it answers."""
    shape = {"layers": LAYERS, "hidden": 128, "heads": 4}
    if kind == "llama":
        base = tiny_llama(**shape)
    else:  # sliding and full attention in turns: two kinds of keys and values
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        kinds = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(
            **{**tiny_llama(**shape).config.to_dict(), "model_type": "gemma3_text"},
        )
        config.layer_types, config.sliding_window, config.head_dim = kinds * (LAYERS // 2), 16, 32
        torch.manual_seed(0)
        base = Gemma3ForCausalLM(config).eval()
    for weight in base.parameters():
        if weight.dim() > 1:
            weight.data.mul_(6)
    return base


def make_artifact(kind: str, where: Path) -> tuple[str, FirstModel]:
    """Return the folder of an artifact whose prompts get masks of their own, and the reference."""
    tiny(kind).save_pretrained(where / "base")
    make_byte_tokenizer().save_pretrained(where / "base")
    loaded = AutoModelForCausalLM.from_pretrained(where / "base", dtype=torch.float32)
    wrapped = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05)
    model = FirstModel.from_base(wrapped, tokenizer=make_byte_tokenizer())
    for router in model.routers:
        router.weight.data.normal_(0, 1)
        router.bias.data.zero_()
    calibrate(model, PROMPTS, [0.2, 0.4], progress=False)
    model.base_id = str(where / "base")
    artifact = str(where / "artifact")
    model.save_pretrained(artifact)
    return artifact, FirstModel.from_pretrained(artifact, dtype="float32").merge_and_unload()


def engine(model: str, **more: Any) -> Any:
    """Start vLLM on an artifact."""
    from vllm import LLM

    options = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    return LLM(model=model, **{**options, **more})


def answers(
    llm: Any, prompts: list[list[int]], asks: list[dict[str, Any]], tokens: int = 12
) -> Any:
    """Return what vLLM answers to prompts in one batch, each with what it asks for."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=dict(ask))
        for ask in asks
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def same_as_reference(
    output: Any, model: FirstModel, prompt: list[int], ask: dict[str, Any]
) -> tuple[bool, ...]:
    """Compare an answer of vLLM's, and the layers that it ran; returns these."""
    mode = ask.get("prefill", "skip")
    keep = ask.get("keep")
    if "skip_layers" in ask:
        keep = [i not in ask["skip_layers"] for i in range(LAYERS)]
    policy = model.choices.asked(ask.get("policy"), ask.get("skip_rate"), keep, prefill=mode)
    tokens = output.outputs[0].token_ids
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),  # a prompt may hold the id of padding
        max_new_tokens=len(tokens),
        eos_token_id=None,
        policy=policy,
        prefill=mode,
    )
    report = output.kv_transfer_params["first"]
    assert report["keep"] == found.keep[0].tolist()
    assert report["skip_rate"] == 1 - sum(report["keep"]) / LAYERS
    assert tokens == found.sequences[0, len(prompt) :].tolist()
    return tuple(report["keep"])
