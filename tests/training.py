# SPDX-License-Identifier: Apache-2.0
"""A tiny model, a learnable task and short runs, for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from conftest import tiny_llama

from firstlm.config import RouterConfig, TrainConfig
from firstlm.data import Encoded
from firstlm.model import FirstModel

LAYERS = 8


def make_examples(count: int, seed: int) -> list[Encoded]:
    """Prompts of letters, answered by their last letters reversed: learnable, and different."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(97, 123) for _ in range(rng.randrange(3, 14))]
        rows.append(Encoded(prompt, [*reversed(prompt[-2:]), 257]))
    return rows


def make_model(layers: int = LAYERS, seed: int = 0) -> FirstModel:
    model = FirstModel.from_base(tiny_llama(layers=layers, seed=seed), RouterConfig(init_bias=1.0))
    model.eval()
    return model


def adaptive_model() -> FirstModel:
    """A model whose routers look at prompts: random weights, thresholds at 0."""
    model = make_model()
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.weight.normal_(generator=torch.Generator().manual_seed(i))
            router.bias.zero_()
    return model


def config(tmp_path: Path, **changes) -> TrainConfig:
    options = {
        "output": str(tmp_path / "artifact"),
        "router_steps": 60,
        "lora_steps": 20,
        "batch_size": 16,
        "router_lr": 0.1,
        "lora_lr": 5e-3,
        "eval_steps": 100,
        "tensorboard": False,
        "warm_start": 0,
        "distill": 0.0,
        "logging_steps": 5,
    }
    return TrainConfig(**{**options, **changes})


def write_run(tmp_path: Path, byte_tokenizer, rows: int = 60) -> tuple[Path, Path]:
    folder = tmp_path / "base"
    tiny_llama(layers=6).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"say {i}:", "completion": f" {i % 7}"} for i in range(rows)]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    return folder, data
