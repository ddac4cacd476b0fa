# SPDX-License-Identifier: Apache-2.0
"""Train a FiRST model in two phases (arXiv 2410.12513): routers, then LoRA, then thresholds.

Phase 1 trains routers with the base frozen. Phase 2 trains LoRA with the routers frozen and hard
gates, the penalty kept. Calibration follows, because LoRA moves the states that routers read.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from firstlm.calibration import RATES, calibrate, find_offsets
from firstlm.config import RouterConfig, TrainConfig
from firstlm.data import (
    Collator,
    Encoded,
    encode,
    encode_all,
    load_examples,
    pad_left,
    split_validation,
)
from firstlm.errors import ConfigError, DataError
from firstlm.importance import SPACING, removal_order, start_from_order
from firstlm.model import FirstModel
from firstlm.options import load_yaml, save_yaml, to_dict
from firstlm.policies import RunAll
from firstlm.pretrained import load_base, resolve_device
from firstlm.rates import RateDriver
from firstlm.results import provenance, sha256_of
from firstlm.trainer import FirstTrainer, mixed_precision

STATISTICS_PROMPTS = 64  # prompts on which router inputs are standardised
VALIDATION_SHARE = 0.1
CALIBRATION_PROMPTS = 128
OFFSET_PROMPTS = 32  # on which phase 2 finds its first offsets
RUN_FILE = "run.yaml"
STEPS = {"adapt": "adapt_steps", "routers": "router_steps", "lora": "lora_steps"}


def train_routers(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig | None = None,
) -> dict[str, Any]:
    """Phase 1: train the routers, everything else frozen.

    Args:
        model: from `FirstModel.from_base`, or an artifact to go on from.
        train: `Example`s, or `Encoded` prompts and answers.
        validation: likewise, held out.
        config: options; `output` is where checkpoints and logs go.

    Returns:
        What was measured: steps, final cross-entropy and skip rate on validation data, alpha.
    """
    config = config or TrainConfig()
    train, validation = _encoded(model, train, config), _encoded(model, validation, config)
    set_seed(config.seed)
    model.requires_grad_(False)
    model.routers.requires_grad_(True)
    record: dict[str, Any] = {}
    driver = RateDriver(config)
    if config.warm_start and config.skip_rate:
        order = _removal_order(model, train, config)
        start_from_order(model, order, config.skip_rate)
        driver.start(SPACING * model.layer_count)
        record["removal_order"] = order
    _standardise(model, train)
    record.update(_fit(model, train, validation, config, "routers", driver))
    model.routers.fold()
    return record


def train_lora(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig | None = None,
    routers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Phase 2: train LoRA on attention and FFN projections, routers frozen, the penalty kept.

    With `skip_rate` 0 all layers run: plain LoRA, for comparison. The checkpoint with the lowest
    validation cross-entropy is kept. Arguments as for `train_routers`, and `routers`, what that
    returned, to go on with its alpha and offsets.
    """
    return _train_lora(model, train, validation, config or TrainConfig(), "lora", routers)


def adapt_lora(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig | None = None,
) -> dict[str, Any]:
    """Before phase 1: train LoRA for `adapt_steps` with all layers running.

    Routers of a model that does not know the task yet learn from losses that say little; on one
    that does, what a layer is worth shows. Arguments as for `train_routers`.
    """
    config = replace(config or TrainConfig(), skip_rate=0.0, skip_rates=None)
    return _train_lora(model, train, validation, config, "adapt", None)


def _train_lora(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig,
    phase: str,
    routers: dict[str, Any] | None,
) -> dict[str, Any]:
    train, validation = _encoded(model, train, config), _encoded(model, validation, config)
    set_seed(config.seed)
    if not model.has_adapter:
        _add_lora(model, config)
    model.requires_grad_(False)
    for name, parameter in model.base.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    driver = RateDriver(config) if config.skip_rate != 0 else None
    if driver is not None:
        driver.alpha = max((routers or {}).get("alpha") or config.alpha, 0.0)
        if config.skip_rate is not None:
            driver.hold(_offsets(model, train, config))
    return _fit(model, train, validation, config, phase, driver)


def _encoded(model: FirstModel, examples: Sequence[Any], config: TrainConfig) -> list[Encoded]:
    if not examples:
        raise DataError("There are no examples to train on or to validate with.")
    if isinstance(examples[0], Encoded):
        return list(examples)
    return [encode(example, model.tokenizer, config.max_length) for example in examples]


def _removal_order(model: FirstModel, train: list[Encoded], config: TrainConfig) -> list[int]:
    highest = max([config.skip_rate or 0.0, *(config.skip_rates or ())])
    picked = random.Random(config.seed).sample(train, min(config.warm_start, len(train)))
    model.eval()
    with mixed_precision(model):
        return removal_order(model, picked, _pad_id(model), highest + 0.05)


