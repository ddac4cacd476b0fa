# SPDX-License-Identifier: Apache-2.0
"""Reports of `firstlm eval`: how they are read and shown, what an artifact keeps. Runs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firstlm.errors import DataError
from firstlm.rows import LOOKS_LIKE_A_FILE

SUMMARY = "summary.json"  # of the reports beside it

LABELS = {
    "em": "EM",
    "f1": "F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "bleu1": "BLEU-1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bertscore": "BERTScore",
    "perplexity": "perplexity",
}


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return what an artifact keeps of a report: where it was measured, and each run's scores."""
    source = report["inputs"]["data"]
    return {
        "data": "/".join(Path(source).parts[-2:]) if LOOKS_LIKE_A_FILE.search(source) else source,
        "data_sha256": report["inputs"]["data_sha256"],
        "count": next(iter(report["runs"].values()))["count"],
        "weights": report["inputs"]["weights"].removeprefix("torch."),
        **{name: report["options"][name] for name in ("prefill", "max_new_tokens")},
        "runs": {
            name: {
                "skip_rate": run["skip_rate"]["mean"],
                **{label: run[name]["value"] for name, label in LABELS.items() if name in run},
            }
            for name, run in report["runs"].items()
        },
    }


def table(report: dict[str, Any]) -> str:
    """Return a report of `firstlm eval` as text, one line a run."""
    runs = report["runs"]
    metrics = {m: label for m, label in LABELS.items() if any(m in run for run in runs.values())}
    columns = ["run", *(c for label in metrics.values() for c in (label, "95%"))]
    columns += ["of run_all", "skipped", "p5-p95", "masks", "calls"]
    rows = []
    for name, result in runs.items():
        rate, kept = result["skip_rate"], report["of_run_all"].get(name, {}).get("value")
        row = [name]
        for metric in metrics:
            row += _estimate(result.get(metric))
        row += ["" if kept is None or kept != kept else f"{kept:.1%}", f"{rate['mean']:.1%}"]
        row += [f"{100 * rate['p5']:.0f}-{100 * rate['p95']:.0f}%", f"{result['distinct_masks']}"]
        rows.append([*row, f"{sum(result['layer_calls'].values())}"])
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (columns, *rows)
    ]
    count = next(iter(runs.values()))["count"] if runs else 0
    primary = LABELS[report["primary"]]
    return "\n".join(
        [
            *lines,
            f"{count} items; scores but perplexity in percent; of run_all: share of its {primary}.",
        ]
    )


def _estimate(found: dict[str, float] | None) -> list[str]:
    """Return a score and its interval as cells; empty ones where a run lacks the metric."""
    if found is None:
        return ["", ""]
    return [f"{found['value']:.1f}", f"{found['low']:.1f}-{found['high']:.1f}"]


def read(file: Path) -> dict[str, Any] | None:
    """Return a report of `firstlm eval`, or None where there is none yet.

    Raises:
        DataError: the file holds something else.
    """
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise _no_report(file, error) from error
    return checked(found, file)


def checked(found: Any, file: Path) -> dict[str, Any]:
    """Return what a file holds, if it is a report of `firstlm eval`.

    Raises:
        DataError: it is something else.
    """
    try:
        if not {"task", "options", "inputs", "runs"} <= set(found):
            raise ValueError("task, options, inputs or runs are missing")
        if not {"data"} <= set(found["inputs"]) or not isinstance(found["options"], dict):
            raise ValueError("inputs without data")
        for name, run in found["runs"].items():
            if not {"policy", "count", "skip_rate", "items"} <= set(run):
                raise ValueError(f"the run {name!r} lacks policy, count, skip_rate or items")
    except (ValueError, TypeError, AttributeError) as error:
        raise _no_report(file, error) from error
    return found


def _no_report(file: Path, error: Exception) -> DataError:
    return DataError(f"{file} holds no results of `firstlm eval` ({error}); move it elsewhere.")
