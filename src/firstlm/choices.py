# SPDX-License-Identifier: Apache-2.0
"""What can decide about a prompt, by name and skip rate: an artifact's routers, and baselines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firstlm import artifact_files
from firstlm.baselines import Baseline, check_name
from firstlm.config import UNMEASURED, check_skip_rate
from firstlm.errors import ConfigError, FirstWarning
from firstlm.policies import FixedMask, Policy, RouterPolicy, RunAll
from firstlm.routers import Routers
from firstlm.thresholds import Thresholds

BEYOND = 0.05  # above the highest rate that was trained for, quality is another


@dataclass
class Choices:
    """Policies that an artifact knows; needs no model.

    Attributes:
        routers: the trained routers.
        thresholds: logit offsets that meet wanted skip rates.
        baseline: what the artifact has in place of routers, or None.
        layers: how many layers the model has.
        free: those that may be skipped.
        highest: the highest skip rate that was trained for, where that is known.
    """

    routers: Routers
    thresholds: Thresholds
    baseline: Baseline | None
    layers: int
    free: tuple[int, ...]
    highest: float | None = None

    @classmethod
    def read(cls, folder: Path, hidden_size: int) -> Choices:
        """Read those of an artifact all of whose layers may be skipped.

        Args:
            folder: the artifact.
            hidden_size: of its base model.
        """
        config = artifact_files.read_config(folder)
        router_config, table, baseline = artifact_files.parse(config, folder)
        layers, width = config["layers"], router_config.width(hidden_size)
        routers = Routers(layers, width, reads=router_config.reads)
        tensors = artifact_files.read_routers(folder)
        artifact_files.check_routers(tensors, layers, width, folder)
        routers.fill(tensors)
        highest = highest_trained(config.get("training"))
        return cls(routers, Thresholds(table), baseline, layers, tuple(range(layers)), highest)

    def at(self, skip_rate: float | None = None, prefill: str = "skip") -> Policy:
        """Return the policy that meets a wanted skip rate (None: what was trained for)."""
        if skip_rate is not None:
            if check_skip_rate(skip_rate) == 0:
                return RunAll()
            self._warn_of(skip_rate)
        if self.baseline is not None:
            return self.baseline.at(skip_rate)
        if skip_rate is None:
            return RouterPolicy(self.routers)
        return RouterPolicy(self.routers, self.thresholds.offset(skip_rate, prefill))

    def named(self, name: str, skip_rate: float, prefill: str = "skip", seed: int = 0) -> Baseline:
        """Return a baseline; see `FirstModel.baseline_for`."""
        check_name(name)
        self._warn_of(skip_rate)
        if self.baseline is not None and self.baseline.name == name:
            return replace(self.baseline, rate=skip_rate)
        orders = ()
        if name == "majority":
            orders = ((skip_rate, tuple(self.thresholds.majority(skip_rate, prefill))),)
        elif name not in UNMEASURED:
            raise ConfigError(
                f"This model knows no order for the policy {name!r}; train LoRA for it with "
                f"`firstlm train --policy {name}`."
            )
        return Baseline(name, self.layers, self.free, skip_rate, seed, orders)

    def _warn_of(self, skip_rate: float) -> None:
        """Warn of a rate with which nothing learnt to get along; its text is the same each time."""
        if self.highest is not None and skip_rate > self.highest + BEYOND:
            warnings.warn(
                f"This model was trained for skip rates up to {self.highest:g}, and quality may "
                "collapse above. To serve higher ones, train with --skip-rates.",
                FirstWarning,
                stacklevel=3,
            )

    def _mask(self, keep: Any, skip_layers: Any) -> list[bool] | None:
        if keep is not None and skip_layers is not None:
            raise ConfigError("Both keep and skip_layers were given; give one of them.")
        if skip_layers is not None:
            for i in _parts(skip_layers, "skip_layers", f"layers from 0 to {self.layers - 1}"):
                if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.layers:
                    raise ConfigError(
                        f"skip_layers names {i!r}; expected a list of layers from 0 to "
                        f"{self.layers - 1}."
                    )
            skipped = set(skip_layers)
            return [i not in skipped for i in range(self.layers)]
        if keep is None:
            return None
        for k in _parts(keep, "keep", f"true or false for each of {self.layers} layers"):
            if k not in (0, 1):
                raise ConfigError(
                    f"keep holds {k!r}; expected true or false for each of {self.layers} layers."
                )
        return [bool(k) for k in keep]

    def asked(
        self,
        policy: str | None = None,
        skip_rate: float | None = None,
        keep: Any = None,
        skip_layers: Any = None,
        prefill: str = "skip",
    ) -> Policy:
        """Return what a request asks for.

        Args:
            policy: "router" (None: that, or what the artifact has in its place), "run_all" or the
                name of a baseline.
            skip_rate: share of layers to skip; baselines need one.
            keep: a mask of its own: true or false (or 1 or 0) for each layer.
            skip_layers: in its place, the layers that do not run. Either goes without the others.
            prefill: prefill mode.

        Raises:
            ConfigError: the request contradicts itself, or asks for what is not known.
        """
        given = self._mask(keep, skip_layers)
        if given is not None:
            if policy is not None or skip_rate is not None:
                raise ConfigError("keep is a mask of its own; leave out policy and skip_rate.")
            mask = FixedMask(given)
            mask.check(self.layers, frozenset(range(self.layers)) - set(self.free))
            return mask
        if policy == "run_all":
            if skip_rate:
                raise ConfigError(
                    f"run_all skips no layers, but skip_rate is {skip_rate}; leave it out."
                )
            return RunAll()
        if policy in (None, "router"):
            return self.at(skip_rate, prefill)
        check_name(policy, "router", "run_all")
        if skip_rate is None:
            raise ConfigError(f"The policy {policy!r} needs a skip_rate, such as 0.25.")
        return self.named(policy, check_skip_rate(skip_rate), prefill).at()


def highest_trained(record: Mapping[str, Any] | None) -> float | None:
    """Return the highest skip rate that LoRA was trained for, of an artifact's training record."""
    run = (record or {}).get("run") or {}
    rates = [rate for rate in (run.get("skip_rate"), *(run.get("skip_rates") or ())) if rate]
    return max(rates) if rates and run.get("stage") != "routers" else None


def _parts(found: Any, name: str, expected: str) -> Sequence[Any]:
    if isinstance(found, (list, tuple)) and (found or name != "keep"):
        return found
    raise ConfigError(f"{name} is {str(found)[:99]!r}; expected {expected}.")
