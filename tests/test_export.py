# SPDX-License-Identifier: Apache-2.0
"""An export computes what the artifact does with that mask, in transformers and from GGUF."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_byte_tokenizer, tiny_llama
from families import make_model
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from firstlm import FirstModel, FixedMask, RouterConfig
from firstlm.cli import main
from firstlm.errors import ConfigError, UnsupportedModelError
from firstlm.export import arranged, with_lora, write_folder, write_gguf
from firstlm.pretrained import load_base

LAYERS = 6
KEPT = [True, False, True, True, False, True]
IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with LoRA, and its base model."""
    where = tmp_path_factory.mktemp("export")
    tiny_llama(layers=LAYERS).save_pretrained(where / "base")
    make_byte_tokenizer().save_pretrained(where / "base")
    base, tokenizer = load_base(str(where / "base"))
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    model = FirstModel.from_base(wrapped, tokenizer=tokenizer)
    model.save_pretrained(str(where / "artifact"))
    return where


def wanted(folder: Path) -> torch.Tensor:
    """Return the artifact's logits with the mask, which LoRA changes."""
    model = FirstModel.from_pretrained(str(folder / "artifact"), base=str(folder / "base"))
    with torch.no_grad():
        found = model(IDS, policy=FixedMask(KEPT))[0].logits
        with model.disable_adapter():
            assert not torch.allclose(found, model(IDS, policy=FixedMask(KEPT))[0].logits)
    return found


def export(folder: Path, output: Path | str, *more: str) -> int:
    words = ["export", str(folder / "artifact"), "--model", str(folder / "base")]
    return main([*words, "--output", str(output), *more])


