# SPDX-License-Identifier: Apache-2.0
"""Save and load FiRST artifacts: a folder that the hub and peft understand.

`first_config.json` (format, base model, unit, thresholds, scores, provenance),
`routers.safetensors`, `adapter/` (a plain peft adapter), `README.md` (model card).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import firstlm
from firstlm.baselines import Baseline
from firstlm.config import RouterConfig
from firstlm.errors import ArtifactError, ConfigError
from firstlm.lora import lora_parameters, without_peft_warning
from firstlm.model_card import model_card
from firstlm.options import check
from firstlm.pretrained import (
    ARTIFACT_FILE,
    SAME_BASE,
    fingerprint,
    hub_id,
    load_base,
    same_base,
)
from firstlm.results import atomic_dir, write_json
from firstlm.thresholds import Threshold, Thresholds

if TYPE_CHECKING:
    from firstlm.model import FirstModel

FORMAT_VERSION = 1
ROUTERS_FILE = "routers.safetensors"
CARD_FILE = "README.md"
ADAPTER_DIR = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
RESULT_KEYS = {"data", "count", "prefill", "weights", "runs"}
FINGERPRINT = re.compile(r"[0-9a-f]+(\.([0-9a-f]+|-)){2}")


def check_target(path: str | Path) -> None:
    """Refuse a folder that saving would replace although it is no artifact."""
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{path} is a file, so it cannot be written as a folder; name another.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ARTIFACT_FILE).is_file():
        raise ArtifactError(
            f"{path} holds other files, and saving an artifact replaces its folder whole. "
            "Name a new folder, or one that holds an artifact."
        )


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
    _check_results(model.results)
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
        tensors[f"{i}.weight"] = router.weight.detach().float().cpu().contiguous()
        tensors[f"{i}.bias"] = router.bias.detach().float().cpu().contiguous()
    try:
        with atomic_dir(path) as folder:
            _write(model, config, tensors, folder)
            for name, text in (more or {}).items():
                (folder / name).write_text(text, encoding="utf-8")
            for item in more_from.iterdir() if more_from else ():
                if (folder / item.name).exists():
                    continue
                copy = shutil.copytree if item.is_dir() else shutil.copy2
                copy(item, folder / item.name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} cannot be written ({error}); what was there before is whole. "
            "Make room, or name another folder."
        ) from error


def _write(
    model: FirstModel, config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path
) -> None:
    write_json(folder / ARTIFACT_FILE, config)
    save_file(tensors, folder / ROUTERS_FILE)
    if model.has_adapter:
        for peft_config in model.base.peft_config.values():
            peft_config.base_model_name_or_path = hub_id(model.base_id)
        lora = {
            name: p.detach().to(model.adapter_dtype or p.dtype).cpu()
            for name, p in lora_parameters(model.base).items()
        }
        model.base.save_pretrained(  # "auto" would ask the hub whether the vocabulary grew
            str(folder / ADAPTER_DIR), state_dict=lora, save_embedding_layers=False
        )
        (folder / ADAPTER_DIR / "README.md").unlink(missing_ok=True)  # peft's unfilled model card
    (folder / CARD_FILE).write_text(model_card(config), encoding="utf-8")


def record(folder: Path, task: str, results: dict[str, Any]) -> None:
    """Write what was measured on a task into an artifact: its config and its model card.

    Args:
        folder: the artifact.
        task: name of the task; what was measured on it before is replaced.
        results: `RESULT_KEYS`; `runs` has a `skip_rate` and scores for each run's name.
    """
    _check_results({task: results})
    config = read_config(folder)
    config["results"] = {**config["results"], task: results}
    try:
        with atomic_dir(folder) as new:
            shutil.copytree(folder, new, dirs_exist_ok=True)
            write_json(new / ARTIFACT_FILE, config)
            (new / CARD_FILE).write_text(model_card(config), encoding="utf-8")
    except OSError as error:
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise ArtifactError(
            f"{folder} cannot be written ({why}); what was there before is whole."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Return the checked contents of first_config.json."""
    file = folder / ARTIFACT_FILE
    if not file.is_file():
        raise ArtifactError(
            f"{folder} is no FiRST artifact: it has no {ARTIFACT_FILE}. "
            "Name a folder written by `firstlm train` or save_pretrained."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        version = int(config["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is damaged ({error}). Copy or train the artifact again."
        ) from error
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format {version}; this firstlm reads up to {FORMAT_VERSION}. "
            "Upgrade with `pip install -U firstlm`."
        )
    missing = {"base_model", "router_config", "layers", "thresholds"} - set(config)
    if missing:
        raise ArtifactError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}.")
    config["results"] = config.get("results") or {}
    return config


