# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: quality, time, layers, router outputs, sensitivity, training."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from firstlm.masks import from_bits
from firstlm.sections import Row, Section, arm_of, groups, labelled, metric_name

COLORS = {
    "first": "#0b6e99",
    "length_only": "#06b6d4",
    "majority": "#7c3aed",
    "random": "#dc2626",
    "random_interior": "#f59e0b",
    "random_fixed": "#78350f",
    "unified": "#15803d",
    "early_exit": "#ec4899",
    "static_importance": "#84cc16",
    "skip_decode": "#111827",
}
SPARE_COLORS = ("#475569", "#2dd4bf", "#c084fc", "#1d4ed8", "#ca8a04", "#991b1b", "#94a3b8")
PLAIN_COLOR = "#6b7280"  # of plain LoRA
DASHES = ((0, (6, 3)), (0, (3, 2)), (0, (10, 4)))  # of plain LoRA, arm for arm
MARKS = "osD^v"
CROWD = 4  # policies with one point each, from which on they stand beside the curves
WIDE = 28  # letters of a label, from which on two columns of them are enough
LENGTH_GROUPS = 4  # of prompts, from short to long
SWEPT = {"alpha": "alpha, weight of the non-skip penalty", "l2": "lambda, weight of the L2 penalty"}
ALIKE = ("model", "unit", "prefill", "weights")  # in all points of a sweep


class Picture(NamedTuple):
    """A PNG picture, where it belongs, and whether only those who look closer want it."""

    name: str
    section: Section
    png: bytes
    caption: str
    detail: bool = False


def draw(rows: Sequence[Row], reports: Mapping[str, Any]) -> list[Picture]:
    """Return the pictures, in the order in which a page shows them.

    Args:
        rows: of a summary.
        reports: what `firstlm eval` wrote, by FILE-ARM-SEED.
    """
    sections, arms = groups(rows), {(row["file"], row["arm"]) for row in rows}
    pictures = [one for section, found in sections.items() for one in _of_rows(section, found)]
    reports = {
        name: report
        for name, report in reports.items()
        if (section := Section.of(name, report["inputs"]["data"])) in sections
        and (section.file, arm_of(name)) in arms
    }
    masks: dict[tuple[Section, int], dict[str, np.ndarray]] = {}
    shown: set[tuple[Section, str, str]] = set()
    for name, report in reports.items():
        section, arm = Section.of(name, report["inputs"]["data"]), arm_of(name)
        for run, result in report["runs"].items():
            if run.startswith("router"):
                keep = from_bits([item["keep"] for item in result["items"]])
                depth = section, keep.shape[1]  # a file may compare models
                masks.setdefault(depth, {})[f"{name}, {run}"] = keep.mean(0)
                if (section, arm, run) not in shown:  # one seed of each is enough to look at
                    shown.add((section, arm, run))
                    pictures += _of_run(section, name, run, result)
    depths = Counter(section for section, _ in masks)
    for (section, depth), found in masks.items():
        caption = "Share of prompts that run each layer: every artifact and rate."
        name = f"masks-{section}" + (f"-{depth}-layers" if depths[section] > 1 else "")
        pictures.append(Picture(name, section, _masks(found), caption))
    for section, found in curves(reports).items():
        caption = (
            "Cross-entropy while LoRA trains, of batches (faint) and validation rows, at the skip "
            "rate asked for; one line a seed."
        )
        png = _training(found, arm_colors(sections[section]))
        pictures.append(Picture(f"training-{section}", section, png, caption))
    return pictures


