# SPDX-License-Identifier: Apache-2.0
"""Tables of README and docs: every figure stands under its own head."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from firstlm.sections import Section

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _experiments(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


def test_a_line_has_a_cell_for_each_name():
    markdown = import_module("markdown_table").markdown
    assert markdown(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    for line in (["1"], ["1", "2", "3"]):
        with pytest.raises(ValueError, match=r"expected 2 cells \(a, b\)"):
            markdown(["a", "b"], [["1", "2"], line])


def test_a_rate_that_was_not_measured_leaves_no_other_in_its_place():
    tables = import_module("speed_tables")
    report = json.loads((ROOT / "results" / "bench_smollm2.json").read_text())
    whole = tables.bench_table(report, 1)
    report["rows"].sort(key=lambda row: -row["skip_rate"])
    assert sorted(tables.bench_table(report, 1)) == sorted(whole)  # each under its rate
    rate = min(row["skip_rate"] for row in report["rows"] if row["skip_rate"])
    report["rows"] = [
        row
        for row in report["rows"]
        if (row["engine"], row["dtype"], row["skip_rate"]) != ("fast", "bfloat16", rate)
    ]
    with pytest.raises(ValueError, match="was not measured at each of"):
        tables.bench_table(report, 1)


def test_fleets_of_other_rates_are_not_put_side_by_side():
    tables = import_module("capacity_tables")
    report = json.loads((ROOT / "results" / "fleet_llama3_8b.json").read_text())
    rates = sorted({row["skip_rate_asked"] for row in report["rows"]})
    fewer = {
        **report,
        "rows": [row for row in report["rows"] if row["skip_rate_asked"] != rates[1]],
    }
    assert len(tables.variants_table([("as above", report), ("same", report)])) == 8
    with pytest.raises(ValueError, match="'fewer' has other rates"):
        tables.variants_table([("as above", report), ("fewer", fewer)])


def test_one_artifact_on_two_sets_is_held_against_its_own_majority_on_both():
    tables = import_module("adaptivity_tables")
    below = {"value": -1.0, "low": -2.0, "high": -0.5, "seeds": 1, "skip_rate_above": 0.0}
    above = {"value": 2.0, "low": 1.0, "high": 3.0, "seeds": 2, "skip_rate_above": 0.0}
    others = {"policy": "majority", "mask_of": "elsewhere", **above}

    def row(arm, *gains):
        found = {"file": "mix", "arm": arm, "skip_rate_asked": 0.25, "distinct_masks": 2.0}
        return found | {"mask_entropy": 0.5, "mask_of": "clustered", "gains": gains}

    def gain(arm, lora_of, **more):
        found = {"arm": arm, "policy": "majority", "lora_of": lora_of, "mask_of": "clustered"}
        return found | more

    found = {
        Section("mix", "qa"): [
            row(
                "clustered",
                gain("clustered", "first", **above),
                gain("majority", "majority", **below),
                {"arm": "m", "lora_of": "majority", **others},
            )
        ],
        Section("mix", "news"): [
            row(
                "clustered_news",
                gain("clustered_news", "first", **below),
                gain("majority_news", "majority", **above),
            )
        ],
    }
    _, _, questions, news, _, said = tables.adaptivity_table(found)
    assert questions.split(" | ")[4:6] == [
        "+2.0 (+1.0 to +3.0), 2 seeds",
        "-1.0 (-2.0 to -0.5), 1 seed",
    ]
    assert news.split(" | ")[4:6] == [
        "-1.0 (-2.0 to -0.5), 1 seed",
        "+2.0 (+1.0 to +3.0), 2 seeds",
    ]
    assert "1 (below it in 0) of 1 comparisons of two seeds or more" in said
    assert "0 (below it in 1) of 1 comparisons of one seed" in said
