# SPDX-License-Identifier: Apache-2.0
"""The loop: run the prompt, take one step, stream tokens with their times.

Knows token ids only, no text. It takes the same tokens as `FirstModel.generate`, greedily or by
sampling, and reads nothing but the end-of-sequence ids off the model's generation config; beams and
logits processors are transformers' own, through `FirstModel.generate`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firstlm.cache import SkipCache, StaticSkipCache, make_cache
from firstlm.decisions import RoutingState
from firstlm.errors import ConfigError
from firstlm.inputs import pad_on_the_left, position_ids, take_prompts
from firstlm.model import FirstModel
from firstlm.policies import Policy

COLDEST = 1e-6  # temperatures below it take the likeliest token


@dataclass
class Decoding:
    """Where a batch stands between two steps.

    Attributes:
        cache: keys, values and decisions of every row.
        attention_mask: [batch, tokens so far], prompt padding on the left.
        position_ids: [batch, 1] of the last token, or None where the model counts by itself.
        logits: [batch, vocab] for the next token.
    """

    cache: SkipCache
    attention_mask: torch.Tensor
    position_ids: torch.Tensor | None
    logits: torch.Tensor

    @property
    def state(self) -> RoutingState:
        """The decisions of the batch."""
        return self.cache.state


@dataclass(frozen=True)
class Token:
    """One step of a stream.

    Attributes:
        ids: [batch] on the CPU; rows that were done before give the pad token.
        seconds: since the call, less the time that the stream's reader took between tokens.
        done: [batch] bool on the CPU: rows that have ended, with this token or before.
        decoding: where the batch stands: `.state.keep`, `.state.layer_calls`, `.cache.kv_bytes`.
    """

    ids: torch.Tensor
    seconds: float
    done: torch.Tensor
    decoding: Decoding


@torch.no_grad()
def prefill(
    model: FirstModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    policy: Policy | None = None,
    skip_rate: float | None = None,
    prefill: str = "skip",
    cache: str = "dynamic",
    max_new_tokens: int = 128,
    engine: str = "hf",
    weights: str = "same",
) -> Decoding:
    """Run prompts [batch, tokens] and decide which layers each of them runs from here on.

    Args:
        model: a routed model.
        input_ids: [batch, tokens], padded on either side.
        attention_mask: [batch, tokens]; as in `FirstModel.generate` where it is left out.
        policy: what decides; default the routers.
        skip_rate: share of layers to skip, met on average; needs a calibrated model.
        prefill: "skip" (skipped layers do not see the prompt) or "full".
        cache: "dynamic" or "static".
        max_new_tokens: decode steps that a static cache, or the fast engine, has room for.
        engine: what decodes: "hf" or "fast", as in `FirstModel.generate`.
        weights: number format of "fast".
    """
    prompts = take_prompts(input_ids, attention_mask, model.base.generation_config, model.device)
    input_ids, attention_mask = pad_on_the_left(*prompts)
    state = model.new_state(attention_mask, policy, skip_rate, prefill, input_ids=input_ids)
    longest = input_ids.shape[1] + max_new_tokens
    kv = make_cache(model.base.config, state, cache, longest)
    model.decode_by(model.engine_for(engine, weights, len(input_ids), cache), kv, longest)
    base = model.plain_base
    takes = inspect.signature(base.forward).parameters
    if isinstance(kv, StaticSkipCache):
        kv.check(base, longest)
        if "position_ids" not in takes:  # BLOOM's alibi, for one, is as long as the mask
            raise ConfigError(
                f"{type(base).__name__} reads positions off its attention mask, which does not fit "
                "a static cache in this loop; use a dynamic one, or FirstModel.generate."
            )
    extra: dict[str, Any] = {}
    if "logits_to_keep" in takes:
        extra["logits_to_keep"] = torch.tensor([-1], device=input_ids.device)  # see model.generate
    positions = None
    if "position_ids" in takes:
        extra["position_ids"] = positions = position_ids(attention_mask)
    output = model.base(
        input_ids=input_ids,
        attention_mask=attention_mask,
        **{model.routing.stack.cache_argument: kv},
        use_cache=True,
        **extra,
    )
    last = None if positions is None else positions[:, -1:]
    return Decoding(kv, attention_mask, last, output.logits[:, -1])


@torch.no_grad()
def decode_step(model: FirstModel, decoding: Decoding, token_ids: torch.Tensor) -> torch.Tensor:
    """Append one token to every row and return the logits [batch, vocab] of the next.

    `token_ids` is [batch]; `decoding` moves on in place.
    """
    mask, cache = decoding.attention_mask, decoding.cache
    token_ids = token_ids.to(mask.device)
    if isinstance(cache, StaticSkipCache) and mask.shape[1] >= cache.room:
        raise ConfigError(
            f"The static cache is full with {cache.room} tokens; raise prefill's max_new_tokens."
        )
    decoding.attention_mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    logits = cache.step(token_ids, mask)
    if logits is not None:
        decoding.logits = logits
        return logits
    extra: dict[str, Any] = {}
    if decoding.position_ids is not None:
        decoding.position_ids = extra["position_ids"] = decoding.position_ids + 1
    output = model.base(
        input_ids=token_ids.unsqueeze(1),
        attention_mask=decoding.attention_mask,
        **{model.routing.stack.cache_argument: cache},
        use_cache=True,
        **extra,
    )
    decoding.logits = output.logits[:, -1]
    return decoding.logits


_run_prompt = prefill  # `stream` has an option of that name


def stream(
    model: FirstModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    policy: Policy | None = None,
    skip_rate: float | None = None,
    prefill: str = "skip",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_ids: int | Sequence[int] | None = None,
    cache: str = "dynamic",
    engine: str = "hf",
    weights: str = "same",
) -> Iterator[Token]:
    """Yield tokens as they come, until every row is done or `max_new_tokens` are there.

    Args:
        model: a routed model.
        input_ids: [batch, tokens], padded on either side.
        attention_mask: [batch, tokens].
        policy: what decides which layers run; default the routers.
        skip_rate: share of layers to skip; needs a calibrated model.
        prefill: "skip" or "full".
        max_new_tokens: steps to take at most.
        temperature: 0 takes the likeliest token, above 0 samples.
        top_p: sample from the likeliest tokens that make up this share.
        seed: of sampling; None goes on from torch's own generator.
        eos_token_ids: ids that end a row; default the model's own; () never ends one.
        cache: "dynamic" or "static".
        engine: what decodes: "hf" or "fast", as in `FirstModel.generate`.
        weights: number format of "fast".
    """
    check_sampling(max_new_tokens, temperature, top_p)
    model.engine_for(engine, weights, len(input_ids), cache)  # compiling is no part of an answer
    start = time.perf_counter()
    ends = end_ids(model, eos_token_ids)
    pad = _pad_id(model, ends)
    generator = None
    if seed is not None:
        generator = torch.Generator(model.device).manual_seed(seed)
    decoding = _run_prompt(
        model,
        input_ids,
        attention_mask,
        policy,
        skip_rate,
        prefill,
        cache,
        max_new_tokens,
        engine,
        weights,
    )
    done = torch.zeros(len(input_ids), dtype=torch.bool)
    ids: torch.Tensor | None = None
    for _ in range(max_new_tokens):
        if ids is not None:
            decode_step(model, decoding, ids)
        ids = pick(decoding.logits, temperature, top_p, generator).cpu()
        ids = ids.masked_fill(done, pad)
        done = done | torch.isin(ids, ends)
        now = time.perf_counter()
        yield Token(ids, now - start, done, decoding)
        start += time.perf_counter() - now
        if bool(done.all()):
            return


def pick(
    logits: torch.Tensor,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Choose one token [batch] from logits [batch, vocab]."""
    if temperature < COLDEST:
        return logits.argmax(-1)
    logits = logits.float()
    # Of quotients that are too large softmax makes NaN, so none is above 0.
    shares = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = shares.sort(-1, descending=True)
        # A token stays if those before it do not make up the share yet.
        gone = ordered.cumsum(-1) - ordered >= top_p
        gone[..., 0] = False  # in float32 a share may be too small to be above 0
        ordered = ordered.masked_fill(gone, 0.0)
        shares = torch.zeros_like(shares).scatter(-1, order, ordered)
    return torch.multinomial(shares, 1, generator=generator).squeeze(-1)


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse options of sampling that cannot work."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; expected 1 or more.")
    if not temperature >= 0:
        raise ConfigError(f"temperature is {temperature}; expected 0 or more.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; expected a share above 0 and up to 1.")


def end_ids(model: FirstModel, ids: int | Sequence[int] | None) -> torch.Tensor:
    """Return the ids that end a row, by default those of transformers' `generate`."""
    if ids is None:
        config: Any = model.base.generation_config
        ids = config.eos_token_id
    if ids is None:
        ids = ()
    return torch.tensor([ids] if isinstance(ids, int) else list(ids), dtype=torch.long)


def _pad_id(model: FirstModel, ends: torch.Tensor) -> int:
    """Return the id with which ended rows go on, as transformers' `generate` chooses it."""
    config: Any = model.base.generation_config
    pad = config.pad_token_id
    if pad is not None:
        return int(pad)
    return int(ends[0]) if len(ends) else 0