def _of_rows(section: Section, rows: Sequence[Row]) -> list[Picture]:
    """Return the pictures of a summary's rows of one section."""
    primary = [row for row in rows if row["primary"]]
    asked = [row for row in primary if row["skip_rate_asked"] is not None]
    timed = [row for row in asked if row["tpot_ratio"] is not None]
    found, colors = [], arm_colors(rows)
    if asked:
        caption = (
            "Quality against the share of layers skipped. Bars are 95% intervals over items and "
            "seeds."
        )
        found.append(Picture(f"quality-{section}", section, _quality(asked, colors), caption))
    if timed:
        caption = (
            "Quality against measured time per token, as a share of that with all layers of the "
            "same model, batch 1. Bars across are the 5th and 95th percentile over prompts."
        )
        png = _quality(timed, colors, "tpot_ratio", "time per token, % of all layers")
        found.append(Picture(f"time-{section}", section, png, caption))
    for name in SWEPT:
        if points := swept(primary, name):
            caption = f"What {SWEPT[name]}, does to routers."
            png = _sensitivity(points, name)
            found.append(Picture(f"{name}-{section}", section, png, caption))
    return found


def _of_run(section: Section, name: str, run: str, result: Row) -> list[Picture]:
    """Return the pictures of one run of routers."""
    found, file = [], f"{name}-{run.replace('@', '-')}"
    if "prompt_tokens" in result["items"][0]:
        caption = f"{name}, {run}: share of prompts that run each layer, by their length."
        found.append(Picture(f"layers-{file}", section, _layers(result["items"]), caption, True))
    if "rho_histogram" in result:
        caption = (
            f"{name}, {run}: what routers say about each layer, as a share of the prompts. Below "
            "0.5 the layer is skipped."
        )
        png = _outputs(np.array(result["rho_histogram"]))
        found.append(Picture(f"outputs-{file}", section, png, caption, True))
    return found


