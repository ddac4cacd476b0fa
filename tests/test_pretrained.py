# SPDX-License-Identifier: Apache-2.0
"""Base models are found, loaded and told apart; `smollm2` is converted once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_byte_tokenizer, tiny_llama

from firstlm import pretrained
from firstlm.errors import ConfigError, UnsupportedModelError
from firstlm.pretrained import SAME_BASE, fingerprint, load_base, resolve_model, same_base


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_folder_loads_ready_for_inference(tmp_path: Path, byte_tokenizer: Any) -> None:
    made = tiny_llama()
    model, tokenizer = load_base(save(tmp_path / "m", made, byte_tokenizer), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    for name, weight in made.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_pad_token_becomes_eos(tmp_path: Path) -> None:
    bare = make_byte_tokenizer()
    bare.pad_token = None
    name = save(tmp_path / "m", tiny_llama(layers=1), bare)
    assert load_base(name, device="cpu")[1].pad_token == "</s>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_obeyed(tmp_path: Path, byte_tokenizer: Any, dtype: str) -> None:
    name = save(tmp_path / "m", tiny_llama(layers=1), byte_tokenizer)
    assert load_base(name, dtype=dtype, device="cpu")[0].dtype == getattr(torch, dtype)


def test_unknown_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot find or read the model 'nobody/nothing-here'"):
        load_base("nobody/nothing-here", device="cpu")
    for name in ("/no/such/folder", "./none", "a b"):
        with pytest.raises(ConfigError, match="neither a model folder nor a hub id"):
            load_base(name, device="cpu")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_base(str(tmp_path), device="cpu")
    (tmp_path / "first_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a FiRST artifact"):
        load_base(str(tmp_path), device="cpu")


def test_damaged_and_missing_weights(tmp_path: Path, byte_tokenizer: Any) -> None:
    name = save(tmp_path / "m", tiny_llama(layers=1), byte_tokenizer)
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot load the weights"):
        load_base(name, device="cpu")
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot load the weights"):
        load_base(name, device="cpu")


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    from transformers import T5Config, ViTConfig

    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load_base(str(tmp_path / "t5"), device="cpu")
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        load_base(str(tmp_path / "vit"), device="cpu")


def test_bad_dtype_and_device() -> None:
    for dtype in ("int8", "float99", "nn"):
        with pytest.raises(ConfigError, match="expected auto, float32"):
            load_base("x/y", dtype=dtype, device="cpu")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match="cannot be used"):
            load_base("x/y", device=device)


# --- fingerprints --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_fingerprint_survives_the_number_format(dtype: torch.dtype) -> None:
    assert fingerprint(tiny_llama().to(dtype)) == fingerprint(tiny_llama())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's call
def test_fingerprint_survives_an_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "down_proj"])
    assert fingerprint(get_peft_model(tiny_llama(), config)) == fingerprint(tiny_llama())


def test_fingerprint_tells_models_apart() -> None:
    mark = fingerprint(tiny_llama())
    assert same_base(mark, mark) == 1
    assert same_base(mark, fingerprint(tiny_llama(seed=1))) < 0.65 < SAME_BASE
    assert same_base(mark, fingerprint(tiny_llama(layers=3))) == 0
    assert same_base(mark, "nonsense") == 0


def test_fingerprint_sees_rounded_copies_as_close() -> None:
    model = tiny_llama()
    mark = fingerprint(model)
    with torch.no_grad():
        for weight in model.parameters():  # 4 bits a value, as a quantised copy has
            if weight.dim() == 2:
                low, high = weight.min(), weight.max()
                step = (high - low) / 15
                weight.copy_(low + torch.round((weight - low) / step) * step)
    assert SAME_BASE < same_base(mark, fingerprint(model)) <= 1


def test_fingerprint_without_readable_weights() -> None:
    with torch.device("meta"):
        empty = tiny_llama()
    assert fingerprint(empty).endswith(".-.-")
    assert same_base(fingerprint(empty), fingerprint(tiny_llama())) == 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "bloom", "falcon", "mixtral"])
def test_fingerprint_reads_a_layer_of_other_families(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    )
    config.intermediate_size = config.ffn_dim = config.word_embed_proj_dim = 32
    assert "-" not in fingerprint(AutoModelForCausalLM.from_config(config))


def test_gguf_files_are_converted_once_and_told_apart(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        made.append(gguf.name)
        save(folder, tiny_llama(), byte_tokenizer)

    made: list[str] = []
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_convert", convert)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"x" * 5_000_000)
    first = resolve_model(str(file))
    assert Path(first).parent == tmp_path / "cache"
    assert Path(first).name.startswith("tiny-")
    model, _ = load_base(str(file), device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert made == ["tiny.gguf"]
    file.write_bytes(b"x" * 4_999_999 + b"y")
    assert resolve_model(str(file)) != first
    assert made == ["tiny.gguf"] * 2
    with pytest.raises(ConfigError, match="no such file"):
        resolve_model(str(tmp_path / "none.gguf"))


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "text.gguf"
    file.write_text("no weights here")
    with pytest.raises(ConfigError, match=r"text\.gguf"):
        load_base(str(file), device="cpu")
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == []


# --- SmolLM2 -------------------------------------------------------------------------------------


def test_smollm2_without_its_package_is_the_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "SMOLLM2_PACKAGE", "no-such-package")
    assert resolve_model("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_model("gpt2") == "gpt2"


def test_second_load_uses_the_cache(
    smollm2_folder: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained, "_convert", lambda *_: pytest.fail("converted again"))
    assert resolve_model("smollm2") == smollm2_folder
    assert "converting" not in capfd.readouterr().err
    config = json.loads((Path(smollm2_folder) / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)


def test_failed_conversion_leaves_nothing(
    smollm2_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "_convert", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        resolve_model("smollm2")
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_processes_that_convert_at_once_share_one_folder(
    smollm2_folder: str, tmp_path: Path
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from firstlm import pretrained\n"
        "import filelock, transformers\n"
        "def slow(gguf, folder):\n"
        "    print('converted'); (folder / 'a').write_text('x'); time.sleep(0.5)\n"
        "pretrained._convert = slow\n"
        "Path(sys.argv[1], sys.argv[2] + '.ready').touch()\n"
        "while len(list(Path(sys.argv[1]).glob('*.ready'))) < 3: time.sleep(0.01)\n"
        "print(pretrained.resolve_model('smollm2'))"
    )
    root = str(Path(pretrained.__file__).parents[1])
    env = {"FIRSTLM_CACHE": str(tmp_path), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(i)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(3)
    ]
    lines = [line for process in started for line in process.communicate()[0].splitlines()]
    assert all(process.returncode == 0 for process in started)
    folders = {line for line in lines if line != "converted"}
    assert lines.count("converted") == 1
    assert len(folders) == 1
    assert (Path(folders.pop()) / "a").read_text() == "x"


@pytest.mark.slow
def test_smollm2_answers(smollm2_folder: str) -> None:
    model, tokenizer = load_base("smollm2", device="cpu")
    assert "quantization_config" not in model.config.to_dict()
    batch = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    mark = fingerprint(model)
    assert fingerprint(model.to(torch.bfloat16)) == mark
