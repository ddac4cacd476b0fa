# SPDX-License-Identifier: Apache-2.0
"""`firstlm train`: the phases of a run in order, then thresholds, then the artifact.

Calibration comes last, because LoRA moves the states that routers read. A phase that is done is
kept beside the artifact, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from transformers import set_seed

from firstlm import artifact, artifact_files, processes
from firstlm.adapters import add_lora, lora_to_train, raise_rank
from firstlm.baselines import Baseline
from firstlm.calibration import calibrate, serve_by_default
from firstlm.config import PREFILL_MODES, RATES, RouterConfig, TrainConfig
from firstlm.data import Encoded, draw, encode_all, split_validation
from firstlm.errors import ConfigError
from firstlm.examples import load_examples
from firstlm.importance import influence_order
from firstlm.lora import is_lora, lora_parameters
from firstlm.model import FirstModel
from firstlm.options import from_dict, read_yaml, to_dict, to_yaml
from firstlm.phases import (
    RUN_FILE,
    train_joint,
    train_lora,
    train_routers,
    trainings,
    work_folder,
)
from firstlm.pretrained import (
    SMOLLM2,
    context_length,
    load_base,
    load_config,
    load_tokenizer,
    resolve_device,
)
from firstlm.results import atomic_dir, provenance, sha256_of, write_json, write_text
from firstlm.thresholds import Thresholds
from firstlm.trainer import WEIGHTS_FILE, mixed_precision, read_weights, take_weights

VALIDATION_SHARE = 0.1
CALIBRATION_PROMPTS = 128
INFLUENCE_ROWS = 64  # on which block influence is measured
RECORD_FILE = "record.json"
START_FILE = "started.json"  # in a work folder: hashes of its data, and what is below
PROCESSES = "processes"  # that began the run
LOCK_FILE = ".lock"  # held while a run is at work in its folder
# Options that may differ between a run and its resumption: they change no result.
FREE = ("resume", "output", "tensorboard", "logging_steps", "device")
OF_PHASE_1 = ("router_steps", "distill")  # options that nothing else looks at
OF_ROUTERS = ("router_lr", "warm_start", "gate", "l2")  # where routers train at all


def run(config: TrainConfig) -> int:
    """Train as the options say and save an artifact (`firstlm train`)."""
    if not config.data:
        raise ConfigError("Nothing to train on: name a file or a hub dataset with --data.")
    artifact_files.check_target(config.output)
    processes.join(resolve_device(config.device))
    if processes.launched():
        number = processes.count()
        processes.say(f"Training in {number} process{'es' if number > 1 else ''}.")
    hashes = _data_hash(config)
    if config.resume and _finished(config, hashes):
        processes.say(
            f"{config.output} was trained by this command before, and stays as it is; --no-resume "
            "trains it anew."
        )
        return 0
    name = _base_name(config)
    train, validation = read_data(config, name)
    with processes.first_alone() as first:
        if first and work_folder(config).is_dir():
            with _claimed(config, hashes):  # what it refuses it refuses before a model is loaded
                pass
    model = load_model(config, name)
    model.baseline = _baseline(model, train, config)
    if processes.shards() and config.stage != "routers":
        if config.teach or config.heal:
            raise ConfigError(
                "teach and heal need parameters that are whole, and FSDP splits them among "
                "processes; leave them out, or train with DDP."
            )
        set_seed(config.seed)
        lora_to_train(model, config)  # what comes after layers are split would be left out
    with ExitStack() as held:
        with processes.first_alone() as first:
            if first:
                held.enter_context(_claimed(config, hashes))
                _begin(config, hashes)
        record = _phases(model, train, validation, config, hashes)
        finish(model, draw(validation, CALIBRATION_PROMPTS, config.seed), config)
        model.training_record, model.results = record, {}
        artifact.save(model, config.output, more={RUN_FILE: to_yaml(config)})
        processes.say(f"Saved the artifact to {config.output}; logs are in {work_folder(config)}.")
    return 0


def _phases(
    model: FirstModel,
    train: list[Encoded],
    validation: list[Encoded],
    config: TrainConfig,
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """Train one phase after the other; returns what an artifact says of its training."""
    record: dict[str, Any] = {
        "run": to_dict(config),
        "provenance": provenance(seed=config.seed, data=hashes),
        "trainings": trainings(model) + 1,
    }
    arguments = (model, train, validation, config)
    try:
        if config.stage in ("both", "routers") and model.baseline is None:
            record["routers"] = _once(
                model, config, "routers", lambda: train_routers(*arguments, resume=True)
            )
        if config.stage == "joint":
            record["joint"] = _once(
                model, config, "joint", lambda: train_joint(*arguments, resume=True)
            )
        if config.stage in ("both", "lora"):
            record["lora"] = _once(
                model, config, "lora", lambda: train_lora(*arguments, resume=True)
            )
    except KeyboardInterrupt:
        again = "the same command" if config.resume else "the command without --no-resume"
        processes.say(f"Run {again} again to go on; checkpoints are in {work_folder(config)}.")
        raise
    return record


def _once(
    model: FirstModel, config: TrainConfig, phase: str, train: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Train a phase, or take what it trained from where an earlier call left it."""
    done = work_folder(config) / "checkpoints" / phase / "done"
    if done.is_dir():
        processes.say(f"The phase {phase!r} is done ({done}); going on.")
        tensors = read_weights(done)
        if not model.has_adapter and any(map(is_lora, tensors)):
            add_lora(model, config)
        take_weights(model, tensors)
        return json.loads((done / RECORD_FILE).read_text(encoding="utf-8"))
    record = train()
    trained = [(n, p) for n, p in model.named_parameters() if is_lora(n) or "routers." in n]
    tensors = processes.on_cpu(trained)
    with processes.first_alone() as first:
        if first:
            with atomic_dir(done) as folder:
                save_file(tensors, folder / WEIGHTS_FILE)
                write_json(folder / RECORD_FILE, record)
    return record


