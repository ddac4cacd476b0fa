# SPDX-License-Identifier: Apache-2.0
"""A table as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Return a table.

    Raises:
        ValueError: a line has more or fewer cells than there are names.
    """
    if ragged := [line for line in lines if len(line) != len(names)]:
        raise ValueError(f"expected {len(names)} cells ({', '.join(names)}), found {ragged[0]}")
    rows = [names, ["---"] * len(names), *lines]
    return [f"| {' | '.join(row)} |" for row in rows]
