# SPDX-License-Identifier: Apache-2.0
"""`firstlm inspect`: what is in an artifact, read from its files without loading a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firstlm.artifact_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    ROUTERS_FILE,
    adapter_folder,
    find,
    read_config,
    read_routers,
)
from firstlm.command_config import InspectConfig
from firstlm.errors import ArtifactError
from firstlm.results import to_json

BARS = "▁▂▃▄▅▆▇█"


def run(options: InspectConfig) -> int:
    """Print what is in the artifact, for people or as one JSON object."""
    found = read_artifact(options.artifact)
    print(to_json(found) if options.json else describe(found))
    return 0


def read_artifact(path: str | Path) -> dict[str, Any]:
    """Return config, router statistics, adapter and sizes of an artifact."""
    folder = find(str(path))
    config = read_config(folder)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        "path": str(folder),
        "config": config,
        "routers": _router_statistics(folder, config["layers"]),
        "adapter": _read_adapter(adapter_folder(folder, config)),
        "bytes": {str(file.relative_to(folder)): file.stat().st_size for file in files},
    }


def describe(found: dict[str, Any]) -> str:
    """Return the text that `firstlm inspect` shows."""
    config, routers = found["config"], found["routers"]
    base = config["base_model"]
    layers = len(routers["bias"])
    revision = f" at {base['revision']}" if base.get("revision") else ""
    unit = config["router_config"].get("unit", "block")
    lines = [
        f"FiRST artifact {found['path']} ({_size(sum(found['bytes'].values()))})",
        _line("base model", f"{base['id'] or 'unknown'}{revision}"),
        _line("fingerprint", _short(base["fingerprint"])),
        _line(
            "written by",
            f"firstlm {config.get('firstlm_version', '?')}, format {config['format_version']}",
        ),
        _line("routers", f"{layers} of unit {unit}, reading {routers['width']} values"),
        *_describe_routers(routers),
        *_describe_thresholds(config["thresholds"]),
        *_describe_adapter(found),
        *_describe_values("training", config.get("training")),
        *_describe_values("results", config["results"]),
        "files",
        *(f"  {_size(size):>9}  {name}" for name, size in found["bytes"].items()),
    ]
    return "\n".join(line for line in lines if line)


def _router_statistics(folder: Path, layers: int) -> dict[str, Any]:
    """Return weight norm and bias per layer."""
    tensors = read_routers(folder)
    names = {f"{layer}.{part}" for layer in range(layers) for part in ("weight", "bias")}
    if set(tensors) != names or not layers:
        odd = ", ".join(sorted(set(tensors) ^ names)[:6])
        raise ArtifactError(
            f"{folder / ROUTERS_FILE} doesn't hold a weight and a bias for each of {layers} layers "
            f"(see {odd or 'first_config.json'}). Copy or train the artifact again."
        )
    weights = [tensors[f"{layer}.weight"].float() for layer in range(layers)]
    return {
        "width": weights[0].numel(),
        "weight_norm": [float(weight.norm()) for weight in weights],
        "bias": [float(tensors[f"{layer}.bias"]) for layer in range(layers)],
    }


def _read_adapter(folder: Path | None) -> dict[str, Any] | None:
    """Return what the peft adapter changes, or None where the artifact has routers only."""
    if folder is None:
        return None
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / ADAPTER_FILE, framework="pt") as content:
            shapes = [content.get_slice(name).get_shape() for name in content.keys()]  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} can't be read as a peft adapter ({error}). Copy or train the artifact again."
        ) from error
    targets = config.get("target_modules") or []
    return {
        "type": config.get("peft_type"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "targets": [targets] if isinstance(targets, str) else sorted(targets),
        "parameters": sum(map(math.prod, shapes)),
        "matrices": len(shapes),
    }


def _describe_routers(routers: dict[str, Any]) -> list[str]:
    """Return a strip per statistic, one character a layer, layer 0 first."""
    lines = [_line("", _ruler(len(routers["bias"])))]
    for label, values in (("weight norm", routers["weight_norm"]), ("bias", routers["bias"])):
        finite = [value for value in values if math.isfinite(value)]
        extent = f"{min(finite):.3g} to {max(finite):.3g}" if finite else "nothing finite"
        lines.append(_line(f"  {label}", f"{bars(values)}  {extent}"))
        if len(finite) < len(values):
            broken = [str(i) for i, value in enumerate(values) if not math.isfinite(value)]
            lines.append(_line("", f"not finite at layer {', '.join(broken)}: training diverged"))
    return lines


def bars(values: Sequence[float]) -> str:
    """Draw values as one bar each, from the smallest to the largest; '!' where not finite."""
    finite = [value for value in values if math.isfinite(value)]
    low = min(finite, default=0.0)
    step = (max(finite, default=0.0) - low) / (len(BARS) - 1) or math.inf
    return "".join(BARS[round((v - low) / step)] if math.isfinite(v) else "!" for v in values)


def _describe_thresholds(thresholds: dict[str, Any]) -> list[str]:
    """Return the rates the artifact serves, per prefill mode."""
    lines = []
    for mode, rows in thresholds.items():
        lines.append(f"skip rates with --prefill {mode}")
        lines.append("     asked   measured    logit offset   layers skipped, by share of prompts")
        for asked, offset, rate, *skipped in rows:
            shares = bars(*skipped) if skipped else ""
            lines.append(f"  {asked:8.1%}    {rate:7.1%}   {offset:+13.4f}   {shares}".rstrip())
    return lines or ["skip rates       none measured; run 'firstlm calibrate'"]


def _describe_adapter(found: dict[str, Any]) -> list[str]:
    """Return a line on the adapter, and one on what it changes."""
    adapter = found["adapter"]
    if adapter is None:
        return [_line("adapter", "none: routers only")]
    size = f"{adapter['parameters'] / 1e6:.2f} M parameters in {adapter['matrices']} matrices"
    settings = f"rank {adapter['rank']}, alpha {adapter['alpha']}, dropout {adapter['dropout']}"
    return [
        _line("adapter", f"{adapter['type']}, {settings}, {size}"),
        _line("", "on " + ", ".join(adapter["targets"])),
    ]


def _describe_values(title: str, values: Any) -> list[str]:
    """Return nested values as indented lines; long lists are cut."""
    if not values:
        return []
    return [title, *_indented(values, 2)]


def _indented(values: Any, depth: int) -> list[str]:
    """Return one line per leaf of nested dicts."""
    if not isinstance(values, dict):
        return [" " * depth + _short(values)]
    lines = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += [" " * depth + str(key), *_indented(value, depth + 2)]
        else:
            lines.append(f"{' ' * depth}{key}: {_short(value)}")
    return lines


def _short(value: Any, width: int = 80) -> str:
    """Return a value in at most `width` characters."""
    text = (
        value
        if isinstance(value, str)
        else f"{value:.6g}"
        if isinstance(value, float)
        else to_json(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _line(label: str, text: str) -> str:
    """Return one labelled line."""
    return f"{label:<15}  {text}"


def _ruler(layers: int) -> str:
    """Return marks at every tenth layer."""
    return "".join(f"{layer:<10}" for layer in range(0, layers, 10)).rstrip()


def _size(count: int) -> str:
    """Return a byte count as one would say it."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.1f} GB"
