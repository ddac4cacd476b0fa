# SPDX-License-Identifier: Apache-2.0
"""The tables on speed, from what `firstlm bench` and its neighbours in this folder measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import markdown

Row = Mapping[str, Any]


def _by_kind(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return rows by engine and number format, one a skip rate, in order.

    Raises:
        ValueError: one lacks a rate that others have; it would stand under another's.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["skip_rate"]):
        found.setdefault((row["engine"], row["dtype"]), []).append(row)
    rates = [0.0, *_skipped(rows)]
    for kind, same in found.items():
        if [row["skip_rate"] for row in same] != rates:
            raise ValueError(f"{kind} was not measured at each of {rates}, once")
    first = [(row["engine"], row["dtype"]) for row in rows]
    return {kind: found[kind] for kind in dict.fromkeys(first)}


def _between(row: Row, name: str, digits: int = 2) -> str:
    """Return a figure with its interval."""
    low, high = row[f"{name}_ci95"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _skipped(rows: Sequence[Row]) -> list[float]:
    return sorted({row["skip_rate"] for row in rows} - {0.0})


def bench_table(report: dict, batch: int) -> list[str]:
    """Return a table with a line an engine and format: what skipped layers save at a batch size."""
    rows = [
        row
        for row in report["rows"]
        if row["batch"] == batch and row["engine"] in ("fast", "hf") and row["masks"] == "shared"
    ]
    hf = next(row for row in rows if row["engine"] == "hf" and not row["skip_rate"])
    names = ["engine, weights", "all layers"]
    for rate in _skipped(rows):
        names += [f"{rate:.1%} skipped", "realised"]
    lines = []
    for (engine, dtype), (full, *less) in _by_kind(rows).items():
        line = [f"`{engine}`, {dtype}", f"{hf['tpot_ms'] / full['tpot_ms']:.2f}x as fast"]
        for row in less:
            line += [f"{row['tpot_ratio']:.3f}x the time", _between(row, "realised_over_ideal")]
        lines.append(line)
    return markdown(names, lines)


def cut_table(report: dict) -> list[str]:
    """Return a table of the fast engine beside the model cut for good, and the roofline."""
    rows = [
        row
        for row in report["rows"]
        if row["engine"] == "fast" and row["batch"] == 1 and row["masks"] == "shared"
    ]
    names = ["weights", "of the roofline, all layers"]
    for rate in _skipped(rows):
        names += [f"{rate:.1%} skipped", "time over that of the cut model"]
    lines = [
        [dtype, f"{full['roofline_share']:.0%}"]
        + [
            cell
            for row in less
            for cell in (f"{row['roofline_share']:.0%}", _between(row, "tpot_over_cut", 3))
        ]
        for (_, dtype), (full, *less) in _by_kind(rows).items()
    ]
    return markdown(names, lines)


def mixed_table(reports: Mapping[str, dict]) -> list[str]:
    """Return a table of batches whose rows have other masks; reports by the name of their model."""
    lines = [
        [
            model,
            str(row["batch"]),
            f"`{row['engine']}`, {row['dtype']}",
            f"{row['skip_rate']:.1%}",
            str(row["layer_calls"]),
            f"{_between(row, 'tpot_over_shared')}x",
            f"{_between(row, 'tpot_ratio')}x",
        ]
        for model, report in reports.items()
        for row in report["rows"]
        if row["masks"] == "mixed"
    ]
    names = ["model", "rows", "engine, weights", "skipped", "layers that some row runs"]
    return markdown([*names, "time over one mask for all", "time over all layers"], lines)


def peers_table(report: dict) -> list[str]:
    """Return a table with a line a peer: its time over that of the fast engine."""
    rows = [row for row in report["rows"] if "over_fast" in row]
    formats = list(dict.fromkeys(x["dtype"] for row in rows for x in row["over_fast"]))
    names = ["peer, weights", "skipped", *(f"time over `fast`, {name}" for name in formats)]
    lines = []
    for row in rows:
        alike = {
            x["dtype"]: x
            for x in row["over_fast"]
            if x["skip_rate_asked"] == row["skip_rate_asked"]
        }
        cells = [f"{_between(alike[name], 'tpot_ratio')}x" for name in formats]
        lines.append([f"{row['engine']}, {row['dtype']}", f"{row['skip_rate']:.1%}", *cells])
    return markdown(names, lines)


def profile_table(report: dict) -> list[str]:
    """Return a table of where the time of a token goes, in shares."""
    names = ["", *(f"`{row['engine']}`, {row['weights']}" for row in report["rows"])]
    parts = list(dict.fromkeys(part for row in report["rows"] for part in row["ms"]))
    lines = [
        [part]
        + [
            f"{row['ms'][part] / row['total_ms']:.0%}" if part in row["ms"] else ""
            for row in report["rows"]
        ]
        for part in parts
    ]
    base = report["rows"][0]["total_ms"]
    total = [f"{row['total_ms'] / base:.2f}x" for row in report["rows"]]
    return markdown(names, [*lines, ["time in all", *total]])


def throughput_table(reports: Sequence[dict]) -> list[str]:
    """Return a table of many prompts through one batch."""
    lines = [
        [
            f"{report['options']['data'].rpartition('/')[2]}, "
            + (
                "answers as they end"
                if report["options"]["end"]
                else f"{report['options']['max_new_tokens']} tokens each"
            ),
            row["arm"],
            f"{row['skip_rate']:.1%}",
            str(row["masks"]),
            f"{_between(row, 'speedup')}x",
            f"{_between(row, 'prompts_speedup')}x",
        ]
        for report in reports
        for row in report["rows"][1:]
    ]
    names = ["prompts", "masks of", "skipped", "masks"]
    return markdown([*names, "tokens/s over all layers", "prompts/s over all layers"], lines)


def vllm_table(report: dict) -> list[str]:
    """Return a table of vLLM's steps: what the plugin costs, and what skipped layers save."""
    rows = report["rows"]
    names = ["", *(f"{row['mode']}, {_requests(row['batch'])}" for row in rows)]
    figures = {
        "all_over_stock": "all layers, over stock vLLM",
        "one mask over all": "one mask for all, over all layers",
        "one mask realised_over_ideal": "of what the bytes promise",
        "other masks over all": "a mask of its own for each, over all layers",
    }
    lines = []
    for name, said in figures.items():
        cells = [row.get(name) for row in rows]
        shown = ["{:.3f} ({:.3f} to {:.3f})".format(*cell) if cell else "" for cell in cells]
        lines.append([said, *shown])
    return markdown(names, lines)


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def bench_text(report: dict) -> list[str]:
    """Return what README says about speed."""
    return [
        f"Decoding SmolLM2-135M on {report['threads']} CPU cores, batch 1, in turns "
        f'({report["rounds"]} rounds, medians): speed against `engine="hf"` with all layers in '
        "bfloat16, time with layers skipped against the same engine with none, and what was saved "
        "as a share of what the bytes of skipped layers cost:",
        "",
        *bench_table(report, 1),
        "",
        f"Routers' share of a {report['prompt_tokens']}-token prefill: "
        f"{report['router_overhead']:.2%}.",
    ]


def prompt_text(report: dict) -> list[str]:
    """Return what long prompts cost: a table, and the routers' share."""
    rows = [row for row in report["rows"] if row["batch"] == 1 and row["engine"] in ("fast", "hf")]
    names = ["engine, weights"]
    for rate in _skipped(rows):
        names += [f"{rate:.1%} skipped", "realised"]
    lines = []
    for (engine, dtype), (_, *less) in _by_kind(rows).items():
        line = [f"`{engine}`, {dtype}"]
        for row in less:
            line += [
                f"{_between(row, 'ttft_ratio', 3)}x",
                _between(row, "ttft_realised_over_ideal"),
            ]
        lines.append(line)
    share = f"{report['router_overhead']:.2%}"
    return [
        *markdown(names, lines),
        "",
        f"Routers take {share} of a {report['prompt_tokens']}-token prefill.",
    ]
