# SPDX-License-Identifier: Apache-2.0
"""`firstlm inspect` reads an artifact's files, and says which of them is wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from firstlm import cli
from firstlm.errors import ArtifactError
from firstlm.inspect_artifact import BARS, bars, describe, read_artifact

LAYERS, HIDDEN = 12, 8


@pytest.fixture
def artifact(tmp_path):
    """Write an artifact by hand, file by file, as its format says."""
    folder = tmp_path / "art"
    (folder / "adapter").mkdir(parents=True)
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"{layer}.weight"] = torch.full((HIDDEN,), float(layer))
        tensors[f"{layer}.bias"] = torch.tensor(2.0 - layer)
    save_file(tensors, folder / "routers.safetensors")
    matrices = {
        "a.lora_A.weight": torch.zeros(4, HIDDEN),
        "a.lora_B.weight": torch.zeros(HIDDEN, 4),
    }
    save_file(matrices, folder / "adapter" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "lora_dropout": 0.0}
    adapter["target_modules"] = ["v_proj", "q_proj"]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    config = {
        "format_version": 1,
        "firstlm_version": "0.1.0",
        "base_model": {"id": "some/base", "revision": "abc123", "fingerprint": "f00d.-.-"},
        "router_config": {"unit": "attention", "init_bias": 2.0},
        "layers": LAYERS,
        "thresholds": {
            "skip": [[0.15, -0.5, 0.148, [0, 0, 0.6]], [0.25, 0.125, 0.251, [0, 0.2, 0.8]]]
        },
        "training": {"options": {"lora_lr": 0.001}},
        "results": {
            "qa": {
                "data": "d",
                "count": 1,
                "prefill": "skip",
                "weights": "float32",
                "runs": {"base": {"skip_rate": 0.0, "F1": 0.75}},
            }
        },
    }
    (folder / "first_config.json").write_text(json.dumps(config))
    return folder


def change(artifact, **values):
    file = artifact / "first_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_people_see_what_is_in_it(artifact, capsys):
    assert cli.main(["inspect", str(artifact)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "some/base at abc123",
        "12 of unit attention, reading 8 values",
        "rank 4, alpha 16",
        "q_proj, v_proj",
        "lora_lr: 0.001",
        "F1: 0.75",
        "routers.safetensors",
    ):
        assert part in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["15.0%", "14.8%", "-0.5000", "▁▁█"] in rows
    assert ["25.0%", "25.1%", "+0.1250", "▁▃█"] in rows


def test_a_plain_terminal_shows_it_too(artifact):
    done = subprocess.run(
        [sys.executable, "-m", "firstlm", "inspect", str(artifact)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "12 of unit attention" in done.stdout


def test_programs_get_one_json_object(artifact, capsys):
    assert cli.main(["inspect", str(artifact), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["routers"]["bias"] == [2.0 - layer for layer in range(LAYERS)]
    assert found["routers"]["weight_norm"] == pytest.approx(
        [layer * HIDDEN**0.5 for layer in range(LAYERS)]
    )
    assert found["adapter"]["parameters"] == 8 * HIDDEN
    assert found["adapter"]["targets"] == ["q_proj", "v_proj"]
    assert found["bytes"]["first_config.json"] == (artifact / "first_config.json").stat().st_size


def test_routers_only_and_uncalibrated(artifact):
    for file in (artifact / "adapter").iterdir():
        file.unlink()
    (artifact / "adapter").rmdir()
    change(artifact, thresholds={})
    shown = describe(read_artifact(artifact))
    assert "none: routers only" in shown
    assert "firstlm calibrate" in shown


def test_routers_that_diverged_are_named(artifact):
    tensors = load_file(artifact / "routers.safetensors")
    tensors["3.weight"] = torch.full((HIDDEN,), float("nan"))
    save_file(tensors, artifact / "routers.safetensors")
    assert "not finite at layer 3" in describe(read_artifact(artifact))


def test_strip_runs_from_the_smallest_to_the_largest():
    assert bars([0.0, 1.0, 2.0, 7.0]) == BARS[0] + BARS[1] + BARS[2] + BARS[7]
    assert bars([5.0, 5.0]) == BARS[0] * 2
    assert bars([1.0, float("nan")]) == BARS[0] + "!"
    assert bars([]) == ""


def remove(artifact, name):
    (artifact / name).unlink()


def cut(artifact, name):
    file = artifact / name
    file.write_bytes(file.read_bytes()[:20])


def drop_router(artifact, _):
    tensors = load_file(artifact / "routers.safetensors")
    del tensors["11.bias"]
    save_file(tensors, artifact / "routers.safetensors")


def lose_adapter(artifact, _):
    change(artifact, adapter=True)
    shutil.rmtree(artifact / "adapter")


@pytest.mark.parametrize(
    ("harm", "name", "says"),
    [
        (remove, "first_config.json", "first_config.json"),
        (cut, "first_config.json", "first_config.json"),
        (remove, "routers.safetensors", "routers.safetensors"),
        (cut, "routers.safetensors", "routers.safetensors"),
        (drop_router, "", "11.bias"),
        (remove, "adapter/adapter_config.json", "adapter"),
        (cut, "adapter/adapter_config.json", "adapter"),
        (cut, "adapter/adapter_model.safetensors", "adapter"),
        (lambda artifact, _: change(artifact, format_version=2), "", "format 2"),
        (lambda artifact, _: change(artifact, layers=30), "", "30 layers"),
        (lambda artifact, _: change(artifact, layers="six"), "", "layers is no number"),
        (lambda artifact, _: change(artifact, thresholds={"skip": 3}), "", "damaged"),
        (lambda artifact, _: change(artifact, thresholds={"skip": [[0.1]]}), "", "damaged"),
        (lambda artifact, _: change(artifact, thresholds=[]), "", "damaged"),
        (
            lambda artifact, _: change(artifact, thresholds={"skip": [[0.1, math.nan, 0.1, []]]}),
            "",
            "a threshold is no number",
        ),
        (lambda artifact, _: change(artifact, base_model={}), "", "base_model lacks"),
        (lambda artifact, _: change(artifact, base_model="x"), "", "damaged"),
        (lambda artifact, _: change(artifact, router_config=[]), "", "damaged"),
        (lambda artifact, _: change(artifact, results=3), "", "damaged"),
        (lambda artifact, _: change(artifact, policy={"name": "foo"}), "", "damaged"),
        (lose_adapter, "", "saved with LoRA, but adapter/adapter_model.safetensors is missing"),
    ],
)
def test_damage_is_named(artifact, capsys, harm, name, says):
    harm(artifact, name)
    with pytest.raises(ArtifactError, match=says):
        read_artifact(artifact)
    assert cli.main(["inspect", str(artifact)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
