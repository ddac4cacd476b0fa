# SPDX-License-Identifier: Apache-2.0
"""`firstlm bench` on a tiny model: what it reports is what ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_byte_tokenizer, tiny_llama
from families import make_model

from firstlm import FirstModel
from firstlm.bench import bandwidth, row_of
from firstlm.cells import Cell, at_random, count_bytes, count_compute, evenly
from firstlm.cli import main
from firstlm.command_config import BenchConfig
from firstlm.peers import Peer, PeerMaker
from firstlm.probes import peak_bytes


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run the command once, on six layers in a folder."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_llama(layers=6, hidden=64).save_pretrained(folder / "model")
    make_byte_tokenizer().save_pretrained(folder / "model")
    return folder, folder / "out" / "bench.json"


def call(folder: Path, *more: str) -> int:
    words = ["bench", "--model", str(folder / "model"), "--rounds", "6", "--prefill-rounds", "2"]
    if "--batch-sizes" not in more:
        more = ("--batch-sizes", "1", *more)
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
        assert row["peak_bytes"] > 100e6  # all of this process
        assert (row["realised_over_ideal"] is None) == (row is full)
        # MB over GB/s are ms.
        assert row["roofline_ms"] == pytest.approx(row["step_mb"] / found["bandwidth_gb_s"])
    assert 0 < found["router_overhead"] < 1
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


def test_the_cut_model_mixed_masks_and_peers_run_beside(
    report: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = report
    more = ["--skip-rates", "0.5", "--batch-sizes", "1", "3", "--engines", "fast"]
    more += ["--compare", "cut", "mixed", "--peers", "transformers", "economize", "llama_cpp"]
    assert call(folder, *more, "--peer-rounds", "2", "--peer-tokens", "4") == 0
    out = capsys.readouterr().out
    assert "llama_cpp is left out at a skip rate of 0.5: it needs a model" in out
    assert "pip install" not in out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {(r["engine"], r["masks"], r["batch"]) for r in rows if r["skip_rate_asked"]} == {
        *((engine, "shared", batch) for engine in ("fast", "cut") for batch in (1, 3)),
        ("fast", "mixed", 3),
        ("transformers", "shared", 1),
        ("economize-skipdecode", "shared", 1),
        ("economize-depth_prune", "shared", 1),
    }
    for row in rows:
        halved = row["skip_rate_asked"] == 0.5
        assert row["skip_rate"] == (0.5 if halved else 0.0)
        if "over_fast" in row:
            ratios = {x["skip_rate_asked"]: x["tpot_ratio"] for x in row["over_fast"]}
            assert ratios.keys() == {0.0, 0.5}
            assert min(ratios.values()) > 0
            assert row["kv_bytes"] is None
            continue
        assert (row["tpot_over_cut"] is not None) == (
            row["engine"] == "fast" and row["masks"] == "shared" and halved
        )
        assert (row["tpot_over_shared"] is not None) == (row["masks"] == "mixed")
        assert row["layer_calls"] >= (3 if halved else 6)
        assert 0 < row["roofline_share"] < 1
    mixed = next(r for r in rows if r["masks"] == "mixed")
    same = next(r for r in rows if r["engine"] == "fast" and r["batch"] == 3 and r is not mixed)
    assert mixed["layer_calls"] > 3  # of layers that some row keeps
    assert mixed["kv_bytes"] * 2 == same["kv_bytes"]


def test_a_peer_that_fails_loses_no_rows(
    report: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = report

    def fail(*_: Any) -> None:
        raise RuntimeError("the peer's own")

    monkeypatch.setattr(PeerMaker, "economize", fail)
    peer = Peer("transformers", "float32", torch.ones(6).bool(), fail)
    monkeypatch.setattr(PeerMaker, "transformers", lambda *_: [peer])
    more = ["--engines", "hf", "--skip-rates", "0.5", "--peers", "economize", "transformers"]
    assert call(folder, *more, "--output", str(tmp_path / "out.json")) == 0
    out = capsys.readouterr().out
    for name in ("economize", "transformers"):
        assert f"{name} is left out at a skip rate of 0.5: RuntimeError: the peer's own" in out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["skip_rate"] for row in rows] == [0.0, 0.5]
    assert json.loads(out.splitlines()[-1])["rows"] == rows


def test_ideal_is_the_share_of_bytes_and_realised_is_what_was_saved() -> None:
    first = FirstModel.from_base(tiny_llama())
    options = BenchConfig()

    def cell(rate: float, keep: list[int], ttft: list[float], steps: list[float]) -> Cell:
        mask = torch.tensor([keep]).bool()
        return Cell(first, "hf", "same", 1, rate, mask, ttft=ttft, steps=steps)

    full = cell(0.0, [1, 1, 1, 1], [4.0, 4.0], [10.0, 12.0, 11.0])
    half = cell(0.5, [1, 0, 0, 1], [2.0, 3.0], [7.0, 9.0, 8.0])
    for one in (full, half):
        count_bytes(one, first, tokens=20)
        count_compute(one, first, tokens=10)
    numbers = sum(p.numel() for p in first.base.model.layers[0].parameters())
    layer = 4 * numbers + 2 * 2 * 8 * 4 * 20
    head = 259 * 32 * 4
    assert half.step_bytes == full.step_bytes == 4 * layer + head
    assert half.skipped_bytes == 2 * layer
    row = row_of(half, [full, half], options, bytes_per_s=1e6)
    assert row["tpot_ratio"] == pytest.approx(8 / 11)
    assert row["realised_over_ideal"] == pytest.approx(3 / (11 * 2 * layer / (4 * layer + head)))
    assert row["roofline_share"] == pytest.approx((2 * layer + head) / 1e6 / 8)
    share = 2 * numbers / (4 * numbers + 259 * 32 / 10)
    assert row["ttft_realised_over_ideal"] == pytest.approx(1.5 / 4 / share)
    assert row_of(full, [full, half], options, bytes_per_s=1e6)["realised_over_ideal"] is None


def test_a_layer_that_some_row_keeps_is_read() -> None:
    first = FirstModel.from_base(tiny_llama())
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0]]).bool()
    cell = Cell(first, "hf", "same", 2, 0.5, mask, "mixed")
    count_bytes(cell, first, tokens=20)
    kv = 2 * 2 * 8 * 4 * 20
    weights = sum(p.nbytes for p in first.base.model.layers[0].parameters())
    assert cell.skipped_bytes == weights + 4 * kv


@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_random_masks_differ_and_skip_what_was_asked(count: int) -> None:
    keep = at_random(count, range(6), 6, rows=16, seed=0)
    assert ((~keep).sum(1) == count).all()
    assert torch.equal(keep, at_random(count, range(6), 6, rows=16, seed=0))
    if count in (1, 3):
        assert len({tuple(row) for row in keep.tolist()}) > 1
        assert keep[:, [0, 5]].all()


def test_bandwidth_is_of_this_world() -> None:
    assert 1e8 < bandwidth(torch.device("cpu"), megabytes=16, rounds=3) < 1e13


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_that_of_a_call_and_not_of_what_came_before() -> None:
    def large() -> None:
        torch.ones(100, 2**20).sum()

    device = torch.device("cpu")
    large()
    before = peak_bytes(device, lambda: None)
    most = peak_bytes(device, large)
    assert before is not None
    assert most is not None
    assert most - before > 300 * 2**20
    assert (peak_bytes(device, lambda: None) or 0) < most - 300 * 2**20
