# SPDX-License-Identifier: Apache-2.0
"""Every option of firstlm, declared once.

A field's default, type, help and choices stand here; the command line, YAML files and saved runs
are derived from them (see `options.py`). Knows nothing about models.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from firstlm.errors import ConfigError
from firstlm.options import check, option

UNITS = ("block", "attention", "mlp")
READS = ("states", "length")
PREFILL_MODES = ("skip", "full")
PEERS = ("transformers", "static", "early_exit", "economize", "llama_cpp")  # of `firstlm bench`
COMPARED = ("cut", "mixed")  # what `firstlm bench` may measure beside its engines
RANDOM_SHAPES = ("llama-3-8b", "llama-3.2-3b")  # that `firstlm bench` can make
ENGINES = ("hf", "fast")  # what decodes: transformers, or layers compiled one by one
WEIGHT_FORMATS = ("same", "int8", "int4")  # of linear layers in the fast engine
GATES = ("straight_through", "soft")
STAGES = ("both", "routers", "lora", "joint")
DTYPES = ("auto", "float32", "bfloat16", "float16")
RATES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40)  # that calibration serves unless told otherwise
# Policies to compare routers with (`baselines.py`); the first ones need no measurement.
UNMEASURED = ("random", "random_interior", "random_fixed", "unified", "early_exit")
BASELINES = (*UNMEASURED, "static_importance", "majority", "skip_decode")
POLICIES = ("router", *BASELINES)
# Measured on what routers say of the scored prompts: one mask for all, or one for each token.
DIAGNOSTICS = ("majority_here", "token_level")
RATED = (*POLICIES, *DIAGNOSTICS)  # that are scored at skip rates
EVAL_POLICIES = ("base", "run_all", *RATED)
TASKS = ("qa", "translation", "summarization")  # that `firstlm eval` has metrics for


def check_skip_rate(value: float, name: str = "skip_rate", highest: float = 0.9) -> float:
    """Return `value` if it is a share of layers that can be asked for, else raise `ConfigError`."""
    if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= highest):
        raise ConfigError(
            f"{name} is {value!r}; expected a share of layers between 0 and {highest}, "
            "such as 0.25 to skip a quarter of them."
        )
    return float(value)


class Options:
    """What all options have in common: they are checked, from Python too."""

    def __post_init__(self) -> None:
        """Refuse wrong types, choices, numbers and skip rates."""
        for name in ("skip_rate", "skip_rates", "rates", "levels"):
            found = getattr(self, name, None)
            for rate in found if isinstance(found, list) else [found]:
                if rate is not None:
                    check_skip_rate(rate, name)
        for name, value in check(self).items():  # as their types say, paths expanded
            object.__setattr__(self, name, value)


def seed_option(what: str) -> Any:
    """Declare a seed; random generators take 32 bits."""
    return option(0, at_least=0, at_most=2**32 - 1, help=f"seed of {what}")


def template_option() -> Any:
    """Declare how rows become prompts."""
    return option(
        None,
        help="prompt template for source/target rows: translation, summarization, qa, instruct, or "
        "own text with {fields} of the row; without it the row's task field decides",
    )


def dtype_option() -> Any:
    """Declare the number format of weights."""
    return option(
        "auto",
        choices=DTYPES,
        help="number format of the weights; auto: bfloat16 on a GPU, float32 elsewhere",
    )


def device_option() -> Any:
    """Declare where to compute."""
    return option("auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one")


def count_option(default: int | None, help: str) -> Any:
    """Declare a number of things, one or more."""
    return option(default, at_least=1, help=help)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Options):
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
class ModelOptions(Options):
    """Which base model to load, and how."""

    model: str | None = option(
        None,
        path=True,
        help="base model: a hub id, a folder, a .gguf file, or 'smollm2' (SmolLM2-135M-Instruct), "
        "which is taken where no artifact names another",
    )
    dtype: str = dtype_option()
    device: str = device_option()


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Where examples come from, and how they become prompts."""

    data: list[str] | None = option(
        None,
        path=True,
        help="training data: .jsonl, .jsonl.gz, or a hub dataset id (id:split); several are mixed",
    )
    validation: list[str] | None = option(
        None, path=True, help="validation data; without it a part of the training data is held out"
    )
    template: str | None = template_option()
    max_length: int = count_option(1024, "longest prompt plus answer, in tokens")
    limit: int | None = count_option(None, "use the first N training examples of each file only")
    validation_limit: int | None = count_option(
        256, "use N validation examples only, drawn at random"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RouterConfig, ModelOptions, DataOptions):
    """One training run: routers train, LoRA recovers, thresholds are calibrated."""

    output: str = option(
        "first-model",
        path=True,
        help="folder for the artifact; logs and checkpoints go beside it, to OUTPUT-run",
    )
    stage: str = option(
        "both",
        choices=STAGES,
        help="which phases to run: routers, then lora (both), one of them, or the two at once "
        "(joint), for as many steps as lora_steps says",
    )
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
    alpha: float = option(
        0.0, at_least=0, help="weight of the non-skip penalty; the start value where driven"
    )
    alpha_lr: float = option(
        0.05, above=0, help="step of the driver that adapts alpha to meet skip_rate"
    )
    l2: float = option(0.01, at_least=0, help="weight of the L2 penalty on router weights (lambda)")
    distill: float = option(
        1.0,
        at_least=0,
        help="weight, in phase 1, of staying close to what all layers compute: every token of a "
        "row says what a layer is worth, not only the answer's",
    )
    teach: float = option(
        0.0,
        at_least=0,
        help="weight, in phase 2, of staying close to what all layers computed when it began: pays "
        "where LoRA knew the task by then (--artifact of a run without skips)",
    )
    heal: int = option(
        0,
        at_least=0,
        help="examples from which LoRA's start in phase 2 is computed, some 64: a regression puts "
        "back what skipped layers leave missing, which pays most for one rate; all are in "
        "memory at once, with a mask for each rate (0: LoRA starts as it is)",
    )
    warm_start: int = option(
        32,
        at_least=0,
        help="examples on which layers are ranked to start the routers from (0: no ranking)",
    )
    clusters: int = count_option(
        1,
        "groups of prompts, found by their content, that each get a ranking of layers of their own "
        "to start from: as many as there are tasks in the data, or more, if texts of one differ",
    )
    router_steps: int = option(20, at_least=0, help="optimizer steps of phase 1")
    router_lr: float = option(
        1e-3, above=0, help="learning rate of phase 1: about how far a logit moves"
    )
    lora_steps: int = option(400, at_least=0, help="optimizer steps of phase 2")
    lora_lr: float = option(1e-3, above=0, help="learning rate of LoRA")
    lora_rank: int = count_option(8, "rank of the LoRA matrices")
    lora_alpha: int = count_option(16, "scale of the LoRA matrices")
    lora_dropout: float = option(0.0, at_least=0, below=1, help="dropout on the LoRA input")
    batch_size: int = count_option(16, "examples per forward pass, of each process")
    grad_accum: int = count_option(1, "forward passes per optimizer step")
    gradient_checkpointing: bool = option(False, help="save memory by recomputing activations")
    warmup: float = option(
        0.05, at_least=0, below=1, help="share of steps over which the learning rate rises"
    )
    max_grad_norm: float = option(1.0, above=0, help="clip gradients to this norm")
    seed: int = seed_option("data order, initial weights and sampling")
    eval_steps: int = count_option(100, "validate every N steps and keep the best LoRA")
    save_steps: int = count_option(
        100, "write a checkpoint to resume from every N router steps (LoRA: every eval_steps)"
    )
    logging_steps: int = count_option(10, "log every N steps")
    resume: bool = option(True, help="continue from the last checkpoint in output, if there is one")
    tensorboard: bool = option(True, help="write TensorBoard logs to OUTPUT-run/logs")

    def __post_init__(self) -> None:
        """Refuse options that do not go together, too."""
        super().__post_init__()
        if self.skip_rates and self.skip_rate is None:
            raise ConfigError("skip_rates needs skip_rate, the rate that thresholds of 0.5 serve.")
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
        if (self.policy == "majority") != (self.majority_of is not None):
            raise ConfigError(
                "policy=majority and majority_of go together: the layers that most prompts skip "
                "are measured on an artifact's routers."
            )
        if self.policy != "router" and (self.stage in ("routers", "joint") or not self.skip_rate):
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
        self._check_idle()

    @property
    def trains_routers(self) -> bool:
        """Whether a phase of this run trains routers."""
        return self.policy == "router" and self.stage != "lora"

    @property
    def has_phase_1(self) -> bool:
        """Whether routers train by themselves."""
        return self.trains_routers and self.stage != "joint"

    def _check_idle(self) -> None:
        """Refuse options that would do nothing, so that nobody believes they did something."""
        if not self.has_phase_1 and self.distill not in (
            0.0,
            self.__dataclass_fields__["distill"].default,
        ):
            raise ConfigError(
                f"distill={self.distill:g} is for routers that train by themselves; expected "
                "policy router and stage both or routers."
            )
        ranks = self.trains_routers and self.warm_start
        if self.clusters > 1 and not (ranks and self.skip_rate):
            raise ConfigError(
                f"clusters={self.clusters} ranks layers for groups of prompts, but nothing is "
                "ranked here; expected policy router, a stage that trains routers, a skip_rate and "
                "a warm_start above 0."
            )
        skips = self.skip_rate != 0
        if self.teach and not (skips and self.stage in ("both", "lora")):
            raise ConfigError(
                f"teach={self.teach:g} is for LoRA that learns to do without layers; expected "
                "stage both or lora, and a skip_rate above 0."
            )
        if self.heal and not (skips and self.stage in ("both", "lora")):
            raise ConfigError(
                f"heal={self.heal} is for LoRA that learns to do without layers; expected stage "
                "both or lora, and a skip_rate above 0."
            )
        if 0 < self.heal < 16:
            raise ConfigError(
                f"heal={self.heal} holds out too few examples to tell what helps; expected 16 or "
                "more, or 0."
            )
        if self.heal and (
            self.unit != "block" or self.prefill != "skip" or self.policy == "skip_decode"
        ):
            raise ConfigError(
                f"heal={self.heal} is for whole blocks that prompts skip as answers do; expected "
                "unit block, prefill skip and a policy other than skip_decode."
            )
