# SPDX-License-Identifier: Apache-2.0
"""Every option of firstlm, declared once.

A field's default, type, help and choices stand here; the command line, YAML files and saved runs
are derived from them (see `options.py`). Knows nothing about models.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from firstlm.errors import ConfigError
from firstlm.options import REQUIRED, check, option

UNITS = ("block", "attention", "mlp")
READS = ("states", "length")
PREFILL_MODES = ("skip", "full")
GATES = ("straight_through", "soft")
STAGES = ("both", "routers", "lora")
DTYPES = ("auto", "float32", "bfloat16", "float16")
RATES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)  # that calibration serves unless told otherwise
# Policies to compare routers with (`baselines.py`); the first ones need no measurement.
DRAWN = ("random", "random_interior", "random_fixed", "unified", "early_exit")
BASELINES = (*DRAWN, "static_importance", "majority", "skip_decode")
POLICIES = ("router", *BASELINES)
EVAL_POLICIES = ("base", "run_all", *POLICIES)
TASKS = ("qa", "translation", "summarization")  # that `firstlm eval` has metrics for


def check_skip_rate(value: float, name: str = "skip_rate", highest: float = 0.9) -> float:
    """Return `value` if it is a share of layers that can be asked for, else raise `ConfigError`."""
    if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= highest):
        raise ConfigError(
            f"{name} is {value!r}; expected a share of layers between 0 and {highest}, "
            "such as 0.25 to skip a quarter of them."
        )
    return float(value)


def check_seed(value: int) -> None:
    """Refuse a seed that random generators do not take."""
    if not 0 <= value < 2**32:
        raise ConfigError(f"seed is {value}; expected a whole number from 0 to 2**32 - 1.")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What the routers switch and how they start (arXiv 2410.12513, section 3)."""

    unit: str = option(
        "block", choices=UNITS, help="what a router switches: block (the paper), attention or mlp"
    )
    init_bias: float = option(
        2.0, help="start value of every router's bias; positive starts with all layers kept"
    )
    reads: str = option(
        "states",
        choices=READS,
        help="what a router reads: the mean of the states that enter its layer (the paper), or, to "
        "compare with, nothing but the prompt's length",
    )

    def width(self, hidden_size: int) -> int:
        """Return how many numbers a router reads."""
        return 1 if self.reads == "length" else hidden_size


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which base model to load, and how."""

    model: str | None = option(
        None,
        path=True,
        help="base model: a hub id, a folder, or 'smollm2' (SmolLM2-135M-Instruct), which is "
        "taken where no artifact names another",
    )
    dtype: str = option("auto", choices=DTYPES, help="number format of the weights")
    device: str = option("auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where examples come from, and how they become prompts."""

    data: str | None = option(
        None, path=True, help="training data: .jsonl, .jsonl.gz, or a hub dataset id (id:split)"
    )
    validation: str | None = option(
        None, path=True, help="validation data; without it a part of the training data is held out"
    )
    template: str | None = option(
        None,
        help="prompt template for source/target rows: translation, summarization, qa, instruct, or "
        "own text with {fields} of the row; without it the row's task field decides",
    )
    max_length: int = option(1024, help="longest prompt plus answer, in tokens")
    limit: int | None = option(None, help="use the first N training examples only")
    validation_limit: int | None = option(
        256, help="use N validation examples only, drawn at random"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RouterConfig, ModelOptions, DataOptions):
    """One training run: routers train, LoRA recovers, thresholds are calibrated."""

    output: str = option(
        "first-model",
        path=True,
        help="folder for the artifact; logs and checkpoints go beside it, to OUTPUT-run",
    )
    stage: str = option("both", choices=STAGES, help="which phases to run")
    policy: str = option(
        "router",
        choices=POLICIES,
        help="what decides: routers, or a policy to compare them with, which gets LoRA alone",
    )
    majority_of: str | None = option(
        None, path=True, help="the artifact whose routers' majority --policy majority takes"
    )
    artifact: str | None = option(
        None,
        path=True,
        help="go on from this artifact's routers and LoRA (--stage lora needs its routers)",
    )
    skip_rate: float | None = option(
        0.25, help="share of layers to skip; alpha is driven to meet it (none: use --alpha as is)"
    )
    skip_rates: list[float] | None = option(
        None, help="rates sampled per batch around skip_rate, so that one artifact serves them all"
    )
    gate: str = option(
        "straight_through",
        choices=GATES,
        help="forward of phase 1: hard gates, or soft as the paper",
    )
    prefill: str = option(
        "skip", choices=PREFILL_MODES, help="train for prompts that skip layers too, or run all"
    )
    alpha: float = option(0.0, help="weight of the non-skip penalty; the start value where driven")
    alpha_lr: float = option(0.05, help="step of the driver that adapts alpha to meet skip_rate")
    l2: float = option(0.01, help="weight of the L2 penalty on router weights (lambda)")
    distill: float = option(
        0.0,
        help="weight, in phase 1, of staying close to what all layers compute: every token of a "
        "row says what a layer is worth, not only the answer's",
    )
    warm_start: int = option(
        16, help="examples on which layers are ranked to start the routers from (0: no ranking)"
    )
    router_steps: int = option(100, help="optimizer steps of phase 1")
    router_lr: float = option(0.005, help="learning rate of phase 1: about how far a logit moves")
    lora_steps: int = option(400, help="optimizer steps of phase 2")
    lora_lr: float = option(1e-3, help="learning rate of phase 2")
    lora_rank: int = option(8, help="rank of the LoRA matrices")
    lora_alpha: int = option(16, help="scale of the LoRA matrices")
    lora_dropout: float = option(0.0, help="dropout on the LoRA input")
    batch_size: int = option(16, help="examples per forward pass")
    grad_accum: int = option(1, help="forward passes per optimizer step")
    gradient_checkpointing: bool = option(False, help="save memory by recomputing activations")
    warmup: float = option(0.05, help="share of steps over which the learning rate rises")
    max_grad_norm: float = option(1.0, help="clip gradients to this norm")
    seed: int = option(0, help="seed of data order, initial weights and sampling")
    eval_steps: int = option(100, help="validate every N steps and keep the best LoRA")
    save_steps: int = option(
        100, help="write a checkpoint to resume from every N router steps (LoRA: every eval_steps)"
    )
    logging_steps: int = option(10, help="log every N steps")
    resume: bool = option(True, help="continue from the last checkpoint in output, if there is one")
    tensorboard: bool = option(True, help="write TensorBoard logs to OUTPUT-run/logs")

    def __post_init__(self) -> None:
        if self.skip_rate is not None:
            check_skip_rate(self.skip_rate)
        for rate in self.skip_rates or ():
            check_skip_rate(rate, "skip_rates")
        check(self)
        if self.skip_rates and self.skip_rate is None:
            raise ConfigError("skip_rates needs skip_rate, the rate that thresholds of 0.5 serve.")
        for name in ("router_steps", "lora_steps", "warm_start", "distill", "l2"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more.")
        if re.fullmatch(r"cuda:0*[1-9]\d*", self.device):
            raise ConfigError(
                f"device is {self.device!r}, but training takes the first GPU it sees: set "
                f"CUDA_VISIBLE_DEVICES={self.device[5:]} and leave device at cuda."
            )
        if self.dtype == "float16":
            raise ConfigError(
                "dtype is 'float16', whose gradients would vanish without a loss scale; expected "
                "bfloat16 or float32 for training."
            )
        check_seed(self.seed)
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"warmup is {self.warmup}; expected a share of steps, 0 up to below 1."
            )
        if not (self.alpha >= 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"alpha is {self.alpha}; expected 0 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}; expected 0 up to below 1.")
        optional = [n for n in ("limit", "validation_limit") if getattr(self, n) is not None]
        _check_counts(self, *optional)
        positive = (
            "batch_size",
            "grad_accum",
            "lora_rank",
            "max_length",
            "eval_steps",
            "save_steps",
        )
        for name in (*positive, "logging_steps", "router_lr", "lora_lr"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value}; expected more than 0.")
        if (self.policy == "majority") != (self.majority_of is not None):
            raise ConfigError(
                "policy=majority and majority_of go together: the layers that most prompts skip "
                "are measured on an artifact's routers."
            )
        if self.policy != "router" and (self.stage == "routers" or not self.skip_rate):
            raise ConfigError(
                f"policy={self.policy} trains LoRA for layers that are skipped without routers; "
                "expected stage both or lora, and a skip_rate above 0."
            )
        routed = self.policy == "router" and self.skip_rate not in (None, 0.0)
        if self.stage == "lora" and self.artifact is None and routed:
            raise ConfigError(
                "stage=lora trains LoRA for routers that exist: name their artifact with "
                "--artifact, or set --skip-rate 0 for plain LoRA without skips."
            )


