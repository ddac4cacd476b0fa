# SPDX-License-Identifier: Apache-2.0
"""What `firstlm eval` shows of its report, and what an artifact keeps of it. Runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
        "data": "/".join(Path(source).parts[-2:]) if Path(source).is_file() else source,
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