def read_routers(folder: Path) -> dict[str, torch.Tensor]:
    """Return the router tensors, `{i}.weight` [width] and `{i}.bias` []."""
    file = folder / ROUTERS_FILE
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}). Copy or train the artifact again."
        ) from error


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
    router_config, table, baseline = _parse(config, folder)
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
        found_id = getattr(getattr(base, "config", None), "_name_or_path", None) or wanted["id"]
        if hasattr(base, "peft_config"):
            raise ArtifactError(
                "The base model given has a peft adapter already; pass it without one "
                "(its get_base_model() after unload())."
            )
    alike = same_base(wanted["fingerprint"], fingerprint(base))
    if alike < SAME_BASE:
        why = f"{alike:.0%} of its weights' signs agree" if alike else "another architecture"
        raise ArtifactError(
            f"{folder} was made for the base model {wanted['id']!r}, not for {found_id!r} ({why}). "
            "Load it with the base it was trained on."
        )
    width = router_config.width(base.config.get_text_config().hidden_size)
    _check_routers(tensors, config["layers"], width, folder)
    adapter = folder / ADAPTER_DIR
    if config.get("adapter") and not (adapter / ADAPTER_FILE).is_file():
        raise ArtifactError(
            f"{folder} was saved with LoRA, but {ADAPTER_DIR}/{ADAPTER_FILE} is missing. "
            "Copy or train the artifact again."
        )
    if adapter.is_dir():
        base = _load_adapter(base, adapter)
        try:
            _check_finite(lora_parameters(base), adapter / ADAPTER_FILE)
        except ArtifactError:
            base.unload()  # a base that was given is as it was
            raise
    model = cls(base, router_config, tokenizer)
    for i, router in enumerate(model.routers):
        router.weight.data.copy_(tensors[f"{i}.weight"])
        router.bias.data.copy_(tensors[f"{i}.bias"])
    model.base_id = found_id if isinstance(asked, str) else wanted["id"]
    model.adapter_dtype = _saved_dtype(adapter)
    model.thresholds.table, model.baseline = table, baseline
    model.training_record = config.get("training", {})
    model.results = config["results"]
    return model.eval()


def _parse(
    config: dict[str, Any], folder: Path
) -> tuple[RouterConfig, dict[str, list[Threshold]], Baseline | None]:
    """Return router config, threshold table and baseline, if any, out of first_config.json."""
    try:
        router_config = RouterConfig(**config["router_config"])
        check(router_config)
        if not {"id", "fingerprint"} <= set(config["base_model"]):
            raise ValueError("base_model lacks id or fingerprint")
        if not FINGERPRINT.fullmatch(config["base_model"]["fingerprint"]):
            raise ValueError("the base model's fingerprint is malformed")
        _check_results(config["results"])
        if not isinstance(config["layers"], int):
            raise ValueError("layers is no number")
        table = {
            mode: [
                # Artifacts of before 2026-11-25 do not say which layers were skipped.
                Threshold(float(asked), float(offset), float(rate), tuple(map(float, skipped)))
                for asked, offset, rate, skipped, *_ in ((*row, ()) for row in rows)
            ]
            for mode, rows in config["thresholds"].items()
        }
        return router_config, table, _parse_baseline(config.get("policy"))
    except (TypeError, ValueError, KeyError, AttributeError, ConfigError) as error:
        raise ArtifactError(
            f"{folder / ARTIFACT_FILE} is damaged ({error}). Copy or train the artifact again."
        ) from error


def _parse_baseline(found: dict[str, Any] | None) -> Baseline | None:
    if found is None:
        return None
    orders = tuple((float(rate), tuple(map(int, order))) for rate, order in found["orders"])
    counts = {name: tuple(map(int, found.get(name, ()))) for name in ("free", "answers")}
    return Baseline(**{**found, **counts, "orders": orders})


