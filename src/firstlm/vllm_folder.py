# SPDX-License-Identifier: Apache-2.0
"""An artifact as a folder that vLLM loads: base weights with LoRA merged, config and routers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from firstlm import artifact_files
from firstlm.choices import Choices
from firstlm.config import PREFILL_MODES
from firstlm.errors import ConfigError
from firstlm.model import FirstModel
from firstlm.pretrained import ARTIFACT_FILE, cache_folder
from firstlm.results import atomic_dir, write_json

NATIVE = {"LlamaForCausalLM": "FirstLlamaForCausalLM"}
ANY = "FirstTransformersForCausalLM"
ARCHITECTURES = (*NATIVE.values(), ANY)
ROUTERS_DIR = "first"
PREFILL = "first_prefill"  # in config.json: the mode of requests that do not say
RETURNS = "first_returns"  # in config.json: length of the tuple that each layer returns, or 0


def is_artifact(name: str) -> bool:
    """Whether a model that vLLM is asked for is an artifact."""
    return name in artifact_files.shipped() or (Path(name).expanduser() / ARTIFACT_FILE).is_file()


def prefill_of(config: Any) -> str:
    """Return the prefill mode of a folder's config."""
    found = getattr(config, PREFILL, "skip")
    if found not in PREFILL_MODES:
        raise ConfigError(f"{PREFILL} is {found!r}; expected one of {', '.join(PREFILL_MODES)}.")
    return found


def choices_in(model_config: Any) -> Choices:
    """Return what can decide, as the folder says that vLLM's model config names."""
    width = model_config.hf_config.get_text_config().hidden_size
    return Choices.read(Path(model_config.model) / ROUTERS_DIR, width)


def folder_for(artifact: str, dtype: str = "auto") -> Path:
    """Return the folder that vLLM loads for an artifact; it is made once.

    Args:
        artifact: folder or name of an artifact.
        dtype: number format of the weights; "auto" takes the base model's.
    """
    source = artifact_files.find(artifact)
    base = artifact_files.base_id(artifact)
    weights = _weights_of(base) if base else ""
    key = f"{artifact_files.content_hash(artifact)} {base} {weights} {dtype}"
    target = cache_folder() / "vllm" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not (target / "config.json").is_file():
        write(source, target, dtype)
    return target


def _weights_of(base: str) -> str:
    """Return what changes when other weights are put into a base model's folder."""
    found = [(file.name, file.stat()) for file in sorted(Path(base).glob("*.safetensors"))]
    return " ".join(f"{name} {about.st_size} {about.st_mtime_ns}" for name, about in found)


def write(source: Path, target: Path, dtype: str = "auto") -> None:
    """Write the folder."""
    model = FirstModel.from_pretrained(str(source), dtype=dtype, device="cpu")
    if model.router_config.unit != "block":
        raise ConfigError(
            f"{source} switches unit={model.router_config.unit!r}; vLLM serves unit='block' only. "
            "`firstlm serve` serves the others."
        )
    locked = set(range(model.layer_count)) - set(model.free_layers)
    if locked:
        raise ConfigError(
            f"Layers {sorted(locked)} of the base model lend keys and values to others, which the "
            "vLLM plugin does not know. `firstlm serve` serves it."
        )
    tokenizer, returns = model.tokenizer, model.routing.stack.tuple_sizes
    base: Any = model.merge_and_unload().detach()
    with atomic_dir(target) as folder:
        base.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / ROUTERS_DIR).mkdir()  # beside the weights, vLLM would take them for some
        for name in (ARTIFACT_FILE, artifact_files.ROUTERS_FILE):
            shutil.copy2(source / name, folder / ROUTERS_DIR / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config["architectures"][0]
        config["architectures"] = [NATIVE.get(name, ANY)]
        config |= {PREFILL: "skip", RETURNS: returns}
        write_json(folder / "config.json", config)
