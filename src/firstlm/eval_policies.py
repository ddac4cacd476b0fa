# SPDX-License-Identifier: Apache-2.0
"""What `firstlm eval` can score, by name; some policies are settled on the prompts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from firstlm.baselines import CountedSkip, OrderedSkip
from firstlm.config import BASELINES, DIAGNOSTICS, EVAL_POLICIES, RATED
from firstlm.data import spread_by_length
from firstlm.decisions import RoutingState, prompt_key
from firstlm.errors import ConfigError
from firstlm.inputs import pad_left
from firstlm.model import FirstModel
from firstlm.policies import Policy, RouterPolicy, RunAll, SteppedPolicy
from firstlm.probes import decide_all
from firstlm.thresholds import most_skipped_first
from firstlm.token_level import TokenLevel

TOKEN_LEVEL_PROMPTS = 32  # on which the offset of token-level routing is found


class MajorityHere(RouterPolicy):
    """Stands for the majority mask of the scored prompts until `settle` has measured it."""


def choose(
    model: FirstModel, policy: str | Policy, skip_rate: float | None, prefill: str, seed: int
) -> tuple[Policy, Any]:
    """Return the policy object, and the scope in which it is measured."""
    if policy == own_policy(model):
        return model.policy_for(skip_rate, prefill), nullcontext()
    if policy in BASELINES and skip_rate is not None:
        return model.baseline_for(str(policy), skip_rate, prefill, seed).at(), nullcontext()
    if policy in DIAGNOSTICS and skip_rate is not None and model.baseline is None:
        return _diagnostic(model, str(policy), skip_rate, prefill)
    if policy in RATED:
        needs = (
            f"an artifact without {own_policy(model)!r}"
            if skip_rate is not None or policy == "router"
            else "a skip_rate"
        )
        raise ConfigError(f"policy={policy!r} needs {needs}.")
    if skip_rate is not None:
        raise ConfigError(
            f"skip_rate={skip_rate} is for 'router' and baselines; {policy!r} has none."
        )
    if not isinstance(policy, str):
        return policy, nullcontext()
    known = {"base": (RunAll, model.disable_adapter), "run_all": (RunAll, nullcontext)}
    if policy not in known:
        raise ConfigError(f"policy is {policy!r}; expected one of {', '.join(EVAL_POLICIES)}.")
    make, scope = known[policy]
    return make(), scope()


def _diagnostic(
    model: FirstModel, policy: str, skip_rate: float, prefill: str
) -> tuple[Policy, Any]:
    """Return one of `config.DIAGNOSTICS`, to be settled, and its scope."""
    if policy == "majority_here":
        return MajorityHere(
            model.routers, model.thresholds.offset(skip_rate, prefill)
        ), nullcontext()
    stack = model.routing.stack
    if model.routing.unit != "block" or prefill != "skip":
        raise ConfigError("policy='token_level' needs unit='block' and prefill='skip'.")
    found = TokenLevel(model.routers, stack.modules, stack.locked, skip_rate)
    return found, found.applied()


def settle(
    policy: Policy,
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    prefill: str,
    batch_size: int,
) -> Policy:
    """Return a policy that knows the prompts it is scored on, where that makes a difference."""
    if isinstance(policy, TokenLevel):
        ids, mask = pad_left(spread_by_length(prompts, TOKEN_LEVEL_PROMPTS), model.pad_id)
        policy.fit(lambda: model.decide(ids, mask, policy), mask)
    elif isinstance(policy, MajorityHere):
        keep = decide_all(model, prompts, policy, prefill, batch_size)
        skipped = (~keep).float().mean(0)
        order = most_skipped_first(skipped.tolist())
        free = [layer for layer in order if layer in model.free_layers]
        policy = OrderedSkip(free, model.layer_count, float(skipped.mean()))
    if isinstance(policy, CountedSkip):
        return policy.meeting([prompt_key(prompt) for prompt in prompts])
    return policy


class Usage(NamedTuple):
    """What a policy left out of each of some rows.

    Attributes:
        keep: [rows, layers], of the whole row, or of most of its tokens.
        rates: skip rates.
        weights: what each rate counts in a mean.
        kv_recomputed: see `token_level.usage`; empty for policies that need nothing again.
    """

    keep: torch.Tensor
    rates: list[float]
    weights: list[int]
    kv_recomputed: list[float]


def usage(policy: Policy, state: RoutingState, mask: torch.Tensor, steps: Sequence[int]) -> Usage:
    """Return what was left out of the rows of a batch.

    Args:
        policy: what decided.
        state: its decisions.
        mask: of the prompts [rows, tokens], False on padding.
        steps: decode steps of each row's own answer.
    """
    if isinstance(policy, TokenLevel):
        tokens = [prompt + step for prompt, step in zip(mask.sum(1).tolist(), steps, strict=True)]
        keep, rates, recomputed = policy.take(mask, steps)
        return Usage(keep, rates, tokens, recomputed)
    # A mask that holds for the whole answer counts once a prompt, others by decode steps.
    weights = list(steps) if state.stepped is not None else [1] * len(steps)
    return Usage(state.keep_after(steps), state.skip_rates(steps), weights, [])


def saves_time(policy: Policy) -> bool:
    """Whether time per token means something: layers are left out, as many at every step."""
    return not isinstance(policy, SteppedPolicy | TokenLevel)


def own_policy(model: FirstModel) -> str:
    """Return the name of what decides in an artifact: routers, or the policy it was trained for."""
    return model.baseline.name if model.baseline else "router"


def run_name(policy: str | Policy, skip_rate: float | None) -> str:
    """Return the name of a run, such as base or router@0.25."""
    kind = policy if isinstance(policy, str) else type(policy).__name__
    return kind if skip_rate is None else f"{kind}@{skip_rate:g}"
