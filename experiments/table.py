# SPDX-License-Identifier: Apache-2.0
"""Write the README's tables from results/*.json, so that no number is typed by hand.

python experiments/table.py            # print
python experiments/table.py --write    # put between the markers in README.md
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"
NAMES = {
    ("first", "base"): "base model",
    ("lora", "run_all"): "base + LoRA, all layers",
    ("first", "run_all"): "FiRST, all layers",
    ("routers", "router@0.15"): "routers only, 15% asked",
    ("routers", "router@0.25"): "routers only, 25% asked",
    ("first", "router@0.1"): "FiRST, 10% asked",
    ("first", "router@0.15"): "FiRST, 15% asked",
    ("first", "router@0.25"): "FiRST, 25% asked",
    ("first", "router@0.4"): "FiRST, 40% asked",
}


def load() -> dict[tuple[str, str], dict[int, dict]]:
    """Return runs by (kind, run name), then by seed."""
    runs: dict[tuple[str, str], dict[int, dict]] = {}
    for file in sorted((ROOT / "results").glob("qamr-*-*.json")):
        _, kind, seed = file.stem.split("-")
        for name, result in json.loads(file.read_text())["runs"].items():
            runs.setdefault((kind, name), {})[int(seed)] = result
    return runs


def spread(values: list[float], form: str = "{:.1f}") -> str:
    """Return the mean, and lowest to highest where the seeds differ."""
    middle, low, high = map(form.format, (statistics.mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def quality_table(runs: dict[tuple[str, str], dict[int, dict]]) -> list[str]:
    """Return the quality table's lines."""
    reference = runs.get(("lora", "run_all"), {})
    count = next(iter(next(iter(runs.values())).values()))["count"]
    lines = [
        f"SmolLM2-135M on qamr, {count} unseen test questions, greedy:",
        "",
        "| model | layers skipped | p5-p95 | EM | F1 | F1 against base + LoRA | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, name in NAMES.items():
        seeds = runs.get(key)
        if not seeds:
            continue
        results = list(seeds.values())
        kept = [
            result["f1"]["value"] / reference[seed]["f1"]["value"]
            for seed, result in seeds.items()
            if seed in reference
        ]
        rate = [100 * r["skip_rate"]["mean"] for r in results]
        low = 100 * statistics.mean(r["skip_rate"]["p5"] for r in results)
        high = 100 * statistics.mean(r["skip_rate"]["p95"] for r in results)
        lines.append(
            f"| {name} | {spread(rate)}% | {low:.0f}-{high:.0f}% "
            f"| {spread([r['em']['value'] for r in results])} "
            f"| {spread([r['f1']['value'] for r in results])} "
            f"| {spread(kept, '{:.1%}') if kept else ''} | {len(seeds)} |"
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
    parts: list[str] = []
    runs = load()
    if runs:
        parts += [*quality_table(runs), ""]
        parts += ["Made by `experiments/qamr.sh`.", ""]
    timing = ROOT / "results" / "timing_smollm2.json"
    if timing.exists():
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
