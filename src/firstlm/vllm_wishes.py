# SPDX-License-Identifier: Apache-2.0
"""What a request to vLLM may ask of the routers, and the decisions of requests. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firstlm.choices import Choices
from firstlm.config import PREFILL_MODES
from firstlm.decisions import RoutingState
from firstlm.errors import ConfigError
from firstlm.policies import FixedMask, Policy, Prompts, RouterPolicy, RunAll, SteppedPolicy


@dataclass(frozen=True)
class Wish:
    """What a request asks for.

    Attributes:
        policy: what decides.
        prefill: "skip" or "full".
        salt: equal for requests whose keys and values may stand in for one another's; None where
            nothing may be shared: the mask depends on the prompt, or holds for the answer alone.
    """

    policy: Policy
    prefill: str
    salt: str | None


def wish(extra: Mapping[str, Any] | None, choices: Choices, prefill: str) -> Wish:
    """Read a request's `vllm_xargs` (`SamplingParams.extra_args`).

    Args:
        extra: `skip_rate`, `policy`, `prefill`, and a mask: `keep` (per layer) or `skip_layers`.
            Other names are others' and left alone.
        choices: what can decide.
        prefill: the mode of requests that do not say.

    Raises:
        ConfigError: it contradicts itself or asks for what the artifact does not have.
    """
    extra = extra or {}
    mode = extra.get("prefill", prefill)
    if mode not in PREFILL_MODES:
        raise ConfigError(f"prefill is {mode!r}; expected 'skip' or 'full'.")
    if mode == "skip" and prefill == "full":
        raise ConfigError(
            "prefill='skip' needs whole prompts, and this server reads them in chunks; start it "
            "without first_prefill=full."
        )
    skip_rate, name = extra.get("skip_rate"), extra.get("policy")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"policy is {name!r}; expected a name, such as 'router' or 'run_all'.")
    policy = choices.asked(name, skip_rate, extra.get("keep"), extra.get("skip_layers"), mode)
    if isinstance(policy, SteppedPolicy):
        raise ConfigError("Policies that let layers go as the answer grows are not served by vLLM.")
    return Wish(policy, mode, _salt(policy, mode))


def _salt(policy: Policy, prefill: str) -> str | None:
    """Return what tells masks apart that are known before the prompt is.

    With prefill="full" an answer's tokens have no keys where they skipped, and a later prompt that
    holds the answer must not find them.
    """
    if isinstance(policy, RunAll) or (isinstance(policy, FixedMask) and policy.keep.all()):
        return "all"
    if isinstance(policy, FixedMask) and prefill == "skip":
        return "".join("01"[k] for k in policy.keep.tolist())
    return None


class Decisions:
    """Which layers each request runs, from its prompt to its end, preemption included.

    Args:
        choices: what can decide.
        prefill: mode of requests that do not say.
        agree: makes what a policy answered the same on all ranks.
    """

    def __init__(
        self,
        choices: Choices,
        prefill: str = "skip",
        agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.choices, self.prefill, self.agree = choices, prefill, agree
        self._states: dict[str, RoutingState] = {}
        self._made: dict[str, list[bool]] = {}

    def of(
        self,
        request: str,
        extra: Mapping[str, Any] | None,
        prompt: Sequence[int] | None,
        length: int,
    ) -> RoutingState:
        """Return a request's decisions, made or to be made.

        Args:
            request: its id.
            extra: its `vllm_xargs`; checked when it was admitted.
            prompt: its token ids, for policies that draw by prompt.
            length: tokens of the prompt.
        """
        state = self._states.get(request)
        if state is None:
            asked = wish(extra, self.choices, self.prefill)
            policy = asked.policy
            if self.agree is not None and isinstance(policy, RouterPolicy):
                policy = _Agreed(policy, self.agree)
            ids = None if prompt is None else torch.tensor([list(prompt)])
            state = self._states[request] = RoutingState(
                policy,
                torch.ones(1, length, dtype=torch.bool),
                self.choices.layers,
                asked.prefill,
                prompt_ids=ids,
            )
        return state

    def made(self, request: str) -> list[bool] | None:
        """Return which layers a request runs; None before all are decided."""
        state = self._states.get(request)
        if state is not None and state.complete and request not in self._made:
            self._made[request] = state.keep[0].tolist()
        return self._made.get(request)

    def forget(self, request: str) -> None:
        """Drop a request that ended."""
        self._states.pop(request, None)
        self._made.pop(request, None)

    def __len__(self) -> int:
        return len(self._states)


class _Agreed:
    """A policy whose answers are those of rank 0: one that flipped would leave ranks waiting."""

    def __init__(self, policy: Policy, agree: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.policy, self.agree = policy, agree

    def decide(self, layer: int, prompts: Prompts) -> torch.Tensor:
        return self.agree(self.policy.decide(layer, prompts))
