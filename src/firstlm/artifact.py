# SPDX-License-Identifier: Apache-2.0
"""Save a model as an artifact, and make a model of one; `artifact_files` says what is in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import firstlm
from firstlm import processes
from firstlm.artifact_files import (
    ADAPTER_DIR,
    ADAPTER_FILE,
    CARD_FILE,
    FORMAT_VERSION,
    ROUTERS_FILE,
    adapter_folder,
    check_finite,
    check_results,
    check_routers,
    check_target,
    find,
    parse,
    read_config,
    read_routers,
)
from firstlm.errors import ArtifactError, ConfigError
from firstlm.lora import lora_parameters, without_peft_warning
from firstlm.model_card import model_card
from firstlm.pretrained import (
    ARTIFACT_FILE,
    SAME_BASE,
    fingerprint,
    hub_id,
    load_base,
    same_base,
)
from firstlm.results import atomic_dir, write_json

if TYPE_CHECKING:
    from firstlm.model import FirstModel


def save(
    model: FirstModel,
    path: str | Path,
    more_from: Path | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write an artifact beside `path`, then swap it in; on any failure the old one stays whole.

    Args:
        model: what to save.
        path: folder; an artifact that is there is replaced.
        more_from: an artifact whose other files (its run file) are taken along.
        more: texts of further files by name.
    """
    check_target(path)
    if model.merged:
        raise ArtifactError(
            "LoRA was merged into the base model's weights, so an artifact would lack it: save "
            "before merge_and_unload, or save the merged weights with model.detach()."
            "save_pretrained and load them as the base model."
        )
    check_results(model.results)
    base = model.plain_base
    revision = getattr(base.config, "_commit_hash", None)  # where it came from the hub
    config = {
        "format_version": FORMAT_VERSION,
        "firstlm_version": firstlm.__version__,
        "base_model": {"id": model.base_id, "revision": revision, "fingerprint": fingerprint(base)},
        "router_config": asdict(model.router_config),
        "layers": model.layer_count,
        "adapter": model.has_adapter,
        "thresholds": model.thresholds.table,
        "policy": asdict(model.baseline) if model.baseline else None,
        "training": model.training_record,
        "results": model.results,
    }
    tensors = {}
    for i, router in enumerate(model.routers):
        weight, bias = (processes.whole(p.detach()).float() for p in (router.weight, router.bias))
        tensors[f"{i}.weight"] = weight.cpu().contiguous()
        tensors[f"{i}.bias"] = bias.cpu().reshape(())
    lora = {
        name: processes.whole(p.detach()).to(model.adapter_dtype or p.dtype).cpu()
        for name, p in lora_parameters(model.base).items()
    }
    with processes.first_alone() as first:
        if not first:
            return
        with _new_folder(path) as folder:
            _write(model, config, tensors, lora, folder)
            for name, text in (more or {}).items():
                (folder / name).write_text(text, encoding="utf-8")
            for item in more_from.iterdir() if more_from else ():
                if (folder / item.name).exists():
                    continue
                copy = shutil.copytree if item.is_dir() else shutil.copy2
                copy(item, folder / item.name)


@contextmanager
def _new_folder(path: str | Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of `path` when all of it is there."""
    try:
        with atomic_dir(path) as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} cannot be written ({error}); what was there before is whole. "
            "Make room, or name another folder."
        ) from error


def _write(
    model: FirstModel,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    lora: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    write_json(folder / ARTIFACT_FILE, config)
    save_file(tensors, folder / ROUTERS_FILE)
    if model.has_adapter:
        for peft_config in model.base.peft_config.values():
            peft_config.base_model_name_or_path = hub_id(model.base_id)
        model.base.save_pretrained(  # "auto" would ask the hub whether the vocabulary grew
            str(folder / ADAPTER_DIR), state_dict=lora, save_embedding_layers=False
        )
        (folder / ADAPTER_DIR / "README.md").unlink(missing_ok=True)  # peft's unfilled model card
    (folder / CARD_FILE).write_text(model_card(config), encoding="utf-8")


def load(
    cls: type[FirstModel],
    path_or_id: str,
    base: Any,
    dtype: str,
    device: str,
    tokenizer: Any,
) -> FirstModel:
    """Load an artifact; see `FirstModel.from_pretrained`."""
    folder = find(path_or_id)
    config = read_config(folder)
    router_config, table, baseline = parse(config, folder)
    tensors = read_routers(folder)
    wanted = config["base_model"]
    asked = base = wanted["id"] if base is None else base
    if base is None:
        raise ArtifactError(f"{folder} does not name its base model; pass one as base=.")
    if isinstance(base, str):
        found_id = base
        named = base == wanted["id"] and wanted.get("revision")
        revision = {"revision": wanted["revision"]} if named else {}
        base, found_tokenizer = load_base(base, dtype=dtype, device=device, **revision)
        tokenizer = tokenizer or found_tokenizer
    else:
        if not isinstance(base, nn.Module):
            raise ConfigError(
                f"base is {type(base).__name__}; expected a transformers model, an id or a folder."
            )
        found_id = getattr(getattr(base, "config", None), "_name_or_path", None)
        found_id = found_id or f"the {type(base).__name__} given"
        if hasattr(base, "peft_config"):
            raise ArtifactError(
                "The base model given has a peft adapter already; pass it without one "
                "(its get_base_model() after unload())."
            )
    alike = same_base(wanted["fingerprint"], fingerprint(base))
    if alike < SAME_BASE:
        why = f"{alike:.0%} of its weights' signs agree" if alike else "another architecture"
        raise ArtifactError(
            f"{folder} was made for the base model {wanted['id']}, not for {found_id} ({why}). "
            "Load it with the base it was trained on."
        )
    config_of_base: Any = base.config
    width = router_config.width(config_of_base.get_text_config().hidden_size)
    check_routers(tensors, config["layers"], width, folder)
    adapter = adapter_folder(folder, config)
    if adapter is not None:
        base = _load_adapter(base, adapter)
        try:
            check_finite(lora_parameters(base), adapter / ADAPTER_FILE)
        except ArtifactError:
            base.unload()  # a base that was given is as it was
            raise
    model = cls(base, router_config, tokenizer)
    model.routers.fill(tensors)
    model.base_id = found_id if isinstance(asked, str) else wanted["id"]
    model.adapter_dtype = None if adapter is None else _saved_dtype(adapter)
    model.thresholds.table, model.baseline = table, baseline
    model.training_record = config.get("training", {})
    model.results = config["results"]
    return model.eval()


def _load_adapter(base: Any, adapter: Path) -> nn.Module:
    from peft import PeftModel

    try:
        exact = _saved_dtype(adapter) != base.dtype  # LoRA would be rounded
        with without_peft_warning():
            # In the base's number format nothing is cast back and forth for every linear layer,
            # which takes longer than the layers do; peft would take LoRA to float32.
            return PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=exact)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{adapter} cannot be loaded as a peft adapter: {error}") from error


def _saved_dtype(adapter: Path) -> torch.dtype | None:
    """Return the number format in which an adapter was saved, to save it so again."""
    return next((tensor.dtype for tensor in load_file(adapter / ADAPTER_FILE).values()), None)


def push(model: FirstModel, repo_id: str, **kwargs: Any) -> str:
    """Upload an artifact; see `FirstModel.push_to_hub`."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent) / "artifact")
        save(model, folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))
