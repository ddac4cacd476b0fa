# SPDX-License-Identifier: Apache-2.0
"""How the rows of a summary are put together and called, in tables and in pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from firstlm.errors import DataError
from firstlm.scoreboard import LABELS

Row = Mapping[str, Any]

KEYS = {  # of a row
    *("file", "arm", "task", "dataset", "model", "routers_of", "policy", "lora"),
    *("lora_of", "skip_rate", "skip_rate_p5", "skip_rate_p95", "skip_rate_asked", "alpha", "l2"),
    *("distinct_masks", "mask_entropy", "length_correlation", "layer_length_correlation", "gains"),
    *("metric", "primary", "score", "ci95", "retention", "retention_ci95", "retention_of"),
    *("reference_score", "formats_differ", "unit", "prefill", "mask_of"),
    *("weights", "seeds", "n_test", "tpot_ratio", "tpot_ratio_spread", "kv_recomputed"),
}
GAIN_KEYS = {  # of one of its gains
    *("file", "arm", "dataset", "model", "routers_of", "policy", "lora_of"),
    *("value", "low", "high", "seeds", "skip_rate_above", "same_masks", "mask_of"),
    *("formats_differ", "unit", "prefill"),
}
NOTABLE = 0.005  # difference of two policies' measured skip rates that a table mentions
WHOLE = ("skip_decode", "token_level")  # policies that run prompts whole, however they were made


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


def arm_of(name: str) -> str:
    """Return the arm of results named FILE-ARM-SEED."""
    return name.partition("-")[2].rpartition("-")[0]


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a summary.

    Raises:
        DataError: it holds something else, or what an older version wrote.
    """
    try:
        rows = json.loads(file.read_bytes())
        if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
            raise ValueError("no list of rows")
        lacking = {key for row in rows for key in KEYS - row.keys()}
        gains = [gain for row in rows for gain in row.get("gains", ())]
        lacking |= {key for gain in gains for key in GAIN_KEYS - gain.keys()}
        if lacking:
            raise ValueError(f"rows without {', '.join(sorted(lacking))}")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is no summary of experiments, or one of another version ({error}). Remove it, "
            "and sum up all files anew: firstlm experiment summary FILES."
        ) from error
    return rows


def groups(rows: Sequence[Row]) -> dict[Section, list[Row]]:
    """Return rows by section."""
    found: dict[Section, list[Row]] = {}
    for row in rows:
        found.setdefault(Section(row["file"], row["dataset"]), []).append(row)
    return found


def title(section: Section, rows: Sequence[Row]) -> str:
    """Name a section: its file, test set, task and model."""
    models = dict.fromkeys(model_name(row) for row in rows)
    return f"{section.file}: {rows[0]['task']} on {section.dataset}, {' and '.join(models)}"


def model_name(row: Row) -> str:
    """Return the name of the model that a row is of, without its folder."""
    return Path(row["model"]).name.removesuffix(".gguf")


def metric_name(name: str) -> str:
    """Return how a metric is written."""
    return LABELS.get(name, name)


def named(policy: str) -> str:
    """Return how a policy is written."""
    return "FiRST" if policy == "first" else policy.replace("_", " ")


def from_elsewhere(row: Row) -> bool:
    """Tell whether routers decided that never saw the task of the test set in training."""
    return row["policy"] == "first" and row["dataset"] not in row["routers_of"].split("+")


def label(row: Row) -> str:
    """Name a policy and the LoRA it ran with, and what is not as usual.

    That is what its routers learnt from, which part of layers is skipped, and whether by answers
    alone.
    """
    policy, lora_of = row["policy"], row["lora_of"]
    if policy == "base":
        return "base + LoRA, all layers" if lora_of else "base model"
    shown = named(policy)
    if from_elsewhere(row):
        shown += f", routers of {row['routers_of']}"
    if row["unit"] != "block":
        shown += f", {row['unit']} alone"
    if row["prefill"] == "full" and policy not in WHOLE:
        shown += ", prompts whole"
    if lora_of is None:
        return f"{shown}, no LoRA"
    return shown if lora_of == policy else f"{shown}, LoRA of {named(lora_of)}"


def labelled(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return rows with their labels; where arms share one, it says which arm is meant."""
    one_file = len({row["file"] for row in rows}) == 1
    one_model = len({model_name(row) for row in rows}) == 1
    arms: dict[str, set[str]] = {}
    names = [label(row) + ("" if one_model else f" of {model_name(row)}") for row in rows]
    ids = [row["arm"] if one_file else f"{row['file']}-{row['arm']}" for row in rows]
    for name, arm in zip(names, ids, strict=True):
        arms.setdefault(name, set()).add(arm)
    return [
        (f"{name} ({arm})" if len(arms[name]) > 1 else name, row)
        for name, arm, row in zip(names, ids, rows, strict=True)
    ]


def recomputed(rows: Sequence[Row]) -> str:
    """Say what routing token by token would have to compute again; empty where none was scored."""
    shares = [
        f"{row['kv_recomputed']:.0%} at {row['skip_rate']:.0%} skipped"
        for row in rows
        if row["primary"] and row.get("kv_recomputed") is not None
    ]
    if not shares:
        return ""
    return (
        "Token by token, later tokens look at keys and values of layers that a token skips: "
        f"{', '.join(shares)}. So much of what is skipped is computed anyway."
    )


def gain_text(gain: Row) -> str:
    """Write one of a row's gains, and what else differs between the two that are compared."""
    text = f"{gain['value']:+.1f} ({gain['low']:+.1f} to {gain['high']:+.1f}), {seeds_text(gain)}"
    if abs(gain["skip_rate_above"]) >= NOTABLE:
        text += f", {100 * gain['skip_rate_above']:+.1f} points skipped"
    # Of several tasks at once these are not known.
    if gain.get("same_masks", 0) >= NOTABLE:
        text += f", same masks for {gain['same_masks']:.0%}"
    if gain.get("formats_differ"):
        text += ", number formats differ"
    return text


def metric_text(row: Row | None, primary: Row) -> str:
    """Write a metric beside the primary one of the same run; it may be of fewer seeds."""
    if row is None:
        return ""
    fewer = "" if row["seeds"] == primary["seeds"] else f" ({seeds_text(row)})"
    return f"{row['score']:.1f}{fewer}"


def seeds_text(row: Row) -> str:
    """Write how many seeds a row, or one of its gains, is of."""
    return "1 seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
