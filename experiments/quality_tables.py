# SPDX-License-Identifier: Apache-2.0
"""The tables on quality, from a summary's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from markdown_table import markdown

from firstlm.scoreboard import LABELS
from firstlm.sections import Row, Section, labelled, metric_text, recomputed, title

COMPARED = ("base", "lora", "first", "random", "unified", "majority", "length_only")
COMPARED += ("static_importance", "early_exit", "random_fixed", "skip_decode")
RATES = (0.15, 0.25, 0.40)
NEAR = 0.01  # between the skip rate that is asked for and the one that is measured
LEGEND = """\
- **policy**: what decides, and in brackets which arm of the file, where several are alike.
- **asked, skipped, p5-p95**: the share of layers that was asked for; what was skipped, on average
  over prompts; its percentiles.
- **masks**: how many different ones the prompts had, the mean over seeds.
- **95%**: an interval from a bootstrap over items and seeds.
- **of base + LoRA**: of the best plain LoRA with all layers in the same file, on the same seeds, or
  on all that it has where it lacks one of them; nothing where there is none, or where it scores
  under BLEU 5 or F1 20. With a *, seeds of the two were scored in other number formats.
- **seeds**: how many, and how many of them were scored in bfloat16 (the others in float32). A
  metric that fewer of them have says so.
- **time per token**: the median over a few prompts, one at a time with `engine="hf"`, over that
  with all layers. All layers over themselves are {low:.2f} to {high:.2f} here: so much is noise.
  Speed is measured in [speed.md](speed.md)."""


def legend(rows: Iterable[Row]) -> str:
    """Say what the columns of full tables hold."""
    same = [row["tpot_ratio"] for row in rows if row["skip_rate"] == 0 and row["tpot_ratio"]]
    return LEGEND.format(low=min(same), high=max(same))


def comparison_table(found: Sequence[tuple[Section, list[Row]]]) -> list[str]:
    """Return a table with a line a policy and skip rate, and a column an experiment file."""
    files: list[str] = []
    heads: list[str] = []
    columns: list[dict[tuple[str, float], Row]] = []
    for section, rows in found:
        primary = [row for row in rows if row["primary"] and row["arm"] in COMPARED]
        if not any(row["policy"] == "first" for row in primary):
            continue
        metric, count = LABELS[primary[0]["metric"]], primary[0]["n_test"]
        files.append(f"experiments/{section.file}.yaml")
        heads.append(f"{title(section, rows)}, {metric} on {count} items")
        rated = [row for row in primary if row["skip_rate_asked"] is not None]
        columns.append({(shown, row["skip_rate_asked"]): row for shown, row in labelled(rated)})
    lines = [
        [shown, f"{asked:.0%}", *(_cell(one.get((shown, asked)), seeds=True) for one in columns)]
        for shown, asked in dict.fromkeys(key for column in columns for key in column)
        if asked in (0.0, 0.25) or shown == "FiRST"
    ]
    table = markdown(["policy", "asked", *heads], lines)
    return [*table, "", f"Made by `firstlm experiment run {' '.join(files)}`."]


def compact_table(section: Section, rows: Sequence[Row]) -> list[str]:
    """Return a table with a line a policy and a column a skip rate, primary metric alone."""
    primary = [row for row in rows if row["primary"] and row["skip_rate_asked"] is not None]
    metric, count = LABELS[primary[0]["metric"]], primary[0]["n_test"]
    by_policy: dict[str, dict[float, Row]] = {}
    for shown, row in labelled(primary):
        by_policy.setdefault(shown, {})[row["skip_rate_asked"]] = row
    lines = []
    for shown, by_rate in by_policy.items():
        cells = [_cell(by_rate.get(rate)) for rate in (0.0, *RATES)]
        seeds = sorted({row["seeds"] for row in by_rate.values()})
        lines.append([shown, *cells, " to ".join(map(str, seeds))])
    names = ["policy", "all layers", *(f"{rate:.0%} asked" for rate in RATES), "seeds"]
    return [
        f"{title(section, rows)}: {metric} on {count} unseen items, and its share of base + LoRA",
        "",
        *markdown(names, lines),
    ]


def _cell(row: Row | None, seeds: bool = False) -> str:
    if row is None:
        return ""
    notes = [] if row["retention"] is None else [f"{row['retention']:.0%}"]
    if abs(row["skip_rate"] - row["skip_rate_asked"]) > NEAR:
        notes.append(f"{row['skip_rate']:.1%} skipped")
    if seeds and row["seeds"] > 1:
        notes.append(f"{row['seeds']} seeds")
    return f"{row['score']:.1f}" + (f" ({'; '.join(notes)})" if notes else "")


def full_table(section: Section, rows: Sequence[Row]) -> list[str]:
    """Return a table with a line a policy and rate, and every metric."""
    primary = next(row["metric"] for row in rows if row["primary"])
    others = list(dict.fromkeys(row["metric"] for row in rows if not row["primary"]))
    metric = LABELS[primary]
    by_run: dict[tuple[str, Any], dict[str, Row]] = {}
    for shown, row in labelled(rows):
        by_run.setdefault((shown, row["skip_rate_asked"]), {})[row["metric"]] = row
    lines = []
    for (shown, asked), by_metric in by_run.items():
        row = by_metric[primary]
        halves = row["weights"].count("bfloat16")
        seeds = f"{row['seeds']} ({halves} in bfloat16)" if halves else row["seeds"]
        low, high = row["ci95"]
        kept = f"{row['retention']:.1%}" if row["retention"] is not None else ""
        kept += "*" * row["formats_differ"]
        time = f"{row['tpot_ratio']:.2f}x" if row["tpot_ratio"] is not None else ""
        lines.append(
            [
                shown,
                "as trained" if asked is None else f"{asked:.0%}",
                f"{row['skip_rate']:.1%}",
                f"{row['skip_rate_p5']:.0%}-{row['skip_rate_p95']:.0%}",
                f"{row['distinct_masks']:.1f}",
                *(metric_text(by_metric.get(m), row) for m in others),
                f"{row['score']:.1f}",
                f"{low:.1f}-{high:.1f}",
                kept,
                time,
                str(seeds),
            ]
        )
    names = ["policy", "asked", "skipped", "p5-p95", "masks", *(LABELS[m] for m in others), metric]
    names += [f"95% of {metric}", "of base + LoRA", "time per token", "seeds"]
    text = recomputed(rows)
    return [
        f"## {title(section, rows)}",
        "",
        f"{rows[0]['n_test']} unseen test items, greedy. Made by `firstlm experiment run "
        f"experiments/{section.file}.yaml`.",
        "",
        *markdown(names, lines),
        *(["", text] if text else []),
    ]