def finish(
    model: FirstModel,
    rows: Sequence[Encoded],
    config: TrainConfig,
    rates: Sequence[float] = RATES,
    prefill_modes: Sequence[str] = PREFILL_MODES,
) -> None:
    """Measure thresholds, and let the plain ones serve the rate that was trained for.

    Before that LoRA is rounded to bfloat16, in which it is saved, so that what is calibrated is
    what will be loaded. Without skips (`skip_rate` 0) that is all.
    """
    if config.stage != "routers" and model.has_adapter:
        _round_adapter(model)
    if config.skip_rate == 0 or model.baseline is not None:
        return
    trained = [rate for rate in (config.skip_rate, *(config.skip_rates or ())) if rate is not None]
    prompts = [row.prompt_ids for row in rows]
    calibrate(model, prompts, sorted({*rates, *trained}), prefill_modes, config.batch_size)
    if config.skip_rate is None:
        return
    try:
        serve_by_default(model, config.skip_rate, config.prefill)
    except ConfigError as error:
        print(f"Warning: the rate trained for is not met. {error}")


def _base_name(config: TrainConfig) -> str:
    """Return the name of the base model: as asked for, or as the artifact to go on from has it."""
    if config.model is None and config.artifact is not None:
        return artifact_files.base_id(config.artifact) or SMOLLM2
    return config.model or SMOLLM2


def read_data(config: TrainConfig, name: str) -> tuple[list[Encoded], list[Encoded]]:
    """Return what a run of a base model trains on and what it validates with, encoded.

    The model itself is not loaded, which can take minutes that nobody wants to lose to a typo.

    Raises:
        DataError: a row cannot be read, or is longer than `max_length` or the model's context.
    """
    assert config.data
    context, tokenizer = context_length(load_config(name)), load_tokenizer(name)
    options: dict[str, Any] = {"template": config.template, "tokenizer": tokenizer}
    train = [e for file in config.data for e in load_examples(file, limit=config.limit, **options)]
    if config.validation is not None:
        validation = [e for file in config.validation for e in load_examples(file, **options)]
    else:
        train, validation = split_validation(train, VALIDATION_SHARE, config.seed)
    validation = draw(validation, config.validation_limit, config.seed)
    longest = min(config.max_length, context or config.max_length)
    train, validation = (encode_all(part, tokenizer, longest)[1] for part in (train, validation))
    return train, validation