def read_thresholds(path_or_id: str) -> Thresholds:
    """Return the thresholds of an artifact, without loading a model."""
    folder = find(path_or_id)
    return Thresholds(_parse(read_config(folder), folder)[1])


def _check_results(results: dict[str, Any]) -> None:
    """Raise ArtifactError unless results are as `record` writes them."""
    for task, found in results.items():
        named = isinstance(found, dict) and set(found) >= RESULT_KEYS
        if not (named and _same_scores(found["runs"])):
            raise ArtifactError(
                f"The results of {task!r} are {found!r}; expected an object with "
                f"{', '.join(sorted(RESULT_KEYS))}, each run with a skip_rate and the same scores, "
                "as `firstlm eval --record` writes it."
            )


def _same_scores(runs: Any) -> bool:
    """Tell whether runs are some objects of the same numbers, `skip_rate` among them."""
    if not (isinstance(runs, dict) and runs and all(isinstance(r, dict) for r in runs.values())):
        return False
    names = set(next(iter(runs.values())))
    return "skip_rate" in names and all(
        set(run) == names and all(isinstance(v, int | float) for v in run.values())
        for run in runs.values()
    )


def shipped() -> dict[str, Path]:
    """Return the artifacts that come with the package, by name."""
    folder = Path(__file__).parent / "artifacts"
    return {f.name: f for f in sorted(folder.iterdir())} if folder.is_dir() else {}


def base_id(path_or_id: str) -> str | None:
    """Return the name of the base model that an artifact was made for."""
    return read_config(find(path_or_id))["base_model"].get("id")


def local_folder(path_or_id: str, purpose: str, instead: str) -> Path:
    """Return an artifact's folder if it is one of the user's own, which may be changed in place.

    Args:
        path_or_id: the artifact.
        purpose: what it is wanted for, to go on after "so".
        instead: what to do where it is none.

    Raises:
        ConfigError: it comes with the package, or from the hub.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{path_or_id!r} is no local folder, so {purpose}; {instead}.")
    return folder


def find(path_or_id: str) -> Path:
    """Return an artifact's folder: a local one, one that is shipped, or fetched from the hub."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    known = shipped()
    if str(path_or_id) in known:
        return known[str(path_or_id)]
    if str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/", "~")):
        names = ", ".join(known) or "none"
        raise ArtifactError(
            f"There is no artifact {path_or_id!r}: no such folder, and it is neither shipped with "
            f"firstlm ({names}) nor a hub id (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id))
    except Exception as error:
        raise ArtifactError(
            f"{path_or_id!r} is neither a folder nor an artifact that the hub would give: {error}"
        ) from error


def _load_adapter(base: Any, adapter: Path) -> nn.Module:
    from peft import PeftModel

    try:
        with without_peft_warning():
            return PeftModel.from_pretrained(base, str(adapter))
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{adapter} cannot be loaded as a peft adapter: {error}") from error


def _saved_dtype(adapter: Path) -> torch.dtype | None:
    """Return the number format in which an adapter was saved, to save it so again."""
    file = adapter / ADAPTER_FILE
    if not file.is_file():
        return None
    return next((tensor.dtype for tensor in load_file(file).values()), None)


def _check_routers(tensors: dict[str, torch.Tensor], layers: int, width: int, folder: Path) -> None:
    """Refuse router tensors that do not fit the model, before anything is changed in it."""
    wanted = {f"{i}.weight": (width,) for i in range(layers)}
    wanted |= {f"{i}.bias": () for i in range(layers)}
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            what = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise ArtifactError(f"{folder / ROUTERS_FILE}: {name} is {what}; expected {shape}.")
    if more := sorted(set(tensors) - set(wanted)):
        raise ArtifactError(
            f"{folder / ROUTERS_FILE} has tensors for layers the model lacks: {more}."
        )
    _check_finite(tensors, folder / ROUTERS_FILE)


def _check_finite(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuse weights that were read from a file and hold NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(
                f"{file}: {name} holds values that are no numbers. Copy or train the artifact "
                "again."
            )


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
