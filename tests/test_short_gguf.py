# SPDX-License-Identifier: Apache-2.0
"""A shorter GGUF file holds the layers that were kept, under new numbers, and all the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from firstlm.errors import ConfigError
from firstlm.short_gguf import shorter_gguf


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Three layers, with matrices in four bits, and a list with an entry for each."""
    file = tmp_path / "whole.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_custom_alignment(256)
    writer.add_array("general.tags", ["x", "y", "z"])  # not one for each layer
    writer.add_block_count(3)
    writer.add_array("llama.attention.head_count_kv", [2, 4, 8])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c", "d"])
    writer.add_float32("llama.rope.freq_base", 1e4)
    rng = np.random.default_rng(0)
    names = ["token_embd.weight", "output_norm.weight"]
    names += [f"blk.{i}.{part}.weight" for i in range(3) for part in ("attn_q", "attn_norm")]
    for name in names:
        if "norm" in name:
            writer.add_tensor(name, rng.standard_normal(64, dtype=np.float32))
        else:
            packed = quantize(
                rng.standard_normal((32, 64), dtype=np.float32), GGMLQuantizationType.Q4_1
            )
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("bfloat16", [False, True])
def test_layers_that_are_kept_get_new_numbers(whole: Path, tmp_path: Path, bfloat16: bool) -> None:
    target = tmp_path / "short.gguf"
    assert shorter_gguf(whole, target, [True, False, True], bfloat16) == (
        "bf16" if bfloat16 else "q4_1"
    )
    before, after = GGUFReader(whole), GGUFReader(target)
    old = {t.name: t for t in before.tensors}
    new = {t.name: t for t in after.tensors}
    moved = {"blk.0": "blk.0", "blk.1": "blk.2", "token_embd": "token_embd"}
    moved["output_norm"] = "output_norm"
    assert {name for name in new if name.startswith("blk.1")} == {
        "blk.1.attn_q.weight",
        "blk.1.attn_norm.weight",
    }
    assert len(new) == 6
    for name, tensor in new.items():
        source = old[next(name.replace(a, b) for a, b in moved.items() if name.startswith(a))]
        found = dequantize(tensor.data, tensor.tensor_type)
        wanted = dequantize(source.data, source.tensor_type)
        np.testing.assert_allclose(found, wanted, rtol=2**-8 if bfloat16 else 0)

    def value(name: str) -> object:
        field = after.get_field(name)
        return field and field.contents()

    assert value("llama.block_count") == 2
    assert value("llama.attention.head_count_kv") == [2, 8]
    assert value("tokenizer.ggml.tokens") == ["a", "b", "c", "d"]
    assert value("llama.rope.freq_base") == pytest.approx(1e4)


def test_a_mask_for_other_layers_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"whole\.gguf has 3"):
        shorter_gguf(whole, tmp_path / "short.gguf", [True] * 4)
    assert not (tmp_path / "short.gguf").exists()