def load_model(config: TrainConfig, name: str) -> FirstModel:
    """Load the model that a run trains: an artifact's, or a base model with new routers."""
    base, tokenizer = load_base(name, **load_options(config))
    fields = RouterConfig.__dataclass_fields__
    wanted = RouterConfig(**{name: getattr(config, name) for name in fields})
    if config.artifact is not None:
        model = FirstModel.from_pretrained(config.artifact, base=base, tokenizer=tokenizer)
        if not model.has_routers:
            if config.stage == "lora" and config.policy == "router" and config.skip_rate != 0:
                raise ConfigError(
                    f"stage=lora trains LoRA for routers that exist, but none were trained in "
                    f"{config.artifact}; expected stage both, or skip_rate 0."
                )
            model = model.rerouted(wanted)
        for field in ("unit", "reads"):
            found, asked = getattr(model.router_config, field), getattr(wanted, field)
            if found != asked:
                raise ConfigError(
                    f"The routers of {config.artifact} have {field} {found!r}, but {asked!r} was "
                    f"asked for; give --{field} {found}."
                )
        if model.has_adapter and model.base.peft_config["default"].r != config.lora_rank:
            set_seed(config.seed)  # fresh rows of its matrices
            raise_rank(model, config)
    else:
        model = FirstModel.from_base(base, wanted, tokenizer)
    model.base_id = name
    return model


def _baseline(model: FirstModel, train: list[Encoded], config: TrainConfig) -> Baseline | None:
    """Return what decides in the routers' place, if options name it."""
    if config.policy == "router":
        return None
    assert config.skip_rate is not None
    orders: tuple[tuple[float, tuple[int, ...]], ...] = ()
    answers: tuple[int, ...] = ()
    if config.policy == "static_importance":
        rows = draw(train, INFLUENCE_ROWS, config.seed)
        with mixed_precision(model):
            order = processes.same(influence_order(model, rows, config.batch_size))
            orders = ((config.skip_rate, tuple(order)),)
    elif config.policy == "skip_decode":
        answers = tuple(np.bincount([len(row.answer_ids) - 1 for row in train]).tolist())
    elif config.majority_of is not None:
        folder = artifact_files.find(config.majority_of)
        _, table, other = artifact_files.parse(artifact_files.read_config(folder), folder)
        if other is not None or not table:
            raise ConfigError(
                f"majority_of={config.majority_of} has no routers of its own, whose masks could be "
                "counted; expected an artifact that was trained with --policy router."
            )
        known = Thresholds(table)
        rates = sorted({config.skip_rate, *(config.skip_rates or ())})
        orders = tuple((rate, tuple(known.majority(rate, config.prefill))) for rate in rates)
    name, rate = config.policy, config.skip_rate
    return Baseline(name, model.layer_count, model.free_layers, rate, config.seed, orders, answers)


def load_options(config: TrainConfig) -> dict[str, Any]:
    """Return how `load_base` shall load a run's base model."""
    options: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    on_cpu = resolve_device(config.device).type == "cpu"
    if on_cpu and config.dtype == "bfloat16":
        # The fused CPU kernel takes many times as long as plain attention for short bf16 rows.
        options["attn_implementation"] = "eager"
    return options


@contextmanager
def _claimed(config: TrainConfig, hashes: dict[str, str]) -> Iterator[None]:
    """Within this scope a run's work folder is its own; one that another run has is refused.

    So is one whose run cannot be resumed with these options and these data.
    """
    work = work_folder(config)
    if work.is_dir() and not (work / LOCK_FILE).is_file():
        _refuse_others_files(work)  # before anything is written there
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(work / LOCK_FILE).acquire(timeout=0))
        except Timeout:
            raise ConfigError(
                f"Another training is at work in {work}. Wait for it, or name another --output."
            ) from None
        _refuse_others_files(work)
        if config.resume and (work / RUN_FILE).is_file():
            _refuse_other_run(config, hashes)
        yield


