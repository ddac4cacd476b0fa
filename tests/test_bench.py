# SPDX-License-Identifier: Apache-2.0
"""`firstlm bench` on a tiny model: what it reports is what ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_byte_tokenizer, tiny_llama
from families import make_model

from firstlm import FirstModel
from firstlm.bench import Cell, bandwidth, count_bytes, evenly, row_of
from firstlm.cli import main
from firstlm.command_config import BenchConfig


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run the command once, on six layers in a folder."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_llama(layers=6, hidden=64).save_pretrained(folder / "model")
    make_byte_tokenizer().save_pretrained(folder / "model")
    return folder, folder / "out" / "bench.json"


def call(folder: Path, *more: str) -> int:
    words = ["bench", "--model", str(folder / "model"), "--rounds", "6", "--prefill-rounds", "2"]
    return main([*words, "--prompt-tokens", "9", *more])


def test_every_combination_is_measured_and_the_last_line_is_json(
    report: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = report
    more = ["--skip-rates", "0.5", "0.3", "--batch-sizes", "1", "3", "--weights", "same", "int8"]
    assert call(folder, *more, "--output", str(output)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(output.read_text())
    cells = {(r["engine"], r["dtype"], r["batch"], r["skip_rate_asked"]) for r in found["rows"]}
    kinds = [("fast", "float32"), ("fast", "int8"), ("hf", "float32")]
    assert cells == {(*k, b, r) for k in kinds for b in (1, 3) for r in (0.0, 0.3, 0.5)}
    for row in found["rows"]:
        kept = {0.0: 6, 0.3: 4, 0.5: 3}[row["skip_rate_asked"]]
        assert row["layer_calls"] == kept
        assert row["skip_rate"] == pytest.approx(1 - kept / 6)
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["tpot_ms"])
        full = next(
            r
            for r in found["rows"]
            if r["skip_rate"] == 0 and all(r[k] == row[k] for k in ("engine", "dtype", "batch"))
        )
        assert row["kv_bytes"] * 6 == full["kv_bytes"] * kept
        assert (row["realised_over_ideal"] is None) == (row is full)
    assert 0 < found["router_overhead"] < 1
    assert found["bandwidth_gb_s"] > 0
    assert found["provenance"]["torch"]


def test_bad_options_are_refused(
    report: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = report
    assert call(folder, "--skip-rates", "1.0") == 2
    make_model("bloom").save_pretrained(folder / "bloom")
    make_byte_tokenizer().save_pretrained(folder / "bloom")
    with pytest.warns(UserWarning, match="position_ids"):
        assert main(["bench", "--model", str(folder / "bloom")]) == 2
    assert call(folder, "--engines", "slow") == 2
    assert call(folder, "--output", str(folder)) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("count", range(31))
def test_masks_skip_exactly_what_was_asked_and_the_ends_last(count: int) -> None:
    keep = evenly(count, range(30), 30)
    assert int((~keep).sum()) == count
    assert count > 28 or bool(keep[0] and keep[-1])


def test_ideal_is_the_share_of_bytes_and_realised_is_what_was_saved() -> None:
    first = FirstModel.from_base(tiny_llama())
    options = BenchConfig()
    full = Cell("hf", "same", 1, 0.0, torch.ones(4).bool(), ttft=[1.0], steps=[10.0, 12.0, 11.0])
    half = Cell(
        "hf", "same", 1, 0.5, torch.tensor([1, 0, 0, 1]).bool(), ttft=[1.0], steps=[7.0, 9.0, 8.0]
    )
    for cell in (full, half):
        count_bytes(cell, first, tokens=20)
    layer = sum(p.nbytes for p in first.base.model.layers[0].parameters()) + 2 * 2 * 8 * 4 * 20
    head = 259 * 32 * 4
    assert half.step_bytes == full.step_bytes == 4 * layer + head
    assert half.skipped_bytes == 2 * layer
    row = row_of(half, [full, half], options, first)
    assert row["tpot_ratio"] == pytest.approx(8 / 11)
    assert row["realised_over_ideal"] == pytest.approx(3 / (11 * 2 * layer / (4 * layer + head)))


def test_bandwidth_is_of_this_world() -> None:
    assert 1e8 < bandwidth(torch.device("cpu"), megabytes=16, rounds=3) < 1e13
