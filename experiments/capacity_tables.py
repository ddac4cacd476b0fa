# SPDX-License-Identifier: Apache-2.0
"""The tables on capacity: what was measured, how far the step model is from it, the fleet."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import markdown
from step_model import validation

Row = Mapping[str, Any]
MASKS = {"shared": "one mask", "mixed": "a mask for each row"}
FLEET_MASKS = {"one": "one for all", "few": "8", "own": "one each"}


def throughput_table(report: dict) -> list[str]:
    """Return a table of tokens a second over those with all layers, at the same batch."""
    rows = [row for row in report["rows"] if row["engine"] == "fast"]
    batches = sorted({row["batch"] for row in rows})
    names = ["weights", "skipped", "masks", *(f"batch {batch}" for batch in batches)]
    by_kind: dict[tuple[str, float, str], dict[int, Row]] = {}
    formats = [row["dtype"] for row in rows]
    for row in sorted(rows, key=lambda row: (formats.index(row["dtype"]), row["skip_rate"])):
        if row["skip_rate"]:
            kind = row["dtype"], row["skip_rate"], row["masks"]
            by_kind.setdefault(kind, {})[row["batch"]] = row
    lines = []
    for (dtype, rate, masks), found in by_kind.items():
        cells = [_inverse(found[batch]) if batch in found else "" for batch in batches]
        lines.append([dtype, f"{rate:.1%}", MASKS[masks], *cells])
    return markdown(names, lines)


def _inverse(row: Row) -> str:
    """Return the throughput over all layers: the inverse of the time's ratio."""
    low, high = (1 / x for x in reversed(row["tpot_ratio_ci95"]))
    return f"{1 / row['tpot_ratio']:.2f} ({low:.2f} to {high:.2f})x"


def memory_table(report: dict) -> list[str]:
    """Return a table of the fast engine's bytes of keys and values per sequence."""
    rows = [row for row in report["rows"] if row["engine"] == "fast" and row["dtype"] == "bfloat16"]
    batches = sorted({row["batch"] for row in rows})
    whole = next(row["kv_bytes"] / row["batch"] for row in rows if not row["skip_rate"])
    by_kind: dict[tuple[float, str], dict[int, Row]] = {}
    for row in rows:
        by_kind.setdefault((row["skip_rate"], row["masks"]), {})[row["batch"]] = row
    lines = []
    for (rate, masks), found in sorted(by_kind.items(), key=lambda x: x[0][0]):
        each = {batch: row["kv_bytes"] / batch for batch, row in found.items()}
        cells = [
            f"{each[b] / 2**20:.2f} MiB ({each[b] / whole:.3f}x)" if b in each else ""
            for b in batches
        ]
        lines.append([f"{rate:.1%}", MASKS[masks], *cells])
    return markdown(["skipped", "masks", *(f"batch {batch}" for batch in batches)], lines)


def _off(error: float) -> str:
    """Return a relative error in per cent, without a sign where it is nought."""
    return f"{error:+.0%}" if abs(error) >= 0.005 else "0%"


def validation_tables(report: dict) -> tuple[list[str], list[str]]:
    """Return a table of time over that with all layers, measured and predicted, and of the fits."""
    both = [validation(report, overlap) for overlap in (True, False)]
    names = ["weights", "batch", "skipped", "masks", "measured"]
    for kind in ("overlap", "sum"):
        names += [f"predicted, {kind}", "off by"]
    lines, off = [], {}
    for together in zip(*both, strict=True):
        row = together[0]
        if "predicted" not in row:
            continue
        cells = [f"{row['measured']:.2f}x"]
        for kind, one in zip(("overlap", "sum"), together, strict=True):
            error = one["predicted"] / one["measured"] - 1
            off.setdefault((kind, row["masks"]), []).append(error)
            cells += [f"{one['predicted']:.2f}x", _off(error)]
        rate = f"{row['skip_rate']:.1%}"
        lines.append([row["dtype"], str(row["batch"]), rate, MASKS[row["masks"]], *cells])
    table = markdown(names, lines)
    fits = [
        [
            dtype,
            kind,
            *(_off(found[i]["over_measured"] - 1) for i in range(3)),
            f"{found[0]['machine'].bandwidth / 1e9:.0f} GB/s",
            f"{found[0]['machine'].flops / 1e9:.0f} GFLOP/s",
            f"{found[0]['machine'].layer_overhead * 1e6:.0f} us",
        ]
        for dtype in dict.fromkeys(row["dtype"] for row in both[0])
        for kind, rows in zip(("overlap", "sum"), both, strict=True)
        if (found := [row for row in rows if row["dtype"] == dtype and "predicted" not in row])
    ]
    batches = sorted({row["batch"] for row in both[0]})
    names = ["weights", "form", *(f"batch {batch}: off by" for batch in batches)]
    fitted = markdown([*names, "bandwidth", "compute", "per layer visit"], fits)
    words = []
    for kind in ("overlap", "sum"):
        for masks, name in MASKS.items():
            errors = off[kind, masks]
            words.append(
                f"{kind}, {name}: {_off(min(errors))} to {_off(max(errors))}, "
                f"median {_off(statistics.median(errors))}"
            )
    return [*table, "", "Errors: " + "; ".join(words) + "."], fitted


