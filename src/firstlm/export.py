# SPDX-License-Identifier: Apache-2.0
"""`firstlm export`: one mask for good, as a plain model that any engine loads.

What is lost is the choice by prompt. Layers are sliced here and nowhere else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize

from firstlm import artifact_files
from firstlm.command_config import ExportConfig
from firstlm.cut import cut, paths, renumbered
from firstlm.errors import ConfigError, UnsupportedModelError, first_line
from firstlm.layers import decoder_layers
from firstlm.lora import lora_layers
from firstlm.model import FirstModel
from firstlm.pretrained import gguf_file
from firstlm.results import atomic_dir, check_file, portable, provenance, write_json
from firstlm.short_gguf import shorter_gguf

EXPORT_FILE = "firstlm_export.json"  # says where the model came from, and that it may be replaced
ADAPTER = "base_model.model."  # what peft puts before names
ADAPTER_NAME = "default"  # what peft calls an adapter that was given no name
ALIKE = 1e-2  # relative difference of weights that are the same but for their number format


def run(options: ExportConfig) -> int:
    """Write the model or the file."""
    is_file = options.output.endswith(".gguf")
    name = options.model or artifact_files.base_id(options.artifact)
    _check_target(options, name or "", is_file)
    source = gguf_file(name or "")
    if is_file and source is None:
        raise ConfigError(
            f"The base model {name} is no GGUF file, so there is none to leave layers out of. "
            "Export a folder (--output without .gguf) and convert it with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    if model.router_config.unit != "block":
        raise ConfigError(
            f"The artifact switches {model.router_config.unit} units, and an export leaves whole "
            "layers out, which is another model. Export an artifact with unit 'block'."
        )
    keep = mask_of(model, options)
    record = {
        "artifact": portable(options.artifact),
        "base_model": portable(name or ""),
        "keep": keep,
        "lora": "none" if not model.has_adapter else "merged" if options.merge_lora else "adapter",
        "provenance": provenance(),
    }
    if source is not None and is_file:
        if model.has_adapter and not options.merge_lora:
            raise ConfigError("A GGUF file has no place for LoRA; add --merge-lora.")
        write_gguf(model, source, Path(options.output).expanduser(), keep)
    else:
        write_folder(model, options.output, keep, options.merge_lora, record)
    left = len(keep) - sum(keep)
    print(f"Saved {sum(keep)} of {len(keep)} layers to {options.output}; {left} are left out.")
    return 0


def _check_target(options: ExportConfig, base: str, is_file: bool) -> None:
    """Refuse to replace what is no export, or what this one is made from."""
    folder = Path(options.output).expanduser()
    named = [Path(name).expanduser().resolve() for name in (base, options.artifact) if name]
    sources = [path for path in named if path.exists()]  # others are hub ids
    if is_file:
        check_file(folder)
        if folder.exists():  # nothing in it would say whose it is
            raise ConfigError(
                f"{options.output} is there already, and no export replaces a GGUF file. Name a "
                "new file, or remove that one first."
            )
    elif any(folder.resolve() in (source, *source.parents) for source in sources):
        raise ConfigError(
            f"{options.output} is, or holds, what is to be exported, and would be replaced. Name "
            "another folder."
        )
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / EXPORT_FILE).is_file():
        raise ConfigError(
            f"{options.output} holds other files, and an export replaces its folder whole. "
            "Name a new folder, or one that holds an export."
        )


def mask_of(model: FirstModel, options: ExportConfig) -> list[bool]:
    """Return, per layer, whether it stays."""
    count = model.layer_count
    if options.mask == "majority":
        order = [
            layer
            for layer in model.thresholds.majority(options.skip_rate, "skip")
            if layer in model.free_layers
        ]
        gone = set(order[: round(options.skip_rate * count)])
        return [layer not in gone for layer in range(count)]
    keep = [False] * count
    for part in options.mask.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start, end = int(first), int(last if dash else first)
        except ValueError:
            raise ConfigError(
                f"--mask {options.mask!r}: {part!r} is no layer; expected majority, or the layers "
                "that stay, as 0-4,7,9-29."
            ) from None
        if not 0 <= start <= end < count:
            raise ConfigError(f"--mask: {part!r} is not within the layers 0 to {count - 1}.")
        keep[start : end + 1] = [True] * (end + 1 - start)
    return keep


def write_folder(
    model: FirstModel, output: str, keep: list[bool], merge: bool, record: Mapping[str, Any]
) -> None:
    """Write a folder that transformers loads; LoRA that is not merged stands in adapter/."""
    tokenizer = model.tokenizer
    base: Any = model.detach()
    adapter: dict[str, torch.Tensor] = {}
    scales: dict[str, Any] = {}
    peft_config: Any = None
    if hasattr(base, "peft_config"):
        from peft import get_peft_model_state_dict

        peft_config = base.peft_config[ADAPTER_NAME]
        adapter = {} if merge else get_peft_model_state_dict(base, save_embedding_layers=False)
        scales = _scales(base)
        base = base.merge_and_unload() if merge else base.unload()
    stack = decoder_layers(base)
    short = cut(base, stack, keep)
    short.name_or_path = output  # LoRA beside it says so of its base model
    with atomic_dir(output) as folder:
        short.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_json(folder / EXPORT_FILE, record)
        if adapter:
            kept = [i for i, stays in enumerate(keep) if stays]
            begins = [ADAPTER + path for path in paths(base, stack)]
            moved = (renumbered(part, begins, kept) for part in (adapter, scales))
            wrapped = with_lora(short, peft_config, *moved)
            target = folder / artifact_files.ADAPTER_DIR
            wrapped.save_pretrained(target, save_embedding_layers=False)


def _scales(model: Any) -> dict[str, Any]:
    """Return what each module's LoRA is multiplied by, by the module's name in peft's wrapper."""
    return {name: m.scaling for name, m in model.named_modules() if hasattr(m, "lora_A")}


