# SPDX-License-Identifier: Apache-2.0
"""Drive training towards wanted skip rates.

In phase 1 `alpha`, the weight of the non-skip penalty, follows the gap between wanted and measured
rate: a part in proportion to the gap, and a part that sums it up (PI control; the sum alone is dual
ascent). Where several rates are trained, each other rate has a logit offset of its own, driven by
its own gap, so that the routers learn an order of the layers instead of one cut. In phase 2 routers
are frozen, and every rate is met by its offset.
"""

from __future__ import annotations

import random
from typing import Any

from firstlm.config import TrainConfig

PRIMARY_SHARE = 0.5  # of batches that train the primary rate, where several are trained
MOMENTUM = 0.7  # of the running skip rate that the alpha driver looks at
# Adam moves logits at a speed that hardly depends on alpha's size, so a sum alone overshoots for as
# long as it took to build up; the proportional part turns round with the gap.
PROPORTION = 100  # of the proportional part to one step of the sum
OFFSET_STEP = 1.0  # logits per unit of the gap, per batch of the rate


class RateDriver:
    """Chooses a rate per batch, and learns from the measured rate.

    Args:
        config: `skip_rate`, `skip_rates`, `alpha`, `alpha_lr` and `seed` are read.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.primary = config.skip_rate
        self.others = [r for r in config.skip_rates or () if r != self.primary]
        self.alpha = self.integral = config.alpha
        self.step = config.alpha_lr
        self.offsets: dict[float, float] = dict.fromkeys(self.others, 0.0)
        self.holds = False
        self.running: float | None = None
        self._random = random.Random(config.seed)

    def hold(self, offsets: dict[float, float]) -> None:
        """Meet every rate by its offset from now on, and leave alpha alone (phase 2).

        Frozen routers cannot follow alpha; LoRA would have to move their input instead.
        """
        self.offsets = dict(offsets)
        self.holds = True

    @property
    def penalty(self) -> float:
        """The weight of the non-skip penalty: none where offsets hold the rates.

        LoRA could lower it only by moving what frozen routers read, and with it the masks.
        """
        return 0.0 if self.holds else self.alpha

    def start(self, logit_per_rate: float) -> None:
        """Guess the other rates' offsets from how far apart in logits layers are in rank."""
        for rate in self.offsets:
            self.offsets[rate] = logit_per_rate * ((self.primary or 0.0) - rate)

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
        if self.holds or rate != self.primary:
            self.offsets[rate] += OFFSET_STEP * (measured - rate)
            return
        before = self.running
        self.running = measured if before is None else MOMENTUM * before + (1 - MOMENTUM) * measured
        gap = rate - self.running
        self.integral += self.step * gap
        self.alpha = self.integral + PROPORTION * self.step * gap

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON."""
        version, internal, gauss = self._random.getstate()
        return {
            "alpha": self.alpha,
            "integral": self.integral,
            "running": self.running,
            "offsets": list(self.offsets.items()),
            "random": [version, list(internal), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.alpha, self.integral = state["alpha"], state["integral"]
        self.running = state["running"]
        self.offsets = {float(rate): float(offset) for rate, offset in state["offsets"]}
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