def fleet_table(report: dict) -> list[str]:
    """Return a table with a line a skip rate and kind of masks: what a fleet answers."""
    names = ["skipped", "masks", "tokens/s, KV freed", "at once", "tokens/s, KV reserved"]
    names += ["at once", "TPOT median", "p95", "TTFT median", "p95"]
    lines = []
    for freed, reserved in _pairs(report):
        cells = []
        for row in (freed, reserved):
            ratio = f"{row['tokens_per_s_ratio']:.2f}x"
            low, high = row["tokens_per_s_ratio_range"]
            text = f"{row['tokens_per_s'] / 1e3:.0f}k"
            if row["skip_rate"]:
                text += f", {ratio} ({low:.2f} to {high:.2f})"
            cells += [text, f"{row['most_running']:.0f}"]
        for name in ("tpot", "ttft"):
            for share in ("median", "p95"):
                text = f"{freed[f'{name}_ms_{share}']:.1f} ms"
                if freed["skip_rate"]:
                    text += f", {freed[f'{name}_ms_{share}_ratio']:.2f}x"
                cells.append(text)
        lines.append([f"{freed['skip_rate']:.1%}", FLEET_MASKS[freed["masks"]], *cells])
    if lines:
        lines[0][1] = ""  # nothing is skipped
    load = report["options"]["load"]
    text = (
        f"TPOT and TTFT at {report['requests_per_s_at_load']:.0f} requests a second on "
        f"{report['options']['replicas']} replicas ({load:.0%} of what is served with all layers); "
        f"{report['kv_limit_gb']:.0f} GB for keys and values on each. Means of "
        f"{report['options']['seeds']} seeds; in brackets their range."
    )
    return [*markdown(names, lines), "", text]


def _pairs(report: dict) -> list[tuple[Row, Row]]:
    """Return rows that differ in what happens to the memory of skipped layers."""
    found: dict[tuple[float, str], dict[str, Row]] = {}
    for row in report["rows"]:
        found.setdefault((row["skip_rate_asked"], row["masks"]), {})[row["kv"]] = row
    return [(one["freed"], one.get("reserved", one["freed"])) for one in found.values()]


def variants_table(reports: Sequence[tuple[str, dict]]) -> list[str]:
    """Return a table of throughput and time per token over all layers under other assumptions.

    Args:
        reports: what is other, and the report.
    """
    first = [(a, b) for a, b in _pairs(reports[0][1]) if a["skip_rate"]]
    names = ["assumption", "over all layers"]
    names += [f"{a['skip_rate']:.0%}, {FLEET_MASKS[a['masks']]}" for a, _ in first]
    kinds = (
        ("tokens/s, KV freed", 0, "tokens_per_s_ratio"),
        ("tokens/s, KV reserved", 1, "tokens_per_s_ratio"),
        ("TPOT at the load", 0, "tpot_ms_median_ratio"),
    )
    lines = []
    columns = [(a["skip_rate_asked"], a["masks"]) for a, _ in first]
    for name, report in reports:
        pairs = [pair for pair in _pairs(report) if pair[0]["skip_rate"]]
        if [(a["skip_rate_asked"], a["masks"]) for a, _ in pairs] != columns:
            raise ValueError(f"{name!r} has other rates or masks than {reports[0][0]!r}")
        for kind, which, ratio in kinds:
            lines.append([name, kind, *(f"{pair[which][ratio]:.2f}x" for pair in pairs)])
    return markdown(names, lines)
