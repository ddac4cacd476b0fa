# SPDX-License-Identifier: Apache-2.0
"""Rankings of layers are measured on other sets: the right masks, and the right differences."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from training import make_model, write_run

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SCRIPT = runpy.run_path(str(EXPERIMENTS / "transfer.py"), run_name="transfer")


def test_masks_are_those_of_the_rankings():
    model = make_model()
    layers = model.layer_count
    ahead, back = list(range(layers)), list(reversed(range(layers)))
    orders = {"a": ahead, "b": back, "c": [*back[1:], back[0]]}
    found = SCRIPT["masks_for"](model, orders, "a", 2 / layers)
    assert list(found) == ["a", "b", "c", "others", "unified"]
    skipped = {
        name: [layer for layer, kept in enumerate(found[name].keep.tolist()) if not kept]
        for name in ("a", "b", "c", "others")
    }
    assert skipped["a"] == [0, 1]
    assert skipped["b"] == [layers - 2, layers - 1]
    assert skipped["c"] == skipped["others"] == [layers - 3, layers - 2]
    assert sum(found["unified"].mask(0)) == layers - 2
    assert "others" not in SCRIPT["masks_for"](model, {"a": ahead}, "a", 0.5)


def test_a_worse_mask_is_above_the_own_one():
    own = np.linspace(1.0, 2.0, 20)
    worse = SCRIPT["above"](own + 0.3, own, np.arange(20))
    assert worse["above_own"] == pytest.approx(0.3)
    assert worse["above_own_ci95"] == pytest.approx([0.3, 0.3])
    assert SCRIPT["above"](own, own, np.arange(20))["above_own"] == 0


def test_it_ranks_and_measures_and_goes_on(tmp_path, byte_tokenizer, monkeypatch, capsys):
    folder, rows = write_run(tmp_path, byte_tokenizer)
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            with gzip.open(tmp_path / name / f"{split}.jsonl.gz", "wb") as file:
                file.write(rows.read_bytes() + b"\n" * (name == "three"))
    monkeypatch.setenv("FIRSTLM_DATA", str(tmp_path))
    output = tmp_path / "transfer.json"
    words = ["transfer", "--model", str(folder), "--tokens", "60", "--limit", "6"]
    words += ["--output", str(output), "--data", "one"]
    monkeypatch.setattr(sys, "argv", [*words, "three"])
    ranked = []
    globals_ = SCRIPT["main"].__wrapped__.__globals__
    real = globals_["removal_order"]

    def once(*arguments):
        if len(ranked) == 1:
            raise KeyboardInterrupt
        ranked.append(1)
        return real(*arguments)

    monkeypatch.setitem(globals_, "removal_order", once)
    with pytest.raises(KeyboardInterrupt):
        SCRIPT["main"]()
    monkeypatch.setitem(globals_, "removal_order", lambda *a: ranked.append(1) or real(*a))
    monkeypatch.setattr(sys, "argv", [*words, "two", "three"])  # with one set more
    SCRIPT["main"]()
    assert len(ranked) == 2  # two is the same file as one, three was still to do
    report = json.loads(output.read_text())
    assert [row["set"] for row in report["rows"]] == ["one", "two", "three"]
    for row in report["rows"]:
        assert row["items"] == 6
        # The same rows, so the same ranking.
        assert row["masks"]["one"] == row["masks"]["two"] == row["masks"]["others"]
        assert row["masks"]["one"]["above_own"] == 0
    assert not output.with_name("transfer.json.partial").exists()
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    tables = import_module("adaptivity_tables")
    names, _, *lines = tables.transfer_table([report])[2:]
    assert names == "| layers | one | two | three |"
    own = f"{report['rows'][0]['masks']['one']['loss']:.2f}"
    assert lines[1] == f"| ranked on one | {own} | +0.00 | +0.00 |"
    assert lines[2] == f"| ranked on two | +0.00 | {own} | +0.00 |"


def test_only_what_is_clear_of_0_stands_out(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    tables = import_module("adaptivity_tables")

    def row(name, **masks):
        found = {
            mask: {"loss": 1.0, "above_own": d, "above_own_ci95": ci}
            for mask, (d, *ci) in masks.items()
        }
        return {"set": f"qa/{name}", "items": 9, "all_layers": 0.5, "masks": found}

    masks = {
        "qa/a": (0, 0, 0),
        "qa/b": (0.2, 0.1, 0.3),
        "others": (-0.2, -0.4, 0.1),
        "unified": (-1, -2, -0.5),
    }
    report = {"model": "smollm2", "skipped": 0.25, "rows": [row("a", **masks), row("b", **masks)]}
    _, _, names, _, *lines = tables.transfer_table([report])
    assert names == "| layers | a | b |"
    assert lines == [
        "| all | 0.50 | 0.50 |",
        "| ranked on a | 1.00 | +0.00 |",
        "| ranked on b | **+0.20** | 1.00 |",
        "| ranked on all others | -0.20 | -0.20 |",
        "| equal distances | **-1.00** | **-1.00** |",
    ]


def test_a_set_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FIRSTLM_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["transfer", "--data", "qa/none", "--output", "x"])
    with pytest.raises(SystemExit):
        SCRIPT["main"]()
    assert "none/train.jsonl.gz" in capsys.readouterr().err
