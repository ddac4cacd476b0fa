# SPDX-License-Identifier: Apache-2.0
"""The folder of an artifact: where it is, what is in it, and what was measured with it.

`first_config.json` (format, base model, unit, thresholds, scores, provenance),
`routers.safetensors`, `adapter/` (a plain peft adapter), `README.md` (model card). Needs no model;
`artifact` makes one of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from firstlm.baselines import Baseline
from firstlm.config import RouterConfig
from firstlm.errors import ArtifactError, ConfigError
from firstlm.model_card import model_card
from firstlm.pretrained import ARTIFACT_FILE
from firstlm.results import atomic_dir, sha256_of, to_json, write_json
from firstlm.thresholds import Threshold, Thresholds

FORMAT_VERSION = 1
ROUTERS_FILE = "routers.safetensors"
CARD_FILE = "README.md"
ADAPTER_DIR = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
RESULT_KEYS = {"data", "count", "prefill", "weights", "runs"}
FINGERPRINT = re.compile(r"[0-9a-f]+(\.([0-9a-f]+|-)){2}")


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
    parse(config, folder)
    return config


def adapter_folder(folder: Path, config: dict[str, Any]) -> Path | None:
    """Return the folder of an artifact's LoRA, or None where it has none."""
    adapter = folder / ADAPTER_DIR
    for name in (ADAPTER_FILE, ADAPTER_CONFIG) if config.get("adapter") else ():
        if not (adapter / name).is_file():
            raise ArtifactError(
                f"{folder} was saved with LoRA, but {ADAPTER_DIR}/{name} is missing. "
                "Copy or train the artifact again."
            )
    return adapter if adapter.is_dir() else None


def read_routers(folder: Path) -> dict[str, torch.Tensor]:
    """Return the router tensors, `{i}.weight` [width] and `{i}.bias` []."""
    file = folder / ROUTERS_FILE
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}). Copy or train the artifact again."
        ) from error


def check_routers(tensors: dict[str, torch.Tensor], layers: int, width: int, folder: Path) -> None:
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
    check_finite(tensors, folder / ROUTERS_FILE)


def check_finite(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuse weights that were read from a file and hold NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(
                f"{file}: {name} holds values that are no numbers. Copy or train the artifact "
                "again."
            )


def content_hash(path_or_id: str) -> str:
    """Return a hash of what an artifact adds to its base model: routers, thresholds and LoRA."""
    folder = find(path_or_id)
    config = read_config(folder)
    adapter = adapter_folder(folder, config)
    files = [folder / ROUTERS_FILE, *([adapter / ADAPTER_FILE] if adapter else [])]
    parts = [to_json([config["thresholds"], config.get("policy")]), *map(sha256_of, files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_thresholds(path_or_id: str) -> Thresholds:
    """Return the thresholds of an artifact, without loading a model."""
    folder = find(path_or_id)
    return Thresholds(parse(read_config(folder), folder)[1])


def parse(
    config: dict[str, Any], folder: Path
) -> tuple[RouterConfig, dict[str, list[Threshold]], Baseline | None]:
    """Return router config, threshold table and baseline, if any, out of first_config.json."""
    try:
        router_config = RouterConfig(**config["router_config"])
        if not {"id", "fingerprint"} <= set(config["base_model"]):
            raise ValueError("base_model lacks id or fingerprint")
        if not FINGERPRINT.fullmatch(config["base_model"]["fingerprint"]):
            raise ValueError("the base model's fingerprint is malformed")
        check_results(config["results"])
        if not isinstance(config["layers"], int):
            raise ValueError("layers is no number")
        table = {
            mode: [
                Threshold(float(asked), float(offset), float(rate), tuple(map(float, skipped)))
                for asked, offset, rate, skipped in rows
            ]
            for mode, rows in config["thresholds"].items()
        }
        if not all(map(math.isfinite, (row.offset for rows in table.values() for row in rows))):
            raise ValueError("a threshold is no number")
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


def record(folder: Path, task: str, results: dict[str, Any]) -> None:
    """Write what was measured on a task into an artifact: its config and its model card.

    Args:
        folder: the artifact.
        task: name of the task; what was measured on it before is replaced.
        results: `RESULT_KEYS`; `runs` has a `skip_rate` and scores for each run's name.
    """
    check_results({task: results})
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


def check_results(results: dict[str, Any]) -> None:
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