def swept(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the rows of a sweep over `name`, all else being equal; none where there is none.

    A sweep has three values or more, of routers without LoRA at thresholds of 0.5.
    """
    (other,) = SWEPT.keys() - {name}
    found: dict[tuple[str, ...], dict[float, Row]] = {}
    for row in rows:
        fixed = row["skip_rate_asked"] is None and row["alpha"] is not None and not row["lora"]
        if row["primary"] and fixed:
            alike = tuple(str(row[key]) for key in (other, *ALIKE))
            found.setdefault(alike, {}).setdefault(row[name], row)
    longest = max(found.values(), key=len, default={})
    return [longest[value] for value in sorted(longest)] if len(longest) > 2 else []


def curves(reports: Mapping[str, Any]) -> dict[Section, dict[str, list[Row]]]:
    """Return how training went, by section and arm; one entry a seed.

    Arms that score the artifact of another, or balance it, have had no training of their own.
    """
    found: dict[Section, dict[str, list[Row]]] = {}
    for name, report in reports.items():
        if Path(report["inputs"].get("artifact", name)).name != name:
            continue
        training = report.get("training", {})
        if "balance" in training:
            continue
        curve = training.get("joint", training.get("lora", {})).get("curve")
        if curve:
            section = Section.of(name, report["inputs"]["data"])
            found.setdefault(section, {}).setdefault(arm_of(name), []).append(curve)
    return found


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """Return an empty figure, width and height in inches, and its axes from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")  # a legend may be wider
    return buffer.getvalue()


def arm_colors(rows: Sequence[Row]) -> dict[str, str]:
    """Return a colour for each arm: its policy's, or another where a further arm has the policy."""
    spare, found = cycle(SPARE_COLORS), dict[str, str]()
    for row in rows:
        if row["policy"] != "base" and row["arm"] not in found:
            wanted = COLORS.get(row["policy"], "")
            taken = not wanted or wanted in found.values()
            found[row["arm"]] = next(spare) if taken else wanted
    return found


def _quality(
    rows: Sequence[Row],
    colors: Mapping[str, str],
    over: str = "skip_rate",
    axis: str = "layers skipped, %",
) -> bytes:
    """Draw score over skip rate or time, a line a policy and LoRA; plain LoRA is dashed.

    All lines of one arm share a colour, each with a mark of its own; hollow marks ran with another
    policy's LoRA. Where many have but one point, these stand beside, best first.
    """
    lines: dict[str, list[Row]] = {}
    for shown, row in labelled(rows):
        lines.setdefault(shown, []).append(row)
    whole = {shown: points[0] for shown, points in lines.items() if points[0]["policy"] == "base"}
    lines = {shown: points for shown, points in lines.items() if shown not in whole}
    alone = {shown: points[0] for shown, points in lines.items() if len(points) == 1}
    if not CROWD <= len(alone) < len(lines):
        alone = {}
    lines = {shown: points for shown, points in lines.items() if shown not in alone}
    figure, axes = _figure(11 if alone else 8, 4.5, 2 if alone else 1)
    metric = metric_name(rows[0]["metric"])
    _curves(axes[0], lines, colors, over)
    _references(axes[0].axhline, whole)
    axes[0].set_xlabel(axis)
    axes[0].set_ylabel(metric)
    axes[0].set_ylim(bottom=0)
    axes[0].grid(axis="y", color="#e5e7eb")
    figure.legend(
        handles=axes[0].get_legend_handles_labels()[0],
        fontsize="small",
        frameon=False,
        loc="outside lower center",
        ncols=3 if max(map(len, [*lines, *whole])) < WIDE else 2,
    )
    if alone:
        _ranked(axes[1], alone, colors, over)
        _references(axes[1].axvline, whole)
        axes[1].set_xlabel(f"{metric} of one rate each (in brackets: {axis})")
    return _png(figure)


def _references(draw_line: Any, whole: Mapping[str, Row]) -> None:
    """Draw the base model's scores with all layers across a picture."""
    dashes = cycle(DASHES)
    for shown, row in whole.items():
        style = next(dashes) if row["lora_of"] else ":"
        draw_line(row["score"], color=PLAIN_COLOR, linestyle=style, label=shown, zorder=0)


def _curves(
    axes: Any, lines: Mapping[str, list[Row]], colors: Mapping[str, str], over: str
) -> None:
    """Draw score over skip rate or time, with intervals."""
    marks: dict[tuple[str, bool], int] = {}
    for shown, points in lines.items():
        kind = points[0]["arm"], _borrowed(points[0])
        marks[kind] = marks.get(kind, -1) + 1
        points = sorted(points, key=lambda row: row[over])
        places = np.array([row[over] for row in points])
        across = None
        if over == "tpot_ratio":
            spread = [row.get("tpot_ratio_spread") or [row[over]] * 2 for row in points]
            left, right = np.array(spread).T
            across = 100 * np.maximum([places - left, right - places], 0)
        axes.errorbar(
            100 * places,
            [row["score"] for row in points],
            yerr=_interval(points),
            xerr=across,
            linestyle="-." if _borrowed(points[0]) else "-" if points[0]["lora_of"] else ":",
            marker=MARKS[marks[kind] % len(MARKS)],
            label=shown,
            **_look(points[0], colors),
        )


def _ranked(axes: Any, alone: Mapping[str, Row], colors: Mapping[str, str], over: str) -> None:
    """Draw the scores of what has but one point, each on a line of its own, best on top."""
    ranked = sorted(alone.items(), key=lambda one: one[1]["score"])
    for place, (_, row) in enumerate(ranked):
        axes.errorbar(
            row["score"], place, xerr=_interval([row]), marker=MARKS[0], **_look(row, colors)
        )
    names = [f"{shown} ({100 * row[over]:.0f})" for shown, row in ranked]
    axes.set_yticks(range(len(ranked)), names, fontsize="small")
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#e5e7eb")


def _borrowed(row: Row) -> bool:
    """Tell whether a policy ran with another one's LoRA."""
    return row["lora_of"] not in (None, row["policy"])


def _look(row: Row, colors: Mapping[str, str]) -> dict[str, Any]:
    """Return an arm's colour, and what all points share; hollow ones ran with another's LoRA."""
    color = colors[row["arm"]]
    filled = "white" if _borrowed(row) else color
    return {"color": color, "markerfacecolor": filled, "markersize": 5, "capsize": 3}


def _interval(points: Sequence[Row]) -> np.ndarray:
    """Return how far the interval of each point reaches below and above it, [2, points]."""
    scores = np.array([row["score"] for row in points])
    low, high = np.array([row["ci95"] for row in points]).T
    return np.maximum([scores - low, high - scores], 0)


def _masks(shares: Mapping[str, np.ndarray]) -> bytes:
    """Draw how often each layer runs, one line of boxes a run."""
    figure, (axes,) = _figure(9, 0.28 * len(shares) + 1.2)
    lines = np.array(list(shares.values()))
    image = axes.imshow(lines, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(shares)))
    axes.set_yticklabels(list(shares), fontsize="small")
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="runs it")
    return _png(figure)


