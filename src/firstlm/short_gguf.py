# SPDX-License-Identifier: Apache-2.0
"""A GGUF file with only some of its model's layers, for llama.cpp and what reads its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from firstlm.errors import ConfigError

BLOCK = "blk."  # tensors of layer 7 are called blk.7.…


def shorter_gguf(
    source: Path,
    target: Path,
    keep: Sequence[bool],
    bfloat16: bool = False,
    other: Mapping[str, np.ndarray] | None = None,
) -> str:
    """Write the layers that are kept, numbered anew, and all that is not a layer.

    Args:
        source: a GGUF file.
        target: the file to write.
        keep: per layer, True = it stays.
        bfloat16: write matrices in bfloat16 instead of their own number format.
        other: matrices by their name in `source` that take the place of those there, in bfloat16.

    Returns:
        The number format of most matrices, in lower case.

    Raises:
        ConfigError: `keep` is not for this file's layers.
    """
    reader = GGUFReader(source)
    name = _value(reader, "general.architecture")
    count_key = f"{name}.block_count"
    count = _value(reader, count_key)
    if len(keep) != count:
        raise ConfigError(f"keep is for {len(keep)} layers; {source.name} has {count}.")
    places = {old: new for new, old in enumerate(i for i, runs in enumerate(keep) if runs)}
    writer = GGUFWriter(target, name)
    writer.data_alignment = int(reader.alignment)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == count_key:
            value = len(places)
        elif (
            isinstance(value, list) and len(value) == count and field.name.startswith(f"{name}.")
        ):  # an entry per layer
            value = [value[i] for i in places]
        kind, inner = field.types[0], field.types[-1]
        is_array = kind == GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, kind, inner if is_array else None)
    formats = []
    for tensor in reader.tensors:
        new = _renamed(tensor.name, places)
        if new is None:
            continue
        data, dtype = tensor.data, tensor.tensor_type
        if len(tensor.shape) > 1:
            given = (other or {}).get(tensor.name)
            if bfloat16 or given is not None:
                dtype = GGMLQuantizationType.BF16
                whole = dequantize(data, tensor.tensor_type) if given is None else given
                data = quantize(whole, dtype)
            formats.append(dtype.name.lower())
        writer.add_tensor(new, np.ascontiguousarray(data), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return max(set(formats), key=formats.count)


def _value(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ConfigError(f"The GGUF file does not say its {name}.")
    return field.contents()


def _renamed(name: str, places: dict[int, int]) -> str | None:
    """Return what a tensor is called in the shorter file, or None where its layer is left out."""
    if not name.startswith(BLOCK):
        return name
    number, _, rest = name.removeprefix(BLOCK).partition(".")
    return f"{BLOCK}{places[int(number)]}.{rest}" if int(number) in places else None
