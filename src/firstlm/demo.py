# SPDX-License-Identifier: Apache-2.0
"""`firstlm demo`: the shipped artifact at work, then a short run trained for real.

The short run needs no download: it learns to write the summary lines of docstrings of the installed
packages. The last line on stdout is one JSON object with what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from firstlm.arms import Arms, Run, median
from firstlm.artifact_files import check_target, find, read_config
from firstlm.command_config import DemoConfig, GenerateConfig
from firstlm.config import RouterConfig, TrainConfig
from firstlm.corpus import docstring_examples
from firstlm.data import Encoded, encode_all
from firstlm.examples import Example
from firstlm.generate_command import (
    TIMED_TOKENS,
    decode,
    encode_prompts,
    hush,
    mask_strip,
    shorten,
    show_comparison,
)
from firstlm.losses import mean_loss
from firstlm.model import FirstModel
from firstlm.options import to_dict
from firstlm.phases import train_lora, train_routers
from firstlm.policies import RunAll
from firstlm.pretrained import load_base
from firstlm.results import provenance, to_json
from firstlm.train import finish, load_options

SHIPPED = "smollm2-qa"
TEMPLATE = "Context: {}\nQuestion: {}\nAnswer:"
QUESTIONS = (
    (
        "The lighthouse of Port Ellis was built in 1887 by Anders Vik, a Norwegian engineer, after "
        "two ships had run aground on the reef in a single winter.",
        "Who built the lighthouse of Port Ellis?",
    ),
    (
        "Basil wants warmth and light. Its seeds come up after about six days if the soil is kept "
        "at 20 degrees, and the leaves can be picked from the eighth week on.",
        "When can the leaves of basil be picked?",
    ),
    (
        "The night train leaves Lund at 22:40, stops in Malmo to take on sleeping cars, and "
        "reaches Berlin shortly before nine in the morning.",
        "Where does the train take on sleeping cars?",
    ),
    (
        "Unlike its neighbours, the village of Oria never had a mill. Farmers carried their grain "
        "across the river to Sant Pau, and paid the miller with every twelfth sack of flour.",
        "How did the farmers of Oria pay the miller?",
    ),
)
EXAMPLES = 900
VALIDATION = 48  # examples on which cross-entropy, thresholds and skip rate are measured
ROUNDS = 4  # of timed runs, base and routed in turns
SHOWN = 2  # held-out docstrings


def run(options: DemoConfig) -> int:
    """Show the shipped artifact, train a short run, print what changed (`firstlm demo`)."""
    start = time.perf_counter()
    hush()
    check_target(options.output)
    folder = find(options.artifact or SHIPPED)
    config = training_options(options)
    print(f"\n== 1. Base and routed answers with the artifact {folder.name} ==\n", flush=True)
    show_artifact(folder, options, config)
    print("\n== 2. A short run, trained now: docstring body -> summary line ==\n", flush=True)
    record = train_short(options, config)
    minutes = (time.perf_counter() - start) / 60
    print(f"\nThat took {minutes:.1f} minutes. The trained artifact is in {options.output}.\n")
    print(to_json(record), flush=True)
    return 0


def training_options(options: DemoConfig) -> TrainConfig:
    """Return the options of the short run."""
    return TrainConfig(
        model=options.model,
        dtype=fast_dtype(),
        output=options.output,
        skip_rate=options.skip_rate,
        warm_start=8,
        distill=0.0,
        router_lr=0.005,  # few steps shall show something
        router_steps=options.router_steps,
        lora_steps=options.lora_steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        seed=options.seed,
        eval_steps=max(1, options.lora_steps // 2),
        resume=False,
        tensorboard=False,
    )


def fast_dtype() -> str:
    """Return bfloat16 where matrices of it are multiplied faster than float32: GPUs, and AMX.

    AVX512-BF16 without AMX takes twice the time of float32 for the sizes that training has.
    """
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return "bfloat16" if torch.cuda.is_available() or amx() else "float32"


def show_artifact(folder: Path, options: DemoConfig, config: TrainConfig) -> None:
    """Answer the demo's questions with the artifact, base and routed side by side."""
    base_id = read_config(find(str(folder)))["base_model"]["id"]
    base, tokenizer = load_base(base_id, **load_options(config))
    model = FirstModel.from_pretrained(str(folder), base=base, tokenizer=tokenizer)
    wanted = GenerateConfig(
        artifact=str(folder),
        skip_rate=options.skip_rate,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    prompts = encode_prompts([TEMPLATE.format(*pair) for pair in QUESTIONS], wanted, model)
    show_comparison(model, prompts, wanted)


def train_short(options: DemoConfig, config: TrainConfig) -> dict[str, Any]:
    """Train routers and LoRA, calibrate, save, and return what was measured."""
    base, tokenizer = load_base(options.model, **load_options(config))
    model = FirstModel.from_base(base, RouterConfig(), tokenizer)
    model.base_id = options.model
    train, held = docstring_examples(EXAMPLES, seed=options.seed)
    _, encoded = encode_all(train, tokenizer, config.max_length, too_long="drop")
    held, held_encoded = encode_all(held, tokenizer, config.max_length, too_long="drop")
    held, held_encoded = held[:VALIDATION], held_encoded[:VALIDATION]
    print(
        f"{len(encoded)} docstrings to train on, {len(held)} held out, weights in {config.dtype}."
    )
    ce_before, _ = mean_loss(model, held_encoded, RunAll(), config.batch_size)
    logging.set_verbosity_warning()  # Trainer's progress bars hang on it

    print(f"\nPhase 1: routers, {config.router_steps} steps.", flush=True)
    routers = train_routers(model, encoded, held_encoded, config)
    print(f"\nPhase 2: LoRA, {config.lora_steps} steps.", flush=True)
    lora = train_lora(model, encoded, held_encoded, config)
    print("\nThresholds.", flush=True)
    finish(model, held_encoded, config, _rates(options.skip_rate), prefill_modes=("skip",))
    policy = model.policy_for(options.skip_rate)
    ce_full, _ = mean_loss(model, held_encoded, RunAll(), config.batch_size)
    ce_after, keep = mean_loss(model, held_encoded, policy, config.batch_size)
    model.training_record = {
        "run": to_dict(config),
        "routers": routers,
        "lora": lora,
        "provenance": provenance(seed=options.seed),
    }
    model.save_pretrained(options.output)

    print(f"\nCross-entropy on {len(held)} held-out docstrings, per answer token:")
    print(f"  before, all {model.layer_count} layers   {ce_before:.3f}")
    print(f"  after, all {model.layer_count} layers    {ce_full:.3f}")
    print(f"  after, {float((~keep).float().mean()):.0%} skipped    {ce_after:.3f}")
    share = (~keep).float().mean(0)
    mostly = [i for i, skipped in enumerate(share.tolist()) if skipped > 0.5]
    print(f"Layers skipped for most prompts: {', '.join(map(str, mostly)) or 'none'}")
    print(f"Different masks: {len(keep.unique(dim=0))} for {len(keep)} prompts")
    return {
        "steps": routers["steps"] + lora["steps"],
        "ce_before": round(ce_before, 4),
        "ce_after": round(ce_after, 4),
        "skip_rate": round(float((~keep).float().mean()), 4),
        **_time(model, held, held_encoded, options),
    }


def _rates(wanted: float) -> list[float]:
    """Return rates to calibrate around the wanted one, which then lies between measured ones."""
    return [min(share * wanted, 0.95) for share in (0.5, 1.0, 1.5)] if wanted else [0.1]


def _time(
    model: FirstModel, held: Sequence[Example], encoded: Sequence[Encoded], options: DemoConfig
) -> dict[str, Any]:
    """Show held-out summaries by base and routed model, and time both in turns."""
    arms = Arms(model)
    runs: tuple[list[Run], list[Run]] = ([], [])
    apart = max(1, len(held) // SHOWN)  # neighbours are from one module and much alike
    for example, item in list(zip(held, encoded, strict=True))[::apart][:SHOWN]:
        answers = arms.answers(
            item.prompt_ids, options.skip_rate, max_new_tokens=options.max_new_tokens
        )
        base, routed = (shorten(decode(model.tokenizer, one.ids)) for one in answers)
        print(f"\nDocstring   {shorten(str(example.row['source']), 100)}")
        print(f"  its author  {example.references[0]}")
        print(f"  base        {base}\n  routed      {routed}")
        print(f"  layers      {mask_strip(answers[1].keep)}", flush=True)
        times = arms.timings(item.prompt_ids, options.skip_rate, TIMED_TOKENS, ROUNDS)
        for part, more in zip(runs, times, strict=True):
            part.extend(more)
    base_ms, routed_ms = (1000 * median(part, "tpot") for part in runs)
    calls = {
        phase: sum(one.layer_calls[phase] for one in runs[1]) for phase in ("prefill", "decode")
    }
    print(
        f"\nTime per token (batch 1, medians of {len(runs[0])} runs each, in turns): "
        f"base {base_ms:.1f} ms, routed {routed_ms:.1f} ms, {routed_ms / base_ms:.2f}x."
    )
    return {
        "layer_calls": calls,
        "tpot_base_ms": round(base_ms, 3),
        "tpot_routed_ms": round(routed_ms, 3),
        "tpot_ratio": round(routed_ms / base_ms, 4),
    }