def _layers(items: Sequence[Row]) -> bytes:
    """Draw the share of prompts that run each layer, one line of boxes a group of lengths."""
    tokens = np.array([item["prompt_tokens"] for item in items])
    keep = from_bits([item["keep"] for item in items])
    parts = [part for part in np.array_split(np.argsort(tokens, kind="stable"), LENGTH_GROUPS)]
    parts = [part for part in parts if len(part)]
    figure, (axes,) = _figure(9, 0.5 * len(parts) + 1.2)
    shares = np.array([keep[part].mean(0) for part in parts])
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(parts)))
    axes.set_yticklabels([f"{tokens[part].min()}-{tokens[part].max()} tokens" for part in parts])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="runs it")
    return _png(figure)


def _outputs(counts: np.ndarray) -> bytes:
    """Draw a histogram of router outputs [layers, bins], one column a layer."""
    figure, (axes,) = _figure(9, 3)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    image = axes.imshow(
        shares.T,
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=(-0.5, len(counts) - 0.5, 0, 1),
    )
    axes.axhline(0.5, color="#b91c1c", linewidth=1, linestyle="--")
    axes.set_xlabel("layer")
    axes.set_ylabel("router output")
    figure.colorbar(image, ax=axes, label="prompts")
    return _png(figure)


def _sensitivity(rows: Sequence[Row], name: str) -> bytes:
    """Draw skip rate and score over the values of an option of training."""
    figure, (axes,) = _figure(8, 3.5)
    places = range(len(rows))
    axes.plot(places, [100 * row["skip_rate"] for row in rows], color="#0b6e99", marker="o")
    axes.set_ylabel("layers skipped, %", color="#0b6e99")
    axes.set_ylim(bottom=0)
    axes.set_xticks(places)
    axes.set_xticklabels([f"{row[name]:g}" for row in rows])
    axes.set_xlabel(SWEPT[name])
    right = axes.twinx()
    scores = [row["score"] for row in rows]
    right.errorbar(places, scores, yerr=_interval(rows), color="#c2410c", marker="s", capsize=3)
    right.set_ylabel(metric_name(rows[0]["metric"]), color="#c2410c")
    right.set_ylim(bottom=0)
    right.spines[["top"]].set_visible(False)
    return _png(figure)


def _training(arms: Mapping[str, Sequence[Row]], colors: Mapping[str, str]) -> bytes:
    """Draw cross-entropy over steps, a colour an arm."""
    figure, (axes,) = _figure(8, 4.5)
    for arm, seeds in arms.items():
        for seed, curve in enumerate(seeds):
            color = colors.get(arm, PLAIN_COLOR)
            for name, style in (("ce", {"alpha": 0.25}), ("eval_loss", {"marker": "o"})):
                if name in curve:
                    shown = arm if name == "eval_loss" and seed == 0 else None
                    axes.plot(*zip(*curve[name], strict=True), color=color, label=shown, **style)
    axes.set_xlabel("LoRA step")
    axes.set_ylabel("cross-entropy, nats per answer token")
    axes.set_yscale("log", subs=[2, 5])
    for ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axes.grid(axis="y", color="#e5e7eb", which="both")
    figure.legend(fontsize="small", frameon=False, loc="outside lower center", ncols=3)
    return _png(figure)
