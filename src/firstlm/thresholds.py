# SPDX-License-Identifier: Apache-2.0
"""Thresholds: the logit offset that serves an asked skip rate; `calibration.py` measures them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from firstlm.errors import ConfigError

NEAR_ENOUGH = 0.01  # a rate this little outside the calibrated ones gets the nearest of them


@dataclass
class Thresholds:
    """Logit offsets that meet wanted skip rates, measured on validation prompts.

    `table[prefill]` lists (asked rate, offset, measured rate), rates rising, offsets falling.
    """

    table: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)

    def offset(self, rate: float, prefill: str) -> float:
        """Return the logit offset for a wanted skip rate, interpolated between measured ones."""
        rows = self.table.get(prefill)
        if not rows:
            raise ConfigError(
                f"This model has no thresholds for prefill={prefill!r}, so skip_rate={rate} cannot "
                "be promised. Run `firstlm calibrate` (or firstlm.calibrate) on validation prompts."
            )
        rates = [row[2] for row in rows]
        if not rates[0] - NEAR_ENOUGH <= rate <= rates[-1] + NEAR_ENOUGH:
            raise ConfigError(
                f"skip_rate={rate} is outside what was calibrated: {rates[0]:.2f} to "
                f"{rates[-1]:.2f}. Ask for a rate in between, or calibrate for more."
            )
        return float(np.interp(rate, rates, [row[1] for row in rows]))
