# SPDX-License-Identifier: Apache-2.0
"""The README of an artifact, written from its first_config.json. Knows no model."""

from __future__ import annotations

import re
from typing import Any

from firstlm.pretrained import hub_id


def model_card(config: dict[str, Any]) -> str:
    """Return the README of an artifact, with its measured table."""
    name = hub_id(config["base_model"]["id"])
    lora = " and LoRA" if config["adapter"] else ""
    base = name if name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None  # or a local folder
    unit = config["router_config"]["unit"]
    lines = [
        "---",
        "library_name: firstlm",
        *([f"base_model: {base}"] if base else []),
        "tags: [layer-skipping, first, peft]",
        "---",
        f"# FiRST routers{lora} for {base or 'a local base model'}",
        "",
        f"One router per layer ({config['layers']} layers, unit `{unit}`) reads the prompt and",
        "decides which layers it runs (arXiv 2410.12513). Use it with firstlm:",
        "",
        "```python",
        "from firstlm import FirstModel",
        "",
        'model = FirstModel.from_pretrained("path/or/id")',
        "```",
        "",
    ]
    for task, found in config["results"].items():
        how = f"{found['count']} items, prefill={found['prefill']}, {found['weights']} weights"
        lines += [f"Measured on {found['data']} ({task}, {how}):", ""]
        scores = [s for s in next(iter(found["runs"].values())) if s != "skip_rate"]
        lines += [f"| run | layers skipped | {' | '.join(scores)} |"]
        lines += ["|---|---|" + "---|" * len(scores)]
        for name, run in found["runs"].items():
            values = " | ".join(f"{run[score]:.1f}" for score in scores)
            lines.append(f"| {name} | {run['skip_rate']:.1%} | {values} |")
        lines.append("")
    for mode, rows in config["thresholds"].items():
        lines += [f"Calibrated skip rates (prefill={mode}):", "", "| asked | measured | offset |"]
        lines += ["|---|---|---|"]
        lines += [f"| {a:.2f} | {m:.3f} | {o:.3f} |" for a, o, m, *_ in rows] + [""]
    return "\n".join(lines)