@torch.no_grad()
def _standardise(model: FirstModel, train: list[Encoded]) -> None:
    """Give every router an input of mean 0 and deviation 1 over training prompts."""

    class Recorder(RunAll):
        def decide(self, layer, prompts):
            seen[layer].append(prompts.mean)
            return super().decide(layer, prompts)

    seen: list[list[torch.Tensor]] = [[] for _ in range(model.layer_count)]
    model.eval()
    prompts = sorted((e.prompt_ids for e in train[:STATISTICS_PROMPTS]), key=len)
    for i in range(0, len(prompts), 16):
        model.decide(*pad_left(prompts[i : i + 16], _pad_id(model)), Recorder())
    for router, means in zip(model.routers, seen, strict=True):
        states = torch.cat(means).to(router.weight.device)
        if len(states) > 1:
            router.standardise(states.mean(0), states.std(0))


def _add_lora(model: FirstModel, config: TrainConfig) -> None:
    from peft import LoraConfig, get_peft_model

    model.base = get_peft_model(
        model.base,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def _pad_id(model: FirstModel) -> int:
    tokenizer = model.tokenizer
    return tokenizer.pad_token_id if tokenizer is not None and tokenizer.pad_token_id else 0


def _offsets(model: FirstModel, train: list[Encoded], config: TrainConfig) -> dict[float, float]:
    """Measure the logit offsets that meet a run's rates before phase 2 begins."""
    prompts = [item.prompt_ids for item in train[:OFFSET_PROMPTS]]
    rates = sorted({config.skip_rate or 0.0, *(config.skip_rates or ())})
    with mixed_precision(model):
        rows = find_offsets(
            model, prompts, rates, config.prefill, config.batch_size, _pad_id(model)
        )
    measured = [row[2] for row in rows]
    return {r: float(np.interp(r, measured, [row[1] for row in rows])) for r in rates}


def _fit(
    model: FirstModel,
    train: list[Encoded],
    validation: list[Encoded],
    config: TrainConfig,
    phase: str,
    driver: RateDriver | None,
) -> dict[str, Any]:
    """Run Trainer over what requires gradients; an interrupted run is resumed."""
    steps = getattr(config, STEPS[phase])
    work = work_folder(config)
    folder = work / "checkpoints" / phase
    folder.mkdir(parents=True, exist_ok=True)
    if config.gradient_checkpointing:
        _checkpointing(model, "enable", {"use_reentrant": False})
    with _logs_in(work / "logs" / phase):
        trainer = FirstTrainer(
            model,
            driver,
            gate=config.gate if phase == "routers" else "hard",
            prefill=config.prefill,
            l2=config.l2 if phase == "routers" else 0.0,
            distill=config.distill if phase == "lora" else 0.0,
            log_path=work / f"log_{phase}.jsonl",
            args=_arguments(model, config, phase, steps, folder),
            train_dataset=train,
            eval_dataset=validation,
            data_collator=Collator(_pad_id(model)),
        )
    before = trainer.evaluate()
    checkpoint = get_last_checkpoint(str(folder)) if config.resume else None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        if trainer.state.global_step:
            trainer._save_checkpoint(model, trial=None)
        print(
            f"\nInterrupted at step {trainer.state.global_step} of {steps} ({phase}); a checkpoint "
            f"is in {folder}. Run the same command again to go on."
        )
        raise
    finally:
        if config.gradient_checkpointing:
            _checkpointing(model, "disable")
    after = trainer.evaluate()
    model.eval()
    return {
        "steps": trainer.state.global_step,
        "ce_before": before["eval_loss"],
        "ce_after": after["eval_loss"],
        "skip_rate": after["eval_skip_rate"],
        "alpha": driver.alpha if driver else None,
        "offsets": driver.offsets if driver else {},
    }


def _checkpointing(model: FirstModel, what: str, *args: Any) -> None:
    """Switch gradient checkpointing, under its name in this transformers."""
    old = f"gradient_checkpointing_{what}"
    new = f"activation_checkpointing_{what}"
    getattr(model.base, new if hasattr(model.base, new) else old)(*args)


def _arguments(
    model: FirstModel, config: TrainConfig, phase: str, steps: int, folder: Path
) -> TrainingArguments:
    lora = phase != "routers"
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=config.lora_lr if lora else config.router_lr,
        lr_scheduler_type="cosine" if lora else "constant_with_warmup",
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.eval_steps if lora else config.save_steps,
        save_total_limit=2,
        load_best_model_at_end=lora,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if config.tensorboard else [],
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
    )


@contextmanager
def _logs_in(folder: Path):
    """Tell Trainer's TensorBoard writer its folder, which it takes from the environment."""
    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        else:
            os.environ["TENSORBOARD_LOGGING_DIR"] = before