def test_merged_it_is_a_plain_model(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    assert export(folder, output, "--mask", "0,2-3,5", "--merge-lora") == 0
    small = AutoModelForCausalLM.from_pretrained(output)
    assert small.config.num_hidden_layers == 4
    with torch.no_grad():
        torch.testing.assert_close(small(IDS).logits, wanted(folder), atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(output)("bee").input_ids
    record = json.loads((output / "firstlm_export.json").read_text())
    assert record["keep"] == KEPT
    assert record["lora"] == "merged"
    assert not (output / "adapter").exists()


def test_lora_that_is_not_merged_stands_beside_it(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    assert export(folder, output, "--mask", "0,2-3,5") == 0
    plain = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        bare = plain(IDS).logits
        both = PeftModel.from_pretrained(plain, output / "adapter")(IDS).logits
    torch.testing.assert_close(both, wanted(folder), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(bare, both)
    named = PeftConfig.from_pretrained(output / "adapter").base_model_name_or_path
    assert named == str(output)


SETTINGS: dict[str, dict[str, Any]] = {
    "layers": {"layers_to_transform": [2, 3]},
    "paths": {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in (2, 3)]},
    "far paths": {"target_modules": ["model.layers.5.self_attn.q_proj"]},
    "ranks": {"rank_pattern": {r"layers\.3\.self_attn\.q_proj": 8}},
    "scales": {"alpha_pattern": {r"layers\.3\.self_attn\.q_proj": 64}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_lora_with_settings_by_layer_has_to_be_merged(name: str, tmp_path: Path) -> None:
    def model() -> FirstModel:
        options = {"r": 4, "target_modules": ["q_proj"], **SETTINGS[name]}
        torch.manual_seed(0)
        wrapped = get_peft_model(tiny_llama(layers=LAYERS), LoraConfig(**options))
        for name_, weight in wrapped.named_parameters():
            if "lora_B" in name_:
                weight.data.normal_(0, 0.5)
        return FirstModel.from_base(wrapped)

    with torch.no_grad():
        wanted = model()(IDS, policy=FixedMask(KEPT))[0].logits
    with pytest.raises(ConfigError, match="--merge-lora"):
        write_folder(model(), str(tmp_path / "small"), KEPT, False, {})
    assert list(tmp_path.iterdir()) == []
    write_folder(model(), str(tmp_path / "small"), KEPT, True, {})
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "small")(IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    # Layers before the first that is left out keep their numbers.
    front = [True] * 4 + [False] * 2
    if name in ("layers", "paths"):
        write_folder(model(), str(tmp_path / "front"), front, False, {})
        with torch.no_grad():
            wanted = model()(IDS, policy=FixedMask(front))[0].logits
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "front")
            found = PeftModel.from_pretrained(plain, tmp_path / "front" / "adapter")(IDS).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_lora_with_weights_missing_or_too_many_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    adapter = get_peft_model_state_dict(get_peft_model(tiny_llama(), config))
    name = next(iter(adapter))
    for wrong in (
        {key: value for key, value in adapter.items() if key != name},
        {**adapter, name.replace("q_proj", "k_proj"): adapter[name]},
    ):
        with pytest.raises(ConfigError, match=r"lora_A"):
            with_lora(tiny_llama(), config, wrong, {})


def test_bad_input_is_refused_and_nothing_is_lost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    for output, more, message in (
        (tmp_path / "mine", ["--mask", "0"], "holds other files"),
        (tmp_path / "new", ["--mask", "0,x"], "is no layer"),
        (tmp_path / "new", ["--mask", "0-6"], "not within the layers 0 to 5"),
        (tmp_path / "new", ["--mask", "3-1"], "not within"),
        (tmp_path / "new", [], "was not measured"),  # no majority without calibration
        (tmp_path / "new.gguf", ["--mask", "0"], "no GGUF file"),
    ):
        assert export(folder, output, *more) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert export(folder, tmp_path / "again", "--mask", "0-2") == 0
    assert export(folder, tmp_path / "again", "--mask", "0-3") == 0  # one export takes the place


def test_what_an_export_is_made_from_is_not_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"weights")
    words = ["export", str(folder / "artifact"), "--mask", "0-2"]
    assert main([*words, "--model", str(file), "--output", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert file.read_bytes() == b"weights"
    small = tmp_path / "small"
    assert export(folder, small, "--mask", "0-5", "--merge-lora") == 0
    (tmp_path / "link").symlink_to(small)
    (tmp_path / "firstlm_export.json").write_text("{}")
    for model, output in (
        (small, small),
        (small, tmp_path / "link"),
        (tmp_path / "link", small),
        (small, tmp_path),
    ):
        assert main([*words, "--model", str(model), "--output", str(output)]) == 2
        assert "what is to be exported" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(small).config.num_hidden_layers == 6


@pytest.mark.parametrize("output", ["small", "small.gguf"])
def test_only_whole_layers_can_be_left_out(
    output: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, tokenizer = load_base(str(folder / "base"))
    model = FirstModel.from_base(base, RouterConfig(unit="mlp"), tokenizer)
    model.save_pretrained(str(tmp_path / "artifact"))
    monkeypatch.setattr("firstlm.export.gguf_file", lambda name: tmp_path / "base.gguf")
    words = ["export", str(tmp_path / "artifact"), "--model", str(folder / "base")]
    assert main([*words, "--output", str(tmp_path / output), "--mask", "0-2"]) == 2
    assert "switches mlp units" in capsys.readouterr().err
    assert not (tmp_path / output).exists()


@pytest.mark.parametrize(
    ("family", "message"), [("gemma3", "kind of attention"), ("diffllama", "other logits")]
)
def test_a_gguf_file_in_which_layers_would_be_others_is_not_written(
    family: str, message: str, tmp_path: Path
) -> None:
    model = FirstModel.from_base(make_model(family))
    with pytest.raises(UnsupportedModelError, match=message):
        write_gguf(model, Path("unread"), tmp_path / "small.gguf", [True, False, True, True])
    assert list(tmp_path.iterdir()) == []


def test_rows_of_queries_are_put_as_llama_cpp_has_them() -> None:
    config = tiny_llama().config
    torch.manual_seed(0)
    weight = torch.randn(32, 32)
    swapped = weight.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
    assert torch.equal(arranged(weight, 2 * weight, weight, config), 2 * weight)
    assert torch.equal(arranged(weight, 2 * weight, swapped, config), 2 * swapped)
    with pytest.raises(ConfigError, match="other weights"):
        arranged(weight, weight, torch.randn(32, 32), config)


def test_a_gguf_file_gives_the_artifacts_logits(smollm2_folder: str, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    assert main(["export", "smollm2-qa", "--output", str(file), "--merge-lora"]) == 0
    small, tokenizer = load_base(str(file), dtype="float32")
    model = FirstModel.from_pretrained("smollm2-qa", dtype="float32")
    count = model.layer_count
    gone = set(model.thresholds.majority(0.25, "skip")[: round(0.25 * count)])
    keep = [layer not in gone for layer in range(count)]
    assert small.config.num_hidden_layers == sum(keep) == 22
    ids = torch.tensor([tokenizer("Question: Where do bees live? Answer:").input_ids])
    with torch.no_grad():
        found = small(ids).logits[0].log_softmax(-1)
        wanted = model(ids, policy=FixedMask(keep))[0].logits[0].log_softmax(-1)
        with model.disable_adapter():
            bare = model(ids, policy=FixedMask(keep))[0].logits[0].log_softmax(-1)
    # What LoRA changed is stored in bfloat16.
    assert torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean") < 1e-2
    assert torch.nn.functional.kl_div(bare, wanted, log_target=True, reduction="batchmean") > 0.1


LLAMA = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=256, verbose=False)
ids = json.loads(sys.argv[2])
found = []
for token in model.generate(ids, temp=0.0):
    found.append(int(token))
    if len(found) == 12:
        break
print(json.dumps(found))
model.close()
"""


def test_llama_cpp_answers_from_the_file_as_we_do_with_the_mask(
    smollm2_folder: str, tmp_path: Path
) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed (pip install 'firstlm[peers]')")
    file = tmp_path / "small.gguf"
    kept = "0-2,4-24,27-29"
    words = ["export", "smollm2-qa", "--output", str(file), "--merge-lora", "--mask", kept]
    assert main(words) == 0
    model = FirstModel.from_pretrained("smollm2-qa", dtype="float32")
    assert model.tokenizer is not None
    text = "Context: The kettle stands on the blue shelf.\nQuestion: Where is the kettle?\nAnswer:"
    ids = torch.tensor([model.tokenizer(text).input_ids])
    keep = torch.ones(model.layer_count, dtype=torch.bool)
    keep[[3, 25, 26]] = False
    out = model.generate(ids, policy=FixedMask(keep), max_new_tokens=12, do_sample=False)
    done = subprocess.run(  # apart, because builds for another CPU end their process
        [sys.executable, "-c", LLAMA, str(file), json.dumps(ids[0].tolist())],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode < 0:
        pytest.skip(f"llama.cpp was ended by signal {-done.returncode}")
    answer = out.sequences[0, ids.shape[1] :].tolist()
    assert json.loads(done.stdout)[: len(answer)] == answer
    assert len(answer) > 3
