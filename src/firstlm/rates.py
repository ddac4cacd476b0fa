# SPDX-License-Identifier: Apache-2.0
"""Drive training towards wanted skip rates.

`alpha`, the weight of the non-skip penalty, is raised while fewer layers are skipped than wanted
and lowered while more are (dual ascent). Where several rates are trained, each other rate has a
logit offset of its own, driven the same way, so that the routers learn an order of the layers
instead of one cut.
"""

from __future__ import annotations

import random
from typing import Any

from firstlm.config import TrainConfig

PRIMARY_SHARE = 0.5  # of batches that train the primary rate, where several are trained
MOMENTUM = 0.8  # of the running skip rate that the alpha driver looks at


class RateDriver:
    """Chooses a rate per batch, and learns from the measured rate.

    Args:
        config: `skip_rate`, `skip_rates`, `alpha`, `alpha_lr` and `seed` are read.
        drive: adapt alpha and offsets (False: alpha stays as given).
    """

    def __init__(self, config: TrainConfig) -> None:
        self.primary = config.skip_rate
        self.others = [r for r in config.skip_rates or () if r != self.primary]
        self.alpha = config.alpha
        self.step = config.alpha_lr
        self.offsets: dict[float, float] = dict.fromkeys(self.others, 0.0)
        self.running: float | None = None
        self._random = random.Random(config.seed)

    def start(self, logit_per_rate: float) -> None:
        """Guess the other rates' offsets from how far apart in logits layers are in rank."""
        for rate in self.offsets:
            self.offsets[rate] = logit_per_rate * ((self.primary or 0.0) - rate)

    def take_over(self, record: dict[str, Any]) -> None:
        """Go on from where an earlier phase's driver ended (its `alpha` and `offsets`)."""
        self.alpha = record.get("alpha") or self.alpha
        for rate, offset in (record.get("offsets") or {}).items():
            if float(rate) in self.offsets:
                self.offsets[float(rate)] = offset

    def sample(self) -> float | None:
        """Return the rate to train in the next batch; None where alpha is set by hand."""
        if self.others and self._random.random() >= PRIMARY_SHARE:
            return self._random.choice(self.others)
        return self.primary

    def offset(self, rate: float | None) -> float:
        """Return the logit offset that serves a rate (0 for the primary one)."""
        return self.offsets.get(rate, 0.0) if rate is not None else 0.0

    def update(self, rate: float | None, measured: float) -> None:
        """Learn from the share of layers that a batch of the given rate really skipped."""
        if rate is None:
            return
        if rate != self.primary:
            self.offsets[rate] += 20 * self.step * (measured - rate)
            return
        before = self.running
        self.running = measured if before is None else MOMENTUM * before + (1 - MOMENTUM) * measured
        # Proportional to the error and, against oscillation, to the speed with which it closes.
        speed = 0.0 if before is None else self.running - before
        self.alpha += self.step * ((rate - self.running) - 4 * speed)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON."""
        version, internal, gauss = self._random.getstate()
        return {
            "alpha": self.alpha,
            "running": self.running,
            "offsets": list(self.offsets.items()),
            "random": [version, list(internal), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.alpha, self.running = state["alpha"], state["running"]
        self.offsets = {float(rate): float(offset) for rate, offset in state["offsets"]}
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
