# SPDX-License-Identifier: Apache-2.0
"""How the rows of a summary are put together and called, in tables and in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from firstlm.scoreboard import LABELS

Row = Mapping[str, Any]


class Section(NamedTuple):
    """What is shown together: one experiment file on one test set."""

    file: str
    dataset: str

    @classmethod
    def of(cls, name: str, data: str) -> Section:
        """Return where results named FILE-ARM-SEED, of the test set in this file, belong."""
        return cls(name.partition("-")[0], Path(data).parent.name)

    def __str__(self) -> str:
        """Return a name for files."""
        return self.file if self.file == self.dataset else f"{self.file}-{self.dataset}"


def groups(rows: Sequence[Row]) -> dict[Section, list[Row]]:
    """Return rows by section."""
    found: dict[Section, list[Row]] = {}
    for row in rows:
        found.setdefault(Section(row["arm"].partition("-")[0], row["dataset"]), []).append(row)
    return found


def title(section: Section, rows: Sequence[Row]) -> str:
    """Name a section: its file, test set, task and model."""
    model = Path(str(rows[0]["model"])).stem
    return f"{section.file}: {rows[0]['task']} on {section.dataset}, {model}"


def metric_name(name: str) -> str:
    """Return how a metric is written."""
    return LABELS.get(name, name)


def label(policy: str, lora_of: str | None) -> str:
    """Name a policy and the LoRA it ran with."""
    if policy == "base":
        return "base + LoRA, all layers" if lora_of else "base model"
    shown = "FiRST" if policy == "first" else policy.replace("_", " ")
    if lora_of is None:
        return f"{shown}, no LoRA"
    return shown if lora_of == policy else f"{shown}, LoRA of {label(lora_of, lora_of)}"


def labelled(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return rows with their labels; where arms share one, it says which arm is meant."""
    one_file = len({row["arm"].partition("-")[0] for row in rows}) == 1
    arms: dict[str, set[str]] = {}
    names = [label(row["policy"], row["lora_of"]) for row in rows]
    for name, row in zip(names, rows, strict=True):
        arms.setdefault(name, set()).add(row["arm"])
    return [
        (f"{name} ({row['arm'].partition('-')[2] if one_file else row['arm']})", row)
        if len(arms[name]) > 1
        else (name, row)
        for name, row in zip(names, rows, strict=True)
    ]
