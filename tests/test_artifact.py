# SPDX-License-Identifier: Apache-2.0
"""Artifacts come back as they were saved, and damaged or foreign ones are refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, decode, make_model, mixed
from safetensors.torch import load_file, save_file

from firstlm import FirstModel, FixedMask, RouterConfig, artifact, artifact_files
from firstlm.errors import ArtifactError, ConfigError
from firstlm.lora import lora_parameters
from firstlm.thresholds import Threshold

NEW = 4

SCORES = {"base": {"skip_rate": 0.0, "F1": 5.0}}
RESULTS = {"qa": {"data": "d", "count": 1, "prefill": "skip", "weights": "float32", "runs": SCORES}}


def trained(unit: str = "block", adapter: bool = True, seed: int = 1) -> FirstModel:
    """Return a FirstModel whose routers, thresholds and LoRA all differ from fresh ones."""
    from peft import LoraConfig, get_peft_model

    base = make_model("llama", torch.float32)
    torch.manual_seed(seed)
    if adapter:
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        base = get_peft_model(base, config).eval()
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
    first = FirstModel.from_base(base, RouterConfig(unit=unit))
    for router in first.routers:
        router.weight.data.normal_(0, 3)
        router.bias.data.normal_()
    first.thresholds.table = {
        "skip": [
            Threshold(0.1, 0.5, 0.11, (0.0, 0.33, 0.11, 0.0)),
            Threshold(0.5, -2.0, 0.52, (1.0, 0.75, 0.33, 0.0)),
        ]
    }
    first.training_record = {"seed": 7}
    first.results = RESULTS
    return first


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write more, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    trained().save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_everything_comes_back(unit: str, adapter: bool, tmp_path: Path) -> None:
    first = trained(unit, adapter)
    ids, mask = batch()
    wanted = first.generate(ids, mask, skip_rate=0.3, max_new_tokens=NEW)
    assert 0 < wanted.keep.float().mean() < 1
    fixed = decode(first, ids, mask, NEW, policy=FixedMask(mixed(4)))
    first.save_pretrained(str(tmp_path / "artifact"))
    again = FirstModel.from_pretrained(
        str(tmp_path / "artifact"), base=make_model("llama", torch.float32)
    )
    assert again.router_config == first.router_config
    assert again.thresholds == first.thresholds
    assert again.training_record == {"seed": 7}
    assert again.results == RESULTS
    assert again.has_adapter == adapter
    assert not again.training
    for ours, theirs in zip(again.routers, first.routers, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    found = again.generate(ids, mask, skip_rate=0.3, max_new_tokens=NEW)
    assert torch.equal(found.keep, wanted.keep)
    assert torch.equal(found.sequences, wanted.sequences)
    refixed = decode(again, ids, mask, NEW, policy=FixedMask(mixed(4)))
    assert torch.equal(refixed[0], fixed[0])
    assert torch.equal(refixed[1], fixed[1])


def test_others_may_read_what_the_umask_lets_them(saved: Path) -> None:
    os.umask(umask := os.umask(0))
    modes = {file.stat().st_mode & 0o777 for file in saved.rglob("*") if file.is_file()}
    assert modes == {0o666 & ~umask}


def test_peft_reads_the_adapter_by_itself(saved: Path) -> None:
    from peft import PeftModel

    ids, mask = batch()
    first = trained()
    with first.run_all():
        wanted = decode(first, ids, mask, NEW)
    plain = PeftModel.from_pretrained(make_model("llama", torch.float32), str(saved / "adapter"))
    found = decode(plain.eval(), ids, mask, NEW)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-5)


def test_a_newer_save_takes_the_place_of_the_older(saved: Path) -> None:
    trained("mlp", adapter=False).save_pretrained(str(saved))
    again = FirstModel.from_pretrained(str(saved), base=make_model("llama", torch.float32))
    assert again.router_config.unit == "mlp"
    assert not again.has_adapter


def change_config(folder: Path, **new: Any) -> None:
    file = folder / "first_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


def load(folder: Path, base: Any = None) -> FirstModel:
    return FirstModel.from_pretrained(
        str(folder), base=make_model("llama", torch.float32) if base is None else base
    )


def test_missing_files_and_folders(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        load(saved / "nowhere")
    (saved / "routers.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"routers\.safetensors cannot be read"):
        load(saved)
    (saved / "first_config.json").unlink()
    with pytest.raises(ArtifactError, match=r"it has no first_config\.json"):
        load(saved)


@pytest.mark.parametrize("file", ["routers.safetensors", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_corrupt_weights(saved: Path, file: str, damage: str) -> None:
    whole = (saved / file).read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "noise": b"\xff" * len(whole), "empty": b""}
    (saved / file).write_bytes(damaged[damage])
    with pytest.raises(ArtifactError, match="cannot be"):
        load(saved)


def test_damaged_configs(saved: Path) -> None:
    intact = (saved / "first_config.json").read_text()
    change_config(saved, format_version=99)
    with pytest.raises(ArtifactError, match=r"has format 99; .* Upgrade"):
        load(saved)
    change_config(saved, format_version=1, router_config={"unit": "sideways"})
    with pytest.raises(ArtifactError, match="damaged"):
        load(saved)
    change_config(saved, router_config={"unit": "block"}, thresholds={"skip": [[1]]})
    with pytest.raises(ArtifactError, match="damaged"):
        load(saved)
    change_config(saved, thresholds={}, base_model={"id": "x"})
    with pytest.raises(ArtifactError, match="lacks id or fingerprint"):
        load(saved)
    change_config(saved, base_model=json.loads(intact)["base_model"], results={"qa": 0.5})
    with pytest.raises(ArtifactError, match=r"results of 'qa'.*--record"):
        load(saved)
    runs = {"base": {"skip_rate": 0.0, "F1": 1.0}, "router": {"skip_rate": 0.2}}
    change_config(saved, results={"qa": {**RESULTS["qa"], "runs": runs}})
    with pytest.raises(ArtifactError, match=r"results of 'qa'.*same scores"):
        load(saved)
    for text in ("{", "[]", "{}"):
        (saved / "first_config.json").write_text(text)
        with pytest.raises(ArtifactError, match="damaged"):
            load(saved)


def test_routers_that_do_not_fit(saved: Path) -> None:
    file = saved / "routers.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"4.weight": torch.zeros(32)}, file)
    with pytest.raises(ArtifactError, match="layers the model lacks"):
        load(saved)
    save_file(tensors | {"2.weight": torch.zeros(31)}, file)
    with pytest.raises(ArtifactError, match=r"2\.weight is of shape \(31,\); expected \(32,\)"):
        load(saved)
    del tensors["0.bias"]
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"0\.bias is missing"):
        load(saved)


def test_other_base_models_are_refused(saved: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not for .*signs agree"):
        load(saved, make_model("llama", torch.float32, seed=5))
    with pytest.raises(ArtifactError, match="another architecture"):
        load(saved, make_model("qwen2", torch.float32))
    with pytest.raises(ArtifactError, match="another architecture"):
        load(saved, make_model("llama", torch.float32, num_hidden_layers=6))


def test_the_base_is_taken_at_the_revision_it_was_trained_at(saved: Path, monkeypatch) -> None:
    asked = []

    def load_base(name: str, **options: Any) -> tuple[Any, Any]:
        asked.append((name, options.get("revision")))
        return make_model("llama", torch.float32), None

    monkeypatch.setattr(artifact, "load_base", load_base)
    wanted = {"id": "some/base", "revision": "abc123"}
    fingerprint = json.loads((saved / "first_config.json").read_text())["base_model"]["fingerprint"]
    change_config(saved, base_model=wanted | {"fingerprint": fingerprint})
    FirstModel.from_pretrained(str(saved))
    FirstModel.from_pretrained(str(saved), base="some/base")
    FirstModel.from_pretrained(str(saved), base="copy/of-it")
    assert asked == [("some/base", "abc123"), ("some/base", "abc123"), ("copy/of-it", None)]


def test_the_same_base_in_other_clothes_is_taken(saved: Path) -> None:
    assert load(saved, make_model("llama", torch.bfloat16)).has_adapter
    tuned = make_model("llama", torch.float32)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    assert load(tuned_folder := saved, tuned).has_adapter
    assert tuned_folder.is_dir()


def test_a_full_disk_leaves_the_old_artifact_whole(saved: Path) -> None:
    before = contents(saved)
    for size in (100, 800, 3000):  # in the config, in the routers, in the adapter
        with (
            files_no_larger_than(size),
            pytest.raises(ArtifactError, match="what was there before is whole"),
        ):
            trained(seed=2).save_pretrained(str(saved))
        assert contents(saved) == before
        assert [p.name for p in saved.parent.iterdir()] == ["artifact"]
    again = FirstModel.from_pretrained(str(saved), base=make_model("llama", torch.float32))
    assert torch.equal(again.routers[0].weight, trained().routers[0].weight)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "artifact").write_text("precious")
    with pytest.raises(ArtifactError, match="is a file, so"):
        trained().save_pretrained(str(tmp_path / "artifact"))
    assert (tmp_path / "artifact").read_text() == "precious"


def test_a_load_that_fails_leaves_the_base_model_alone(saved: Path) -> None:
    tensors = load_file(saved / "routers.safetensors")
    del tensors["3.bias"]
    save_file(tensors, saved / "routers.safetensors")
    base = make_model("llama", torch.float32)
    names = list(base.state_dict())
    with pytest.raises(ArtifactError, match=r"3\.bias is missing"):
        load(saved, base)
    assert list(base.state_dict()) == names
    assert "forward" not in base.model.layers[0].__dict__


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_lora_has_the_bases_number_format_where_that_loses_nothing(saved: Path, kept, tmp_path):
    """Casting it for every linear layer takes longer than the layers do."""
    model = load(saved, make_model("llama", torch.float32))
    model.adapter_dtype = kept
    model.save_pretrained(str(tmp_path / "kept"))
    for base in (torch.bfloat16, torch.float32):
        found = load(tmp_path / "kept", make_model("llama", base))
        exact = torch.float32 if torch.float32 in (kept, base) else base
        assert {p.dtype for p in lora_parameters(found).values()} == {exact}
    ids = torch.tensor([[5, 6, 7, 8]])
    assert found.generate(ids, max_new_tokens=3).sequences.shape[1] > 4


def test_merged_lora_is_not_lost_by_saving(tmp_path: Path) -> None:
    first = trained().merge_and_unload()
    with pytest.raises(ArtifactError, match="merged"):
        first.save_pretrained(str(tmp_path / "artifact"))
    assert not (tmp_path / "artifact").exists()


def test_merged_lora_cannot_be_turned_off(saved: Path) -> None:
    model = load(saved).merge_and_unload()
    with pytest.raises(ConfigError, match="load the artifact again"):
        model.disable_adapter()


def test_a_base_that_is_no_model(saved: Path) -> None:
    with pytest.raises(ConfigError, match="base is int; expected a transformers model"):
        FirstModel.from_pretrained(str(saved), base=3)  # type: ignore[arg-type]


def test_a_base_with_an_adapter_is_refused(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="adapter already"):
        load(saved, trained().detach())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_adapter_is_no_artifact_without_one(saved: Path, name: str) -> None:
    (saved / "adapter" / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        load(saved)
    shutil.rmtree(saved / "adapter")
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is missing"):
        load(saved)


def test_routers_that_are_no_numbers(saved: Path) -> None:
    tensors = load_file(saved / "routers.safetensors")
    tensors["1.bias"] = torch.tensor(float("nan"))
    save_file(tensors, saved / "routers.safetensors")
    with pytest.raises(ArtifactError, match=r"1\.bias holds values that are no numbers"):
        load(saved)


def test_scores_that_do_not_belong_together_are_not_recorded(saved: Path) -> None:
    before = {f: f.read_bytes() for f in saved.rglob("*") if f.is_file()}
    for runs in ({}, {"base": {"F1": 1.0}}, {"base": {"skip_rate": 0.0, "F1": "good"}}):
        with pytest.raises(ArtifactError, match="same scores"):
            artifact_files.record(saved, "qa", {**RESULTS["qa"], "runs": runs})
    assert {f: f.read_bytes() for f in saved.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("owner/base-1", "base_model: owner/base-1"),
        ("smollm2", "base_model: HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/someone/base", None),
        ("models/mine/base", None),
        (None, None),
    ],
)
def test_the_model_card_names_a_base_that_others_can_find(saved, name, field) -> None:
    model = load(saved)
    model.base_id = name
    model.save_pretrained(str(saved))
    card = (saved / "README.md").read_text().split("\n")
    assert [line for line in card if line.startswith("base_model")] == ([field] if field else [])
    assert not any("/home" in line or "None" in line for line in card)


def test_lora_that_is_no_numbers(saved: Path) -> None:
    file = saved / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"adapter_model.*no numbers"):
        load(saved)


def test_merging_gives_the_plain_base_back(saved: Path) -> None:
    model = load(saved)
    kind = type(model.plain_base)
    assert type(model.detach()) is not kind
    model = load(saved).merge_and_unload()
    assert type(model.detach()) is kind
