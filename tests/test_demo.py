# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny model: both halves run, and the last line is the promised JSON object."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_byte_tokenizer, tiny_llama

from firstlm import FirstModel, cli, demo
from firstlm.thresholds import Threshold

KEYS = [
    "steps", "ce_before", "ce_after", "skip_rate", "layer_calls", "tpot_base_ms", "tpot_routed_ms",
    "tpot_ratio",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return (base, artifact): a saved tiny model and an untrained artifact for it."""
    folder = tmp_path_factory.mktemp("demo")
    base, tokenizer = tiny_llama(), make_byte_tokenizer()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = FirstModel.from_base(base, tokenizer=tokenizer)
    model.base_id = str(folder / "base")
    model.thresholds.table["skip"] = [Threshold(0.0, 9.0, 0.0), Threshold(0.5, -9.0, 0.5)]
    model.save_pretrained(str(folder / "artifact"))
    return folder / "base", folder / "artifact"


def test_both_halves_run_and_the_last_line_is_json(folders, tmp_path, capsys, monkeypatch):
    base, artifact = folders
    for name, small in (("EXAMPLES", 100), ("VALIDATION", 8), ("ROUNDS", 2)):
        monkeypatch.setattr(demo, name, small)
    monkeypatch.setattr(demo, "QUESTIONS", demo.QUESTIONS[:2])
    output = tmp_path / "demo"
    words = [
        "demo", "--artifact", artifact, "--model", base, "--output", output,
        "--router-steps", 3, "--lora-steps", 2,
        "--batch-size", 2, "--max-length", 400, "--max-new-tokens", 4,
    ]  # fmt: skip
    assert cli.main([*map(str, words)]) == 0
    out, err = capsys.readouterr()
    assert "3/3" in err  # progress of phase 1
    *text, last = out.rstrip("\n").split("\n")
    found = json.loads(last)
    assert list(found) == KEYS
    assert found["steps"] == 5
    assert 3 < found["ce_before"] < 8  # a random model: about ln 259
    assert 3 < found["ce_after"] < 8
    assert found["skip_rate"] == pytest.approx(0.25, abs=0.2)
    runs = demo.SHOWN * demo.ROUNDS
    assert 0 < found["layer_calls"]["prefill"] <= 4 * runs
    steps = demo.TIMED_TOKENS - 1
    assert found["layer_calls"]["decode"] == found["layer_calls"]["prefill"] * steps
    assert found["tpot_base_ms"] > 0
    ratio = found["tpot_routed_ms"] / found["tpot_base_ms"]
    assert found["tpot_ratio"] == pytest.approx(ratio, rel=0.01)
    shown = "\n".join(text)
    assert shown.count("lighthouse") >= 1
    assert shown.count("its author") == demo.SHOWN
    trained = FirstModel.from_pretrained(str(output))
    assert trained.has_adapter
    assert trained.policy_for(0.25) is not None


def test_numbers_are_in_bfloat16_only_where_that_is_faster(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert demo.fast_dtype() == "float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert demo.fast_dtype() == "bfloat16"
