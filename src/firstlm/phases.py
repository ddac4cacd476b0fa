# SPDX-License-Identifier: Apache-2.0
"""The phases of training (arXiv 2410.12513): routers, the base frozen; then LoRA with hard gates.

Each phase is a function of a model, data and options. Which phases a run has, and in what order, is
`train.py`'s business.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments, set_seed

from firstlm import processes
from firstlm.adapters import lora_to_train
from firstlm.config import TrainConfig
from firstlm.data import Collator, Encoded, draw, encode
from firstlm.errors import ConfigError, DataError
from firstlm.importance import SPACING
from firstlm.interrupts import Interrupts
from firstlm.model import FirstModel
from firstlm.policies import Policy, RouterPolicy, RunAll
from firstlm.probes import decide_all
from firstlm.rates import RateDriver
from firstlm.starts import first_offsets, healed_start, standardise, warm_start
from firstlm.trainer import FirstTrainer, last_checkpoint, mixed_precision

RUN_FILE = "run.yaml"  # in a work folder that `firstlm train` has claimed
DECISION_PROMPTS = 64  # on which it is counted how many decisions LoRA flips
CURVES = {"ce", "skip_rate", "eval_loss", "eval_skip_rate"}  # that a run's record keeps
AFTER = 1 << 20  # added to the seed of rows for each training that a model has behind it


@dataclass(frozen=True)
class Phase:
    """How one phase is fitted.

    Attributes:
        name: routers, lora or joint.
        steps: optimizer steps.
        lr: learning rate of all but routers, which have their own.
        schedule: of the learning rate, as transformers names it.
        save_steps: between checkpoints.
        gate: how decisions act on states in training; see `losses`.
        l2: weight of the L2 penalty on router weights.
        distance: weight of the distance to the full depth.
        keeps_best: whether the best checkpoint is kept; where routers move, few skips would win.
        order: of its rows. No phase shall begin with what was learnt just before.
    """

    name: str
    steps: int
    lr: float
    schedule: str
    save_steps: int
    gate: str
    l2: float = 0.0
    distance: float = 0.0
    keeps_best: bool = False
    order: int = 1

    @classmethod
    def named(cls, name: str, config: TrainConfig) -> Phase:
        """Return a phase as options have it."""
        if name == "routers":
            return cls(
                name,
                config.router_steps,
                config.router_lr,
                "constant_with_warmup",
                config.save_steps,
                config.gate,
                l2=config.l2,
                distance=config.distill,
                order=0,
            )
        lora = cls(name, config.lora_steps, config.lora_lr, "cosine", config.eval_steps, "hard")
        if name == "joint":
            return replace(lora, gate=config.gate, l2=config.l2)
        return replace(lora, distance=config.teach, keeps_best=True)


def train_routers(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Phase 1: train the routers, everything else frozen.

    Args:
        model: a routed model; its routers are trained in place. Routers that were trained before
            go on from where they are.
        train: examples (`Example` or `Encoded`).
        validation: examples.
        config: `output` names where checkpoints and logs go; see `TrainConfig`.
        resume: go on from the last checkpoint of an interrupted call with the same arguments.

    Returns:
        Cross-entropy before and after (hard gates), skip rate, alpha, the removal order, and how
        cross-entropy and skip rate went from step to step (`curve`).
    """
    config = config or TrainConfig()
    train, validation = _begin(model, train, validation, config, resume)
    _train_only(model, model.routers.parameters())
    return _fit_routers(model, train, validation, config, "routers", resume)


