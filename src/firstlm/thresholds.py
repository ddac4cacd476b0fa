# SPDX-License-Identifier: Apache-2.0
"""Thresholds: the logit offset that serves an asked skip rate; `calibration.py` measures them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from firstlm.errors import ConfigError

NEAR_ENOUGH = 0.01  # a rate this little outside the calibrated ones gets the nearest of them


class Threshold(NamedTuple):
    """What one logit offset did to the validation prompts.

    Attributes:
        asked: the skip rate that was wanted.
        offset: the logit offset that comes closest to it.
        rate: the skip rate that was measured with it.
        skipped: share of the prompts that skipped each layer [layers].
    """

    asked: float
    offset: float
    rate: float
    skipped: tuple[float, ...] = ()


def most_skipped_first(skipped: Sequence[float]) -> list[int]:
    """Return all layers, those first that most prompts skipped; `skipped` is [layers]."""
    return sorted(range(len(skipped)), key=lambda layer: -skipped[layer])


@dataclass
class Thresholds:
    """Logit offsets that meet wanted skip rates, measured on validation prompts.

    `table[prefill]` holds them with rates rising and offsets falling.
    """

    table: dict[str, list[Threshold]] = field(default_factory=dict)

    def majority(self, rate: float, prefill: str) -> list[int]:
        """Return all layers, those first that most prompts skipped at the rate nearest to this."""
        return most_skipped_first(self.skipped(rate, prefill))

    def skipped(self, rate: float, prefill: str) -> tuple[float, ...]:
        """Return the share of prompts that skip each layer at the measured rate nearest to this."""
        rows = [row for row in self.table.get(prefill, []) if row.skipped]
        if not rows:
            raise ConfigError(
                f"Which layers most prompts skip was not measured for prefill={prefill!r}. Run "
                "`firstlm calibrate` (or firstlm.calibrate) on validation prompts."
            )
        return min(rows, key=lambda row: abs(row.rate - rate)).skipped

    def serve(self, rates: Sequence[float], prefill: str) -> bool:
        """Whether all of some skip rates lie within what was measured."""
        rows = self.table.get(prefill)
        if not rows:
            return False
        low, high = rows[0].rate - NEAR_ENOUGH, rows[-1].rate + NEAR_ENOUGH
        return all(low <= rate <= high for rate in rates)

    def offset(self, rate: float, prefill: str) -> float:
        """Return the logit offset for a wanted skip rate, interpolated between measured ones."""
        rows = self.table.get(prefill)
        if not rows:
            raise ConfigError(
                f"This model has no thresholds for prefill={prefill!r}, so skip_rate={rate} cannot "
                "be promised. Run `firstlm calibrate` (or firstlm.calibrate) on validation prompts."
            )
        rates = [row.rate for row in rows]
        if not self.serve([rate], prefill):
            raise ConfigError(
                f"skip_rate={rate} is outside what was calibrated: {rates[0]:.2f} to "
                f"{rates[-1]:.2f}. Ask for a rate in between, or calibrate for more."
            )
        return float(np.interp(rate, rates, [row.offset for row in rows]))
