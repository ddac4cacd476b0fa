# SPDX-License-Identifier: Apache-2.0
"""FirstModel: a causal language model that chooses from the prompt which of its layers to run.

Holds the base model (or its peft wrapper), the routers, and the thresholds measured after training.
Saving and loading are in `artifact.py`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firstlm import artifact, processes
from firstlm.baselines import Baseline
from firstlm.cache import SkipCache, StaticSkipCache, make_cache, take_cache
from firstlm.choices import Choices, highest_trained
from firstlm.config import ENGINES, PREFILL_MODES, RouterConfig
from firstlm.decisions import RoutingState
from firstlm.engine import DecodeEngine, Engines
from firstlm.errors import ConfigError
from firstlm.inputs import (
    asked,
    longest_row,
    pad_on_the_left,
    position_ids,
    refuse_for_engine,
    refuse_rollback,
    take_prompts,
)
from firstlm.policies import FixedMask, Policy, RunAll
from firstlm.pretrained import context_length
from firstlm.routers import Routers
from firstlm.routing import Routing
from firstlm.thresholds import Thresholds

# Models (by id) that run all layers in the current context; see FirstModel.run_all.
_RUN_ALL: ContextVar[frozenset[int]] = ContextVar("firstlm_run_all", default=frozenset())


@dataclass
class GenerateOutput:
    """What `FirstModel.generate` returns.

    Attributes:
        sequences: [rows, tokens], prompts included, as transformers returns them.
        keep: [prompts, layers] bool on the CPU; True = the layer ran.
        layer_calls: units really run, {"prefill": int, "decode": int}.
        ttft_s: seconds from the call to the first new token.
        decode_s: seconds from the first new token to the last.
        kv_bytes: bytes allocated for keys and values at the end.
        cache: the KV cache, to continue from (`cache=`).
        hf: the full output of transformers' generate (scores, beam indices, ...).
    """

    sequences: torch.Tensor
    keep: torch.Tensor
    layer_calls: dict[str, int]
    ttft_s: float
    decode_s: float
    kv_bytes: int
    cache: SkipCache
    hf: Any

    @property
    def skip_rate(self) -> float:
        """Share of layers skipped, averaged over the prompts."""
        return 1.0 - float(self.keep.float().mean())


class FirstModel(nn.Module):
    """A base model with one router per layer. Make one with `from_base` or `from_pretrained`."""

    base: Any  # a transformers model, or peft's wrapper of one
    routers: Routers

    def __init__(self, base: nn.Module, config: RouterConfig, tokenizer: Any = None) -> None:
        super().__init__()
        self.base = base
        self.router_config = config
        self.tokenizer = tokenizer
        self.routing = Routing(base, config.unit)
        stack = self.routing.stack
        width = config.width(stack.hidden_size)
        self.routers = Routers(len(stack), width, config.init_bias, config.reads)
        for router, module in zip(self.routers, stack.modules, strict=True):
            router.to(next(module.parameters()).device)
        self.thresholds = Thresholds()
        self.baseline: Baseline | None = None  # decides in the routers' place
        self.base_id: str | None = getattr(base.config, "_name_or_path", None) or None
        self.adapter_dtype: torch.dtype | None = None  # number format in which LoRA is saved
        self.training_record: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.merged = False  # the base's weights hold a LoRA that an artifact would lack
        self.engines = Engines(stack, config.unit)
        self.routing.attach()

    @classmethod
    def from_base(
        cls, base: nn.Module, config: RouterConfig | None = None, tokenizer: Any = None
    ) -> FirstModel:
        """Put untrained routers on a transformers causal language model.

        Raises:
            UnsupportedModelError: the model's layers cannot be routed.
        """
        config = config or RouterConfig()
        if not isinstance(config, RouterConfig):
            raise ConfigError(
                f"config is {type(config).__name__}; expected a RouterConfig, such as "
                'RouterConfig(unit="mlp").'
            )
        return cls(base, config, tokenizer)

    def rerouted(self, config: RouterConfig) -> FirstModel:
        """Return a model with new, untrained routers on this one's base and LoRA.

        This one is detached. What is known of base and LoRA goes along.
        """
        other = FirstModel(self.detach(), config, self.tokenizer)
        for name in ("base_id", "adapter_dtype", "training_record", "results", "merged"):
            setattr(other, name, getattr(self, name))
        return other.train(self.training)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        base: nn.Module | str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        tokenizer: Any = None,
    ) -> FirstModel:
        """Load an artifact from a folder or the hub, and its base model unless `base` is given.

        Raises:
            ArtifactError: missing, damaged, too new, or made for another base model.
        """
        return artifact.load(cls, path_or_id, base, dtype, device, tokenizer)

    def save_pretrained(self, path: str) -> None:
        """Write routers, thresholds and adapter to a folder; an older one is replaced whole.

        Raises:
            ArtifactError: the folder holds something else, cannot be written, or LoRA was merged.
        """
        artifact.save(self, path)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the artifact to the Hugging Face hub; returns the URL of the commit."""
        return artifact.push(self, repo_id, **kwargs)

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self.routing.stack)

    @property
    def free_layers(self) -> tuple[int, ...]:
        """The layers that may be skipped."""
        return tuple(i for i in range(self.layer_count) if i not in self.routing.stack.locked)

    @property
    def config(self) -> Any:
        """The base model's config."""
        return self.base.config

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.base.get_input_embeddings().weight.device

    def detach(self) -> nn.Module:
        """Give the base model back, every forward as it was; LoRA that is on it stays on it."""
        self.engines.clear()
        self.routing.detach()
        return self.base

    @contextmanager
    def run_all(self) -> Iterator[None]:
        """Within this scope every layer runs, adapter included."""
        token = _RUN_ALL.set(_RUN_ALL.get() | {id(self)})
        try:
            yield
        finally:
            _RUN_ALL.reset(token)

    def disable_adapter(self) -> AbstractContextManager[Any]:
        """Within this scope LoRA is off; with `run_all()` too, this is the base model exactly.

        Raises:
            ConfigError: LoRA was merged into the base model's weights.
        """
        if self.merged:
            raise ConfigError(
                "LoRA was merged into the base model's weights and cannot be turned off; load the "
                "artifact again."
            )
        return self.base.disable_adapter() if self.has_adapter else nullcontext()

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers' classes: what FSDP splits one by one (accelerate asks)."""
        return sorted({type(layer).__name__ for layer in self.routing.stack.modules})

    @property
    def plain_base(self) -> Any:
        """The transformers model itself, out of peft's wrapper; LoRA layers stay in it."""
        return self.base.get_base_model() if self.has_adapter else self.base

    @property
    def pad_id(self) -> int:
        """Token id to pad batches with; it is masked out, so that any would do."""
        return getattr(self.tokenizer, "pad_token_id", None) or 0

    @property
    def context_length(self) -> int | None:
        """Most tokens that the base model takes, or None where its config sets no bound."""
        return context_length(self.base.config)

    def need_tokenizer(self) -> Any:
        """Return the tokenizer.

        Raises:
            ConfigError: the model was loaded without one.
        """
        if self.tokenizer is None:
            raise ConfigError("The model has no tokenizer, so text can't become a prompt.")
        return self.tokenizer

    def need_routers(self) -> Routers:
        """Return the routers.

        Raises:
            ConfigError: another policy decides in their place, so they were not trained.
        """
        if self.baseline is not None:
            raise ConfigError(
                f"This model was trained for the policy {self.baseline.name!r}, and its routers "
                "decide nothing; expected one that was trained with --policy router."
            )
        return self.routers

    @property
    def has_routers(self) -> bool:
        """Whether routers decide, which were trained, or whose thresholds were measured."""
        return self.baseline is None and bool(self.thresholds.table or not self.routers.untrained)

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA is on the base model."""
        return hasattr(self.base, "peft_config")

    def merge_and_unload(self) -> FirstModel:
        """Merge LoRA into the base weights and drop the peft wrapper; routing goes on as before."""
        if self.has_adapter:
            self.base = self.base.merge_and_unload()
            self.merged = True
        return self

    @property
    def choices(self) -> Choices:
        """The policies that this model knows."""
        return Choices(
            self.routers,
            self.thresholds,
            self.baseline,
            self.layer_count,
            self.free_layers,
            highest_trained(self.training_record),
        )

    def policy_for(self, skip_rate: float | None = None, prefill: str = "skip") -> Policy:
        """Return the policy that meets a wanted skip rate (None: what was trained for)."""
        return RunAll() if id(self) in _RUN_ALL.get() else self.choices.at(skip_rate, prefill)

    def baseline_for(
        self, name: str, skip_rate: float, prefill: str = "skip", seed: int = 0
    ) -> Baseline:
        """Return a policy to compare with, on this model.

        Args:
            name: one of `config.BASELINES`. Static importance is only known to artifacts that were
                trained with it; the majority is that of this model's routers.
            skip_rate: share of layers to skip.
            prefill: prefill mode whose majority is meant.
            seed: of what is drawn; one that the model was trained with keeps its own.

        Raises:
            ConfigError: the model lacks what the policy needs.
        """
        return self.choices.named(name, skip_rate, prefill, seed)

    def new_state(
        self,
        prompt_mask: torch.Tensor,
        policy: Policy | None = None,
        skip_rate: float | None = None,
        prefill: str = "skip",
        gate: str = "hard",
        input_ids: torch.Tensor | None = None,
    ) -> RoutingState:
        """Start the decisions of a batch; `prompt_mask` and `input_ids` are [prompts, tokens].

        `input_ids` is for policies that draw by prompt, and may be left out for others.
        """
        if prefill not in PREFILL_MODES:
            raise ConfigError(f"prefill is {prefill!r}; expected 'skip' or 'full'.")
        if not self.routing.attached:
            raise ConfigError(
                "This model was detached, so nothing routes its layers; use the base model that "
                "detach() returned, or make a new FirstModel."
            )
        if policy is not None and skip_rate is not None:
            raise ConfigError("Both policy and skip_rate were given; give one of them.")
        if policy is None or id(self) in _RUN_ALL.get():
            policy = self.policy_for(skip_rate, prefill)
        if not callable(getattr(policy, "decide", None)):
            raise ConfigError(
                f"policy is {policy!r}; expected an object that decides, such as RunAll() or "
                "FixedMask(keep)."
            )
        locked = self.routing.stack.locked
        if isinstance(policy, FixedMask):
            policy.check(self.layer_count, locked)
        return RoutingState(
            policy,
            prompt_mask,
            self.layer_count,
            prefill,
            gate,
            locked,
            input_ids,
            self.routing.unit,
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        policy: Policy | None = None,
        prompt_mask: torch.Tensor | None = None,
        state: RoutingState | None = None,
        **kwargs: Any,
    ) -> tuple[Any, RoutingState]:
        """Run whole sequences under one mask per row, without a cache.

        Args:
            input_ids: [batch, tokens].
            attention_mask: [batch, tokens]; padding may be on either side.
            policy: what decides; default the routers.
            prompt_mask: [batch, tokens] bool, the tokens that are pooled; default all real ones.
            state: decisions to use, from `new_state` (policy and prompt_mask are then ignored).
            kwargs: passed to the base model.

        Returns:
            The base model's output and the decisions.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if state is None:
            pooled = attention_mask if prompt_mask is None else prompt_mask
            state = self.new_state(pooled, policy, input_ids=input_ids)
        with self.routing.tracing(state):
            output = self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=False,
                **self._positions(attention_mask) | kwargs,
            )
        return output, state

    def _positions(self, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the positions of padded rows, where the model takes any."""
        base = self.plain_base
        if "position_ids" not in inspect.signature(base.forward).parameters:
            return {}
        if bool(attention_mask.all()):
            return {}
        return {"position_ids": position_ids(attention_mask)}

    @torch.no_grad()
    def decide(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        policy: Policy | None = None,
        skip_rate: float | None = None,
        prefill: str = "skip",
    ) -> RoutingState:
        """Run prompts [batch, tokens] through the layers only and return what was decided."""
        input_ids, mask = take_prompts(
            input_ids, attention_mask, self.base.generation_config, self.device
        )
        state = self.new_state(mask, policy, skip_rate, prefill, input_ids=input_ids)
        base = self.plain_base
        with self.routing.tracing(state), processes.gathered(self):
            base.base_model(
                input_ids=input_ids,
                attention_mask=mask,
                use_cache=False,
                **self._positions(mask),
            )
        return state

    def engine_for(
        self, engine: str, weights: str, rows: int, cache: str = "dynamic"
    ) -> DecodeEngine | None:
        """Return what decodes a batch in transformers' place, or None.

        The first call compiles a step for one row, and the first for several rows another one,
        which takes from seconds to a minute; later calls, and mostly later processes, do not. The
        engine holds copies of the weights, LoRA added, and is made anew when they were changed by
        training (not through `.data`). While it is made, no other thread may use the model.

        Args:
            engine: "hf" or "fast".
            weights: number format of linear layers: "same", "int8" or "int4".
            rows: in the batch.
            cache: kind of cache that was asked for.

        Raises:
            ConfigError: there is no such engine, or it has no such option.
        """
        if engine not in ENGINES:
            raise ConfigError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}.")
        if engine == "hf":
            if weights != "same":
                raise ConfigError(f"weights={weights!r} needs engine='fast'.")
            return None
        if cache != "dynamic":
            raise ConfigError(
                f"engine='fast' allocates its own memory; leave the {cache} cache out, or use "
                "engine='hf'."
            )
        return self.engines.get(self.plain_base, weights, rows)

    def decode_by(self, engine: DecodeEngine | None, cache: SkipCache, longest: int) -> None:
        """Let an engine take over from a cache once its prompts have run."""
        if engine is None:
            return
        if cache.state.stepped is not None:
            raise ConfigError("A policy that lets layers go with each step needs engine='hf'.")
        cache.engine, cache.longest = engine, longest
        self.routing.decode_fast(self.plain_base)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        policy: Policy | None = None,
        skip_rate: float | None = None,
        prefill: str = "skip",
        engine: str = "hf",
        weights: str = "same",
        **generate_kwargs: Any,
    ) -> GenerateOutput:
        """Generate with transformers' `generate`, each prompt with its own layers.

        Args:
            input_ids: [batch, tokens], padded on either side.
            attention_mask: [batch, tokens]; without it, pad tokens are taken for padding where the
                model's generation config has a pad token that is not also EOS.
            policy: what decides which layers run; default the routers.
            skip_rate: share of layers to skip, met on average; needs a calibrated model.
            prefill: "skip" (skipped layers do not see the prompt) or "full".
            engine: what decodes: "hf", or "fast", which compiles the model's layers first (see
                `engine_for`) and, with weights="same", gives the same tokens, up to rounding.
            weights: number format in which "fast" keeps linear layers: "same", "int8" or "int4".
            generate_kwargs: everything transformers' `generate` takes; `cache_implementation` may
                be "dynamic" or "static"; `cache` (or `past_key_values`, as transformers called it
                before 5.24) continues an earlier output's `.cache`.

        Raises:
            ConfigError: options that cannot work together.
        """
        defaults = self.base.generation_config
        refuse_rollback(defaults, generate_kwargs)
        if engine != "hf":
            refuse_for_engine(defaults, generate_kwargs)
        for name in ("use_cache", "return_dict_in_generate"):
            generate_kwargs.pop(name, None)
        input_ids, attention_mask = take_prompts(input_ids, attention_mask, defaults, self.device)
        cache = take_cache(generate_kwargs)
        given = getattr(generate_kwargs.get("generation_config"), "cache_implementation", None)
        kind = generate_kwargs.pop("cache_implementation", None) or given or "dynamic"
        answers = asked("num_return_sequences", defaults, generate_kwargs) or 1
        decoder = self.engine_for(engine, weights, len(input_ids) * answers, kind)
        start = time.perf_counter()
        longest = longest_row(defaults, input_ids.shape[1], generate_kwargs)
        if cache is None:
            input_ids, attention_mask = pad_on_the_left(input_ids, attention_mask)
            state = self.new_state(attention_mask, policy, skip_rate, prefill, input_ids=input_ids)
            cache = make_cache(self.base.config, state, kind, longest)
        elif policy is not None or skip_rate is not None:
            raise ConfigError("A continued cache keeps its mask; leave policy and skip_rate unset.")
        state = cache.state
        state.begin(input_ids.shape[1])
        self.decode_by(decoder, cache, longest)
        # Some configs say use_cache=False (MPT, models that were trained), and transformers would
        # then feed whole sequences into the cache again and again. The cache is there already,
        # whatever the model's defaults ask for.
        ours = {"use_cache": True, "return_dict_in_generate": True, "cache_implementation": None}
        if isinstance(cache, StaticSkipCache):
            cache.check(self.plain_base, longest)
            # Otherwise transformers would compile the whole model around one mask.
            ours["disable_compile"] = generate_kwargs.pop("disable_compile", True)
        if generate_kwargs.get("generation_config") is not None:  # both together are deprecated
            config = generate_kwargs["generation_config"] = deepcopy(
                generate_kwargs["generation_config"]
            )
            config.update(**ours)
            # None gives way to the model's own default, unless it comes as an argument.
            fills_in = defaults.cache_implementation is not None
            ours = {"cache_implementation": None} if fills_in else {}
        if "logits_to_keep" in inspect.signature(self.plain_base.forward).parameters:
            # As an index: for a number transformers takes a strided view, for which the CPU copies
            # the vocabulary's matrix once a row, and where layers share keys and values it cuts
            # prompts to their last token, so that routers would see no more of them. A tensor
            # would be repeated for beams.
            generate_kwargs.setdefault("logits_to_keep", [-1])
        with self.routing.only_with_a_cache():
            hf = self.base.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                **{self.routing.stack.cache_argument: cache},
                **generate_kwargs,
                **ours,
            )
        end = time.perf_counter()
        first = state.first_token_at or end
        return GenerateOutput(
            sequences=hf.sequences,
            keep=state.keep,
            layer_calls=dict(state.layer_calls),
            ttft_s=first - start,
            decode_s=end - first,
            kv_bytes=cache.kv_bytes,
            cache=cache,
            hf=hf,
        )
