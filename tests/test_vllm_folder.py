# SPDX-License-Identifier: Apache-2.0
"""The folder that vLLM loads is made of what is there now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import make_byte_tokenizer, tiny_llama
from safetensors.torch import load_file

from firstlm import FirstModel
from firstlm.vllm_folder import folder_for


def test_other_weights_under_the_same_name_are_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRSTLM_CACHE", str(tmp_path / "cache"))
    tiny_llama().save_pretrained(tmp_path / "base")
    make_byte_tokenizer().save_pretrained(tmp_path / "base")
    model = FirstModel.from_base(tiny_llama(), tokenizer=make_byte_tokenizer())
    model.base_id = str(tmp_path / "base")
    artifact = str(tmp_path / "artifact")
    model.save_pretrained(artifact)
    first = folder_for(artifact, "float32")
    assert folder_for(artifact, "float32") == first
    changed = tiny_llama()
    changed.model.embed_tokens.weight.data.mul_(2)  # signs agree, so it may be loaded
    changed.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    os.utime(file, ns=(0, 1 + file.stat().st_mtime_ns))
    second = folder_for(artifact, "float32")
    assert second != first
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    name = "model.embed_tokens.weight"
    assert (after[name] == 2 * before[name]).all()