def run(config: TrainConfig) -> int:
    """Train as the options say and save an artifact (`firstlm train`)."""
    if config.data is None:
        raise ConfigError("Nothing to train on: name a file or a hub dataset with --data.")
    model, train, validation = prepare(config)
    _claim(config)
    record: dict[str, Any] = dict(model.training_record)
    record["run"] = to_dict(config)
    record["provenance"] = provenance(seed=config.seed, data=_data_hash(config))
    done = work_folder(config) / "checkpoints" / "routers" / "done"
    if config.stage in ("both", "routers"):
        if config.resume and done.is_dir():
            print(f"Phase 1 is done ({done}); going on.")
            finished = FirstModel.from_pretrained(
                str(done), base=model.detach(), tokenizer=model.tokenizer
            )
            model, record = finished, {**record, **finished.training_record}
        else:
            if config.adapt_steps and config.stage == "both":
                record["adapt"] = adapt_lora(model, train, validation, config)
            record["routers"] = train_routers(model, train, validation, config)
            model.training_record = {k: record[k] for k in ("adapt", "routers") if k in record}
            model.save_pretrained(str(done))
    if config.stage in ("both", "lora"):
        record["lora"] = train_lora(model, train, validation, config, record.get("routers"))
        _round_adapter(model)
    prompts = [item.prompt_ids for item in validation[:CALIBRATION_PROMPTS]]
    if config.skip_rate != 0:
        with mixed_precision(model):
            calibrate(
                model, prompts, RATES, batch_size=config.batch_size, pad_token_id=_pad_id(model)
            )
        if config.skip_rate in RATES:
            _put_offset_into_routers(model, config.skip_rate, config.prefill)
    model.training_record = record
    model.save_pretrained(config.output)
    save_yaml(config, Path(config.output) / RUN_FILE)
    print(f"Saved the artifact to {config.output}; logs are in {work_folder(config)}.")
    return 0


@torch.no_grad()
def _put_offset_into_routers(model: FirstModel, rate: float, prefill: str) -> None:
    """Shift all biases so that the plain threshold, rho = 0.5, serves the rate trained for."""
    shift = model.thresholds.offset(rate, prefill)
    for router in model.routers:
        router.bias.add_(shift)
    for mode, rows in model.thresholds.table.items():
        model.thresholds.table[mode] = [(a, offset - shift, m) for a, offset, m in rows]


def prepare(config: TrainConfig) -> tuple[FirstModel, list[Encoded], list[Encoded]]:
    """Load the model and the encoded data of a run; nothing is written."""
    base, tokenizer = load_base(config.model, **load_options(config))
    if config.artifact is not None:
        model = FirstModel.from_pretrained(config.artifact, base=base, tokenizer=tokenizer)
    else:
        fields = RouterConfig.__dataclass_fields__
        model = FirstModel.from_base(
            base, RouterConfig(**{name: getattr(config, name) for name in fields}), tokenizer
        )
    model.base_id = config.model
    assert config.data is not None
    options: dict[str, Any] = {"template": config.template, "tokenizer": tokenizer}
    train = load_examples(config.data, limit=config.limit, **options)
    if config.validation is not None:
        validation = load_examples(config.validation, limit=config.validation_limit, **options)
    else:
        train, validation = split_validation(train, VALIDATION_SHARE, config.seed)
        validation = validation[: config.validation_limit]
    text_config = base.config.get_text_config(decoder=True)
    context = getattr(text_config, "max_position_embeddings", None) or config.max_length
    longest = min(config.max_length, context)  # no row may be longer than the model can read
    encoded = [encode_all(part, tokenizer, longest)[1] for part in (train, validation)]
    return model, encoded[0], encoded[1]


def load_options(config: TrainConfig) -> dict[str, Any]:
    """Return how `load_base` shall load a run's base model."""
    options: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    on_cpu = resolve_device(config.device).type == "cpu"
    if on_cpu and config.dtype == "bfloat16":
        # The fused CPU kernel takes many times as long as plain attention for short bf16 rows.
        options["attn_implementation"] = "eager"
    return options


def work_folder(config: TrainConfig) -> Path:
    """Return the folder of a run's checkpoints and logs, beside the artifact."""
    return Path(f"{config.output.rstrip('/')}-run")


def _claim(config: TrainConfig) -> None:
    """Write the run's options into its work folder; a folder of another run is refused."""
    work = work_folder(config)
    file = work / RUN_FILE
    if file.is_file() and config.resume:
        if to_dict(load_yaml(TrainConfig, file)) != to_dict(config):
            raise ConfigError(
                f"{work} holds a run with other options ({file}). Name another --output, repeat "
                "the options to resume it, or start over with --no-resume."
            )
    elif not config.resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    save_yaml(config, file)


def _data_hash(config: TrainConfig) -> dict[str, str]:
    files = {"train": config.data, "validation": config.validation}
    return {k: sha256_of(v) for k, v in files.items() if v is not None and Path(v).is_file()}


@torch.no_grad()
def _round_adapter(model: FirstModel) -> None:
    """Round LoRA to bfloat16, as it is saved: what is calibrated is what will be loaded."""
    model.adapter_dtype = torch.bfloat16
    for name, parameter in model.base.named_parameters():
        if "lora_" in name:
            parameter.copy_(parameter.to(torch.bfloat16))