def train_joint(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train routers and LoRA at once, for `lora_steps`, each at its own learning rate.

    The paper met instability here. What keeps it stable: routers start from a removal order
    (`warm_start`), so that gates need not move far, hard gates forward (`straight_through`), and a
    `router_lr` far below what LoRA's matrices want. Arguments and return as for `train_routers`.
    """
    config = config or TrainConfig()
    train, validation = _begin(model, train, validation, config, resume)
    _train_only(model, [*lora_to_train(model, config), *model.routers.parameters()])
    return _fit_routers(model, train, validation, config, "joint", resume)


def _fit_routers(
    model: FirstModel,
    train: list[Encoded],
    validation: list[Encoded],
    config: TrainConfig,
    phase: str,
    resume: bool,
) -> dict[str, Any]:
    """Start routers from a removal order, where they are new, and fit what requires gradients."""
    record: dict[str, Any] = {}
    driver = RateDriver(config)
    if config.warm_start and config.skip_rate and model.routers.untrained:
        record |= warm_start(model, train, config, config.skip_rate)
        driver.start(SPACING * model.layer_count)
    standardise(model, train, config)
    policy_at = _routed(model, driver)
    record.update(_fit(model, train, validation, config, phase, driver, policy_at, resume))
    model.routers.fold()
    return record


def train_lora(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Phase 2: train LoRA on attention and FFN projections, routers frozen.

    Where a rate is asked for, an offset of the logits holds it; otherwise the penalty stays. With
    `skip_rate` 0 all layers run: plain LoRA, for comparison. Where the model has a `baseline`, that
    decides in the routers' place. The checkpoint with the lowest validation cross-entropy is kept.
    Arguments as for `train_routers`.

    Returns:
        As `train_routers`, and with routers `flipped`: the share of decisions about validation
        prompts that are others now, at the same thresholds, because LoRA moved what they read.
        Where `heal` is set, `healed`, what was left missing behind each layer, before the
        cross-entropy that is called the one before.
    """
    config = config or TrainConfig()
    train, validation = _begin(model, train, validation, config, resume)
    lora = lora_to_train(model, config)
    _train_only(model, lora)
    teacher = [(p, p.detach().clone()) for p in lora if config.teach]
    fit = partial(_fit, model, train, validation, config, "lora", resume=resume, teacher=teacher)
    if config.skip_rate == 0:
        return fit(None, _all_layers)
    driver = RateDriver(config)
    if model.baseline is not None:
        healed = healed_start(model, train, config, model.baseline.at)
        return healed | fit(driver, model.baseline.at)
    if config.skip_rate is not None:
        driver.hold(processes.same(first_offsets(model, train, config)))
    routed = _routed(model, driver)
    policy = routed(config.skip_rate)
    before = _decisions(model, validation, policy, config)
    healed = healed_start(model, train, config, routed)
    if config.heal and config.skip_rate is not None:  # routers read other states now
        driver.hold(processes.same(first_offsets(model, train, config)))
    record = healed | fit(driver, routed)
    flipped = _decisions(model, validation, policy, config) != before
    record["flipped"] = float(flipped.float().mean())
    return record


def _begin(
    model: FirstModel,
    train: Sequence[Any],
    validation: Sequence[Any],
    config: TrainConfig,
    resume: bool,
) -> tuple[list[Encoded], list[Encoded]]:
    """Refuse what cannot be trained before the model is touched, and return the encoded data."""
    work = work_folder(config)
    if not resume and (work / RUN_FILE).exists():
        raise ConfigError(
            f"{work} holds the checkpoints of a run of `firstlm train`. Name another output, or "
            "remove it."
        )
    encoded = _encoded(model, train, config), _encoded(model, validation, config)
    set_seed(config.seed)
    return encoded


def _encoded(model: FirstModel, examples: Sequence[Any], config: TrainConfig) -> list[Encoded]:
    if not examples:
        raise DataError("There are no examples to train on or to validate with.")
    if isinstance(examples[0], Encoded):
        return list(examples)
    return [encode(example, model.tokenizer, config.max_length) for example in examples]


def _train_only(model: FirstModel, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let nothing of a model train but some parameters."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _all_layers(_rate: float | None) -> Policy:
    """Decide in the place of routers, where nothing is to be skipped."""
    return RunAll()


@torch.no_grad()
def _decisions(
    model: FirstModel, rows: list[Encoded], policy: Policy, config: TrainConfig
) -> torch.Tensor:
    """Return what a policy decides about some prompts, keep [prompts, layers]."""
    prompts = [row.prompt_ids for row in draw(rows, DECISION_PROMPTS, config.seed)]
    model.eval()
    with mixed_precision(model):
        return decide_all(model, prompts, policy, config.prefill, config.batch_size)


def _routed(model: FirstModel, driver: RateDriver) -> Callable[[float | None], Policy]:
    """Let routers decide, at the offset that the driver has for a rate."""
    return lambda rate: RouterPolicy(model.routers, driver.offset(rate))


def _fit(
    model: FirstModel,
    train: list[Encoded],
    validation: list[Encoded],
    config: TrainConfig,
    name: str,
    driver: RateDriver | None,
    policy_at: Callable[[float | None], Policy],
    resume: bool,
    teacher: Sequence[tuple[torch.nn.Parameter, torch.Tensor]] = (),
) -> dict[str, Any]:
    """Run Trainer over what requires gradients; an interrupted run is resumed."""
    phase = Phase.named(name, config)
    work = work_folder(config)
    folder, log = work / "checkpoints" / name, work / f"log_{name}.jsonl"
    with processes.first_alone() as first:
        if first and not resume:
            shutil.rmtree(folder, ignore_errors=True)
            log.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    interrupts = Interrupts()
    with _checkpointed(model, config), _logs_in(work / "logs" / name):
        trainer = FirstTrainer(
            model,
            driver,
            policy_at,
            gate=phase.gate,
            prefill=config.prefill,
            router_lr=config.router_lr,
            l2=phase.l2,
            distill=phase.distance,
            teacher=teacher,
            log_path=log,
            args=_arguments(model, config, phase, folder),
            train_dataset=train,
            eval_dataset=validation,
            data_collator=Collator(model.pad_id),
            callbacks=[interrupts],
        )
        before = trainer.evaluate()
        with interrupts.caught():
            _train(trainer, phase.steps, last_checkpoint(folder) if resume else None)
        if interrupts.agreed(trainer.args.device):
            processes.say(
                f"\nInterrupted at step {trainer.state.global_step} of {phase.steps} ({name})."
            )
            raise KeyboardInterrupt
        curve = _curve([{"step": 0, **before}, *trainer.state.log_history])
        after = trainer.evaluate()
    model.eval()
    processes.scatter(model)
    return {
        "steps": trainer.state.global_step,
        "ce_before": before["eval_loss"],
        "ce_after": after["eval_loss"],
        "skip_rate": after["eval_skip_rate"],
        "alpha": driver.penalty if driver else None,
        "offsets": driver.offsets if driver else {},
        "curve": curve,
    }


def _curve(history: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """Return what was logged at the rate asked for, each as [step, value] pairs."""
    found: dict[str, list[list[float]]] = {}
    for entry in history:
        for name in CURVES & entry.keys():
            found.setdefault(name, []).append([entry["step"], round(entry[name], 4)])
    return found


def _train(trainer: FirstTrainer, steps: int, checkpoint: Path | None) -> None:
    """Take the steps that are left; none where a checkpoint already has them all."""
    if checkpoint is None:
        if steps:
            trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer.state = state
    trainer.take_up(checkpoint)


@contextmanager
def _checkpointed(model: FirstModel, config: TrainConfig):
    """Recompute activations within this scope, if options ask for it."""
    if not config.gradient_checkpointing:
        yield
        return
    # Its name in this transformers, or the one before.
    new = hasattr(model.base, "activation_checkpointing_enable")
    name = f"{'activation' if new else 'gradient'}_checkpointing"
    getattr(model.base, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model.base, f"{name}_disable")()


def _arguments(
    model: FirstModel, config: TrainConfig, phase: Phase, folder: Path
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.grad_accum,
        learning_rate=phase.lr,
        lr_scheduler_type=phase.schedule,
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        data_seed=2 * config.seed + phase.order + AFTER * trainings(model),
        eval_strategy="steps",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=phase.save_steps,
        save_total_limit=2,
        load_best_model_at_end=phase.keeps_best,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=min(config.logging_steps, max(phase.steps, 1)),
        logging_nan_inf_filter=False,
        report_to=["tensorboard"] if config.tensorboard else [],
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        ddp_find_unused_parameters=True,  # layers that all rows of a process skip
    )
    if arguments.device.type == "cuda":  # DataParallel would split a batch from its decisions
        torch.cuda.set_device(model.device)
        arguments._n_gpu = 1
    return arguments


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


def trainings(model: FirstModel) -> int:
    """Return how many runs of `firstlm train` made the artifact that a model was loaded from."""
    record = model.training_record
    return record.get("trainings", int("run" in record))


def work_folder(config: TrainConfig) -> Path:
    """Return the folder of a run's checkpoints and logs, beside the artifact."""
    return Path(f"{config.output.rstrip('/')}-run")
