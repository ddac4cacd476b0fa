# SPDX-License-Identifier: Apache-2.0
"""A table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a table."""
    rows = [names, ["---"] * len(names), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]