def _refuse_others_files(work: Path) -> None:
    """Refuse a folder that holds something, but no run."""
    held = {path.name for path in work.iterdir()} - {LOCK_FILE}
    if held and RUN_FILE not in held:
        raise ConfigError(
            f"{work}, where logs and checkpoints go, holds other files. Name another --output."
        )


def _refuse_other_run(config: TrainConfig, hashes: Mapping[str, str]) -> None:
    """Refuse to resume a run that had other options, data or processes."""
    work = work_folder(config)
    file, data_file = work / RUN_FILE, work / START_FILE
    before = read_yaml(file)  # of an older version, it may name options that are gone
    if not isinstance(before, dict):
        raise ConfigError(f"{file} is no run's file; start over with --no-resume.")
    left = {name: value for name, value in before.items() if hasattr(config, name)}
    changed = changed_options(to_dict(from_dict(TrainConfig, left, where=f" in {file}")), config)
    if changed:
        raise ConfigError(
            f"{work} holds a run with other options ({', '.join(changed)}; see {file}). Name "
            "another --output, repeat the options to resume it, or start over with --no-resume."
        )
    known = json.loads(data_file.read_text(encoding="utf-8")) if data_file.is_file() else {}
    started = known.get(PROCESSES, processes.count())
    if started != processes.count():
        raise ConfigError(
            f"{work} holds a run that was begun by {started} process(es), which take other "
            f"rows than {processes.count()}. Start as many to resume it, name another "
            "--output, or start over with --no-resume."
        )
    changed = [name for name, found in hashes.items() if known.get(name, found) != found]
    if changed:
        raise ConfigError(
            f"{work} holds a run on data that has changed since: {', '.join(changed)}. Name "
            "another --output, put it back to resume, or start over with --no-resume."
        )


def _begin(config: TrainConfig, hashes: Mapping[str, str]) -> None:
    """Write a run's options and data hashes into its work folder."""
    work = work_folder(config)
    if not config.resume:
        # What says that a run's files are there goes last.
        for path in sorted(work.iterdir(), key=lambda path: path.name == RUN_FILE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
    write_text(work / RUN_FILE, to_yaml(config))
    write_json(work / START_FILE, {**hashes, PROCESSES: processes.count()})


def _finished(config: TrainConfig, hashes: Mapping[str, str]) -> bool:
    """Whether the artifact is there that this run makes, and its run with it."""
    folder = Path(config.output)
    files = (folder / artifact_files.ARTIFACT_FILE, work_folder(config) / RUN_FILE)
    if not all(file.is_file() for file in files):
        return False
    record = artifact_files.read_config(folder).get("training") or {}
    before, made = record.get("run") or {}, record.get("provenance") or {}
    known = set(to_dict(config)) - set(FREE)
    return (
        known <= set(before) and not changed_options(before, config) and made.get("data") == hashes
    )


def changed_options(before: Mapping[str, Any], config: TrainConfig) -> list[str]:
    """Return the options that a run had with other values, of those that change its result."""
    now, free = to_dict(config), FREE
    if not config.has_phase_1:
        free += OF_PHASE_1
    if not config.trains_routers:
        free += OF_ROUTERS
    return [n for n in now if n not in free and n in before and now[n] != before[n]]


def _data_hash(config: TrainConfig) -> dict[str, str]:
    """Return hashes of what a run learns from: its files, and artifacts that it goes on from."""
    found: dict[str, str] = {}
    for name, files in (("train", config.data), ("validation", config.validation)):
        hashes = [sha256_of(file) for file in files or () if Path(file).is_file()]
        if hashes:
            found[name] = " ".join(hashes)
    artifacts = {"artifact": config.artifact, "majority_of": config.majority_of}
    return found | {k: artifact_files.content_hash(v) for k, v in artifacts.items() if v}


@torch.no_grad()
def _round_adapter(model: FirstModel) -> None:
    """Round LoRA to bfloat16, and let it be saved so; in memory it is as when it is loaded."""
    model.adapter_dtype = torch.bfloat16
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(torch.bfloat16).to(model.base.dtype)