@dataclass(frozen=True, kw_only=True)
class ArtifactOptions:
    """Which artifact, and how to load it with its base model."""

    artifact: str = option(
        REQUIRED, path=True, positional=True, help="folder or hub id of a FiRST artifact"
    )
    model: str | None = option(
        None,
        path=True,
        help="base model to use instead of the one named in the artifact: an id or a folder",
    )
    dtype: str = option("auto", choices=DTYPES, help="number format of the weights")
    device: str = option("auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ArtifactOptions):
    """How prompts are answered."""

    prefill: str = option(
        "skip", choices=PREFILL_MODES, help="let the prompt skip layers too, or run all of them"
    )
    seed: int = option(0, help="seed of sampling")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnswerOptions):
    """Answer prompts with a routed model."""

    prompt: list[str] | None = option(None, help="one or more prompts; without any, stdin is read")
    file: str | None = option(
        None, path=True, help="prompts from a file: .jsonl rows, or text with one a line"
    )
    template: str | None = option(
        None, help="prompt template for source rows: a name or own text, see `firstlm train --help`"
    )
    limit: int | None = option(None, help="use the first N prompts of the file only")
    skip_rate: float | None = option(
        None, help="share of layers to skip, from the artifact's thresholds (none: 0.5 as trained)"
    )
    compare: bool = option(False, help="show base and routed answers side by side, with timings")
    max_new_tokens: int = option(128, help="longest answer, in tokens")
    temperature: float = option(0.0, help="0 takes the likeliest token; above 0 samples")
    top_p: float = option(1.0, help="sample from the likeliest tokens that make up this share")
    num_beams: int = option(1, help="beams of beam search")

    def __post_init__(self) -> None:
        if self.skip_rate is not None:
            check_skip_rate(self.skip_rate)
        if self.prompt and self.file:
            raise ConfigError("both --prompt and --file are given; expected one of them.")
        _check_answers(self.max_new_tokens, self.seed)
        _check_counts(self, *(("limit",) if self.limit is not None else ()))
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature is {self.temperature}; expected 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected a share above 0 and up to 1.")
        if self.num_beams < 1:
            raise ConfigError(f"num_beams is {self.num_beams}; expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Show what is in an artifact, without loading the model."""

    artifact: str = option(REQUIRED, path=True, positional=True, help="folder of a FiRST artifact")
    json: bool = option(False, help="print one JSON object instead of a table")


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(AnswerOptions):
    """Check that a routed model computes what it should, and that its routers decide something."""

    data: str | None = option(
        None, path=True, help="validation data: .jsonl, .jsonl.gz, or a hub dataset id (id:split)"
    )
    template: str | None = option(
        None, help="prompt template for source rows: a name or own text, see `firstlm train --help`"
    )
    limit: int = option(64, help="use the first N examples only")
    batch_size: int = option(8, help="prompts per forward pass")
    max_length: int = option(1024, help="longest prompt plus answer, in tokens")
    max_new_tokens: int = option(16, help="decode steps to compare with full recomputation")
    skip_rate: float | None = option(
        None, help="share of layers to skip, from the artifact's thresholds (none: 0.5 as trained)"
    )
    output: str | None = option(None, path=True, help="also write the report to this JSON file")

    def __post_init__(self) -> None:
        if self.skip_rate is not None:
            check_skip_rate(self.skip_rate)
        _check_answers(self.max_new_tokens, self.seed)
        _check_counts(self, "limit", "batch_size", "max_length")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(ArtifactOptions):
    """Measure the thresholds with which an artifact meets asked skip rates on your own prompts."""

    data: str = option(
        REQUIRED,
        path=True,
        help="validation data: .jsonl, .jsonl.gz, or a hub dataset id (id:split)",
    )
    template: str | None = option(
        None, help="prompt template for source rows: a name or own text, see `firstlm train --help`"
    )
    limit: int | None = option(256, help="use N examples only, drawn at random")
    batch_size: int = option(16, help="prompts per forward pass")
    rates: list[float] = option(list(RATES), help="skip rates to serve; those between are too")
    output: str | None = option(
        None, path=True, help="folder for the artifact with the new thresholds (none: in place)"
    )

    def __post_init__(self) -> None:
        for rate in self.rates:
            check_skip_rate(rate, "rates")
        _check_counts(self, "batch_size", *(("limit",) if self.limit is not None else ()))


@dataclass(frozen=True, kw_only=True)
class EvalConfig(AnswerOptions):
    """Score answers of the base and the routed model on a task, at several skip rates."""

    data: str = option(
        REQUIRED, path=True, help="test data: .jsonl, .jsonl.gz, or a hub dataset id (id:split)"
    )
    template: str | None = option(
        None, help="prompt template for source rows: a name or own text, see `firstlm train --help`"
    )
    task: str | None = option(
        None, choices=TASKS, help="which metrics to take; without it the rows' task field decides"
    )
    policies: list[str] | None = option(
        None,
        choices=EVAL_POLICIES,
        help="what to score: the base model, the artifact with all layers, or what decides which "
        "run (none: base, run_all and what the artifact was trained with)",
    )
    skip_rates: list[float] = option([0.15, 0.25], help="rates at which policies are scored")
    limit: int | None = option(None, help="use the first N examples only")
    batch_size: int = option(16, help="prompts per batch")
    max_new_tokens: int = option(32, help="longest answer, in tokens")
    output: str | None = option(None, path=True, help="write the results to this JSON file")
    record: bool = option(False, help="write the scores into the artifact and its model card too")

    def __post_init__(self) -> None:
        for rate in self.skip_rates:
            check_skip_rate(rate, "skip_rates")
        _check_answers(self.max_new_tokens, self.seed)
        _check_counts(self, "batch_size", *(("limit",) if self.limit is not None else ()))


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Train and score every arm of experiment files with every seed; what is done stays done."""

    action: str = option(
        REQUIRED,
        choices=("run", "list", "summary"),
        positional=True,
        help="run, list what is done, or write a summary of all results to RESULTS/summary.json",
    )
    files: list[str] = option(
        REQUIRED, positional=True, help="experiment files (.yaml), or folders that hold some"
    )
    minutes: float | None = option(
        None, help="stop after so many minutes, such that the same command goes on"
    )
    only: list[str] | None = option(
        None, help="units to run: FILE, FILE-ARM or FILE-ARM-SEED, without .yaml"
    )
    runs: str = option("runs", path=True, help="folder for artifacts, checkpoints and logs")
    results: str = option("results", path=True, help="folder for results, one JSON file a unit")

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise ConfigError(f"minutes is {self.minutes}; expected more than 0.")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw what experiments found: one HTML page that needs nothing else, and its pictures."""

    results: str = option(
        REQUIRED, path=True, positional=True, help="folder that `firstlm experiment` wrote"
    )
    output: str | None = option(
        None, path=True, help="folder for the page and its pictures (none: RESULTS/report)"
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Generate with the shipped artifact, then train a short run for real and show what changed."""

    artifact: str | None = option(
        None, path=True, help="artifact to show (none: the one that is shipped)"
    )
    model: str = option(
        "smollm2", path=True, help="base model of the short run: an id, a folder or 'smollm2'"
    )
    output: str = option("runs/demo", path=True, help="folder for the short run")
    skip_rate: float = option(0.25, help="share of layers to skip")
    router_steps: int = option(16, help="optimizer steps of phase 1")
    lora_steps: int = option(64, help="optimizer steps of phase 2")
    batch_size: int = option(8, help="examples per forward pass")
    max_length: int = option(192, help="longest prompt plus answer, in tokens")
    max_new_tokens: int = option(32, help="longest answer, in tokens")
    seed: int = option(0, help="seed of data order, initial weights and sampling")

    def __post_init__(self) -> None:
        check_skip_rate(self.skip_rate)
        _check_answers(self.max_new_tokens, self.seed)
        _check_counts(self, "router_steps", "lora_steps", "batch_size", "max_length")


def _check_answers(max_new_tokens: int, seed: int) -> None:
    """Refuse an answer without tokens, and a seed that is none."""
    check_seed(seed)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")


def _check_counts(options: object, *names: str) -> None:
    """Refuse counts below one."""
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}; expected 1 or more.")
