# SPDX-License-Identifier: Apache-2.0
"""Write the README's tables from results/*.json, so that no number is typed by hand.

python experiments/table.py            # print
python experiments/table.py --write    # put between the markers in README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from firstlm.report import groups, labelled
from firstlm.scoreboard import LABELS

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"


def quality_table(rows: list[dict]) -> list[str]:
    """Return the lines of the quality table of one model and data set."""
    first, named = rows[0], labelled(rows)
    primary = next(row["metric"] for row in rows if row["primary"])
    others = list(dict.fromkeys(row["metric"] for row in rows if not row["primary"]))
    metric = LABELS[primary]
    lines = [
        f"{first['model']} on {first['dataset']}, {first['n_test']} unseen test items, greedy:",
        "",
        f"| model | layers skipped | p5-p95 | {' | '.join(LABELS[m] for m in others)} | {metric} "
        f"| 95% of {metric} | of base + LoRA | seeds |",
        "|---|---|---|" + "---|" * (len(others) + 4),
    ]
    for shown, row in named:
        if not row["primary"]:
            continue
        same = [r for name, r in named if name == shown]
        same = [r for r in same if r["skip_rate_asked"] == row["skip_rate_asked"]]
        scores = [f"{r['score']:.1f}" for m in others for r in same if r["metric"] == m]
        asked = f", {row['skip_rate_asked']:.0%} asked" if row["skip_rate_asked"] else ""
        low, high = row["ci95"]
        kept = f"{row['retention']:.1%}" if row["retention"] is not None else ""
        lines.append(
            f"| {shown}{asked} | {row['skip_rate']:.1%} "
            f"| {row['skip_rate_p5']:.0%}-{row['skip_rate_p95']:.0%} | {' | '.join(scores)} "
            f"| {row['score']:.1f} | {low:.1f}-{high:.1f} | {kept} | {row['seeds']} |"
        )
    return lines


def timing_table(report: dict) -> list[str]:
    """Return the timing table's lines."""
    lines = [
        "Decoding with evenly spaced layers skipped, batch 1, one CPU, arms interleaved "
        f"({report['rounds']} rounds, medians):",
        "",
        "| format | layers skipped | time per token | saved / skipped share of layer time |",
        "|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        for arm in ("7_skipped", "8_skipped"):
            row = report.get(dtype, {}).get("decode", {}).get(arm)
            if row:
                low, high = row["realised_over_ideal_ci95"]
                lines.append(
                    f"| {dtype} | {row['skip_rate']:.1%} | {row['time_ratio']:.3f}x "
                    f"| {row['realised_over_ideal']:.1%} ({low:.1%} to {high:.1%}) |"
                )
    shares = [
        f"{report[d]['routers']['share_of_prefill']['median']:.2%} ({d})"
        for d in ("float32", "bfloat16")
        if d in report
    ]
    lines += ["", f"Routers' share of a 512-token prefill: {', '.join(shares)}."]
    return lines


def text() -> str:
    """Return what stands between the markers."""
    rows = json.loads((ROOT / "results" / "summary.json").read_text())
    parts: list[str] = []
    for (_, dataset, _), found in groups(rows).items():
        parts += [*quality_table(found), ""]
        parts += [f"Made by `firstlm experiment run experiments/{dataset}.yaml`.", ""]
    timing = ROOT / "results" / "timing_smollm2.json"
    parts += [*timing_table(json.loads(timing.read_text())), ""]
    parts += ["Made by `python experiments/timing.py`.", ""]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    if not parser.parse_args().write:
        print(text())
        return
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n{text()}{END}{after}")


if __name__ == "__main__":
    main()