def with_lora(
    short: Any, peft_config: Any, adapter: Mapping[str, Any], scales: Mapping[str, Any]
) -> Any:
    """Return a short model with the LoRA that the whole one has on the layers that stay.

    Args:
        short: see `cut`.
        peft_config: of the whole model's LoRA.
        adapter: its weights, by their names in the short model; peft's own.
        scales: what each module's LoRA is multiplied by, by the module's name likewise.

    Raises:
        ConfigError: by the config other layers would have LoRA, or LoRA of another kind.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    config = copy.copy(peft_config)
    config.base_model_name_or_path = None
    try:
        wrapped: Any = get_peft_model(short, config)
        found = set_peft_model_state_dict(wrapped, dict(adapter))
    except (RuntimeError, ValueError) as error:  # no such layers, or other ranks
        wrong = first_line(error)
    else:
        mine = [name for name in found.missing_keys if f".{ADAPTER_NAME}" in name]
        wrong = ", ".join([*mine, *found.unexpected_keys])
        scaled = _scales(wrapped)
        wrong = wrong or ", ".join(
            n for n in {**scaled, **scales} if scaled.get(n) != scales.get(n)
        )
    if wrong:
        raise ConfigError(
            f"LoRA's settings go by the numbers of layers, which change ({wrong}). Add it to the "
            "weights instead: --merge-lora."
        )
    return wrapped


def write_gguf(model: FirstModel, source: Path, target: Path, keep: list[bool]) -> None:
    """Write a GGUF file; matrices that LoRA changed are in bfloat16, the rest as in the source.

    Raises:
        UnsupportedModelError: layers that have moved up would not be what they were.
    """
    other = dict(_merged(model, source)) if model.has_adapter else {}
    base: Any = model.detach()
    base = base.merge_and_unload() if hasattr(base, "peft_config") else base
    cut(base, decoder_layers(base), keep)  # raises where a shorter one is another model
    kinds = getattr(base.config.get_text_config(decoder=True), "layer_types", None) or []
    kept = [kind for kind, stays in zip(kinds, keep, strict=False) if stays]
    if kept != list(kinds[: len(kept)]):
        raise UnsupportedModelError(
            "llama.cpp knows each layer's kind of attention (full or sliding) by its number, and "
            "layers that move up would change theirs. Leave out others, or export a folder for "
            "transformers (--output without .gguf)."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.tmp")
    try:
        shorter_gguf(source, part, keep, other=other)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _merged(model: FirstModel, source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the matrices that LoRA changes, by their names in a GGUF file."""
    reader = GGUFReader(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    field = reader.get_field("general.architecture")
    known = {name: key for key, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(known[field.contents() if field else ""], model.layer_count)
    by_module: dict[int, str] = {
        id(module): name for name, module in model.plain_base.named_modules()
    }
    for module in lora_layers(model.plain_base):
        name = names.get_name(f"{by_module[id(module)]}.weight", (".weight",))
        if name not in tensors:
            raise ConfigError(f"LoRA is on {by_module[id(module)]}, which the GGUF file lacks.")
        weight = module.get_base_layer().weight.detach().float()
        whole = weight + sum(module.get_delta_weight(a).float() for a in module.active_adapters)
        before = dequantize(tensors[name].data, tensors[name].tensor_type)
        yield name, arranged(weight, whole, torch.from_numpy(before), model.config).numpy()


def arranged(
    weight: torch.Tensor, changed: torch.Tensor, stored: torch.Tensor, config: Any
) -> torch.Tensor:
    """Return a changed matrix [outputs, inputs] with its rows in the order of a GGUF file's.

    llama.cpp holds queries and keys of Llama-like models with the halves of each head interleaved.

    Args:
        weight: as transformers holds it, unchanged.
        changed: as `weight`.
        stored: as the file holds it.
        config: of the model.

    Raises:
        ConfigError: the file holds something else.
    """

    def interleaved(matrix: torch.Tensor, heads: int) -> torch.Tensor:
        return matrix.view(heads, 2, -1, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)

    text = config.get_text_config(decoder=True)
    orders: list[int] = [0, text.num_attention_heads, text.num_key_value_heads]
    for heads in orders:
        if heads and len(weight) % (2 * heads):
            continue
        found = interleaved(weight, heads) if heads else weight
        if (found - stored).norm() <= ALIKE * stored.norm():
            return (interleaved(changed, heads) if heads else changed).contiguous()
    raise ConfigError("The GGUF file holds other weights than the base model.")
