# SPDX-License-Identifier: Apache-2.0
"""`firstlm report`: results as one HTML page with its pictures inside, and as PNG files.

Reads `summary.json` and the results beside it, as `firstlm experiment` writes them.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from firstlm.command_config import ReportConfig
from firstlm.errors import ConfigError, DataError
from firstlm.masks import from_bits
from firstlm.results import write_text
from firstlm.scoreboard import LABELS
from firstlm.summary import read

Row = Mapping[str, Any]

COLORS = {
    "first": "#0b6e99",
    "length_only": "#0891b2",
    "majority": "#7c3aed",
    "random": "#c2410c",
    "random_interior": "#ea580c",
    "random_fixed": "#b45309",
    "unified": "#15803d",
    "early_exit": "#be123c",
    "static_importance": "#4d7c0f",
}
# arXiv 2410.12513, Llama-3-8B, about 15% of 32 layers skipped: score over that of base + LoRA.
PAPER = (
    ("translation (WMT En-De)", "BLEU-1", 41.78, 38.01),
    ("summarisation (CNN/DailyMail)", "ROUGE-1", 28.46, 31.80),
    ("summarisation (CNN/DailyMail)", "ROUGE-L", 16.99, 20.13),
)
LENGTH_GROUPS = 4  # of prompts, from short to long
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #9ca3af; } caption { text-align: left; color: #4b5563; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; }
figcaption, .small { color: #4b5563; font-size: .9rem; }
"""


def run(options: ReportConfig) -> int:
    """Write the page and its pictures (`firstlm report`)."""
    folder = Path(options.results)
    rows, reports = _read(folder)
    target = Path(options.output) if options.output else folder / "report"
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; expected a folder for the page, or nothing yet.")
    try:
        pictures = draw(rows, reports)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"Drawing needs {error.name}: install it with `pip install 'firstlm[report]'`."
        ) from error
    target.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (target / f"{picture.name}.png").write_bytes(picture.png)
    write_text(target / "index.html", page(rows, pictures))
    print(f"The report is {target / 'index.html'}, with {len(pictures)} pictures beside it.")
    return 0


def _read(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the summary's rows, and the results beside it by name."""
    file = folder / "summary.json"
    if not file.is_file():
        raise DataError(
            f"{folder} has no summary.json; write it with `firstlm experiment summary FILES "
            f"--results {folder}`."
        )
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        names = {"dataset", "policy", "metric", "score", "skip_rate", "ci95"}
        if not rows or not all(names <= set(row) for row in rows):
            raise ValueError("rows without scores")
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is no summary of experiments ({error}).") from error
    # Other results, such as timings, lie in the same folder; a task is what answers have.
    others = [other for other in sorted(folder.glob("*.json")) if '"task"' in other.read_text()]
    found = {other.stem: read(other) for other in others if other != file}
    return rows, {name: report for name, report in found.items() if report is not None}


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Return rows by task, data set and model."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["dataset"], str(row["model"])), []).append(row)
    return found


class Picture(NamedTuple):
    """A PNG picture, and of what it is."""

    name: str
    dataset: str
    model: str | None  # None: of every model on the data set
    png: bytes
    caption: str


def draw(rows: Sequence[Row], reports: Mapping[str, Any]) -> list[Picture]:
    """Return the pictures, in the order in which a page shows them."""
    pictures = []
    for (task, dataset, model), found in groups(rows).items():
        name = f"quality-{dataset}-{Path(model).name}"
        png = _quality([row for row in found if row["primary"]])
        caption = (
            f"{dataset} ({task}, {model}): quality against the share of layers skipped. Bars are "
            "95% intervals over items and seeds."
        )
        pictures.append(Picture(name, dataset, model, png, caption))
        timed = [row for row in found if row["primary"] and row["tpot_ratio"] is not None]
        if timed:
            caption = (
                f"{dataset} ({task}, {model}): quality against measured time per token, as a share "
                "of that with all layers of the same model, batch 1."
            )
            png = _quality(timed, "tpot_ratio", "time per token, % of all layers")
            pictures.append(
                Picture(f"time-{dataset}-{Path(model).name}", dataset, model, png, caption)
            )
    for file, report in reports.items():
        dataset = Path(report["inputs"]["data"]).parent.name
        for run, result in report["runs"].items():
            if run.startswith("router@") and "prompt_tokens" in result["items"][0]:
                name = f"layers-{file}-{run.replace('@', '-')}"
                caption = f"{file}, {run}: share of prompts that run each layer, by their length."
                pictures.append(Picture(name, dataset, None, _layers(result["items"]), caption))
            if "rho_histogram" in result:
                name = f"outputs-{file}-{run.replace('@', '-')}"
                caption = (
                    f"{file}, {run}: what routers say about each layer, as a share of the prompts. "
                    "Below 0.5 the layer is skipped."
                )
                png = _outputs(np.array(result["rho_histogram"]))
                pictures.append(Picture(name, dataset, None, png, caption))
    for dataset, found in curves(reports).items():
        caption = (
            f"{dataset}: cross-entropy while LoRA trains, of batches (faint) and validation rows, "
            "at the skip rate asked for; one line a seed."
        )
        pictures.append(Picture(f"training-{dataset}", dataset, None, _training(found), caption))
    return pictures


def curves(reports: Mapping[str, Any]) -> dict[str, dict[str, list[Row]]]:
    """Return how training went, by data set and arm; one entry a seed."""
    found: dict[str, dict[str, list[Row]]] = {}
    for file, report in reports.items():
        training = report.get("training", {})
        curve = training.get("joint", training.get("lora", {})).get("curve")
        if curve:
            dataset, arm = Path(report["inputs"]["data"]).parent.name, file.rpartition("-")[0]
            found.setdefault(dataset, {}).setdefault(arm, []).append(curve)
    return found


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _quality(
    rows: Sequence[Row], over: str = "skip_rate", axis: str = "layers skipped, %"
) -> bytes:
    """Draw score over skip rate or time, one line a policy and LoRA; plain LoRA is dashed."""
    figure, axes = _figure(8, 4.5)
    lines: dict[str, list[Row]] = {}
    for shown, row in labelled(rows):
        lines.setdefault(shown, []).append(row)
    for shown, points in lines.items():
        policy, lora_of = points[0]["policy"], points[0]["lora_of"]
        if policy == "base":
            style = "--" if lora_of else ":"
            axes.axhline(points[0]["score"], color="#6b7280", linestyle=style, label=shown)
            continue
        points = sorted(points, key=lambda row: row[over])
        scores = np.array([row["score"] for row in points])
        low, high = np.array([row["ci95"] for row in points]).T
        axes.errorbar(
            [100 * row[over] for row in points],
            scores,
            yerr=[np.maximum(scores - low, 0), np.maximum(high - scores, 0)],
            color=COLORS.get(policy, "#374151"),
            linestyle="-" if lora_of == policy else "-." if lora_of else ":",
            marker="o",
            markersize=4,
            capsize=3,
            label=shown,
        )
    axes.set_xlabel(axis)
    axes.set_ylabel(_metric(rows[0]["metric"]))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e5e7eb")
    figure.legend(fontsize="small", frameon=False, loc="outside lower center", ncols=3)
    return _png(figure)


def _layers(items: Sequence[Row]) -> bytes:
    """Draw the share of prompts that run each layer, one line of boxes a group of lengths."""
    tokens = np.array([item["prompt_tokens"] for item in items])
    keep = from_bits([item["keep"] for item in items])
    parts = [part for part in np.array_split(np.argsort(tokens, kind="stable"), LENGTH_GROUPS)]
    parts = [part for part in parts if len(part)]
    figure, axes = _figure(9, 0.5 * len(parts) + 1.2)
    shares = np.array([keep[part].mean(0) for part in parts])
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(parts)))
    axes.set_yticklabels([f"{tokens[part].min()}-{tokens[part].max()} tokens" for part in parts])
    axes.set_xlabel("layer")
    figure.colorbar(image, ax=axes, label="runs it")
    return _png(figure)


def _outputs(counts: np.ndarray) -> bytes:
    """Draw a histogram of router outputs [layers, bins], one column a layer."""
    figure, axes = _figure(9, 3)
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    image = axes.imshow(
        shares.T,
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=(-0.5, len(counts) - 0.5, 0, 1),
    )
    axes.axhline(0.5, color="#b91c1c", linewidth=1, linestyle="--")
    axes.set_xlabel("layer")
    axes.set_ylabel("router output")
    figure.colorbar(image, ax=axes, label="prompts")
    return _png(figure)


def _training(arms: Mapping[str, Sequence[Row]]) -> bytes:
    """Draw cross-entropy over steps, a colour an arm."""
    figure, axes = _figure(8, 4.5)
    for number, (arm, seeds) in enumerate(arms.items()):
        for seed, curve in enumerate(seeds):
            color = f"C{number % 10}"
            for name, style in (("ce", {"alpha": 0.25}), ("eval_loss", {"marker": "o"})):
                if name in curve:
                    shown = arm if name == "eval_loss" and seed == 0 else None
                    axes.plot(*zip(*curve[name], strict=True), color=color, label=shown, **style)
    axes.set_xlabel("LoRA step")
    axes.set_ylabel("cross-entropy, nats per answer token")
    axes.set_yscale("log")
    axes.grid(axis="y", color="#e5e7eb", which="both")
    axes.legend(fontsize="small", frameon=False)
    return _png(figure)


def _metric(name: str) -> str:
    """Return how a metric is written."""
    return LABELS.get(name, name)


def label(policy: str, lora_of: str | None) -> str:
    """Name a policy and the LoRA it ran with."""
    if policy == "base":
        return "base + LoRA, all layers" if lora_of else "base model"
    shown = "FiRST" if policy == "first" else policy.replace("_", " ")
    if lora_of is None:
        return f"{shown}, no LoRA"
    return shown if lora_of == policy else f"{shown}, LoRA of {label(lora_of, lora_of)}"


def labelled(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Return rows with their labels; where arms share one, it says which arm is meant."""
    arms: dict[str, set[str]] = {}
    names = [label(row["policy"], row["lora_of"]) for row in rows]
    for name, row in zip(names, rows, strict=True):
        arms.setdefault(name, set()).add(row["arm"])
    return [
        (f"{name} ({row['arm']})" if len(arms[name]) > 1 else name, row)
        for name, row in zip(names, rows, strict=True)
    ]


def page(rows: Sequence[Row], pictures: Sequence[Picture]) -> str:
    """Return the HTML page."""
    title = "firstlm: what was measured"
    parts = [f"<h1>{title}</h1>"]
    for (task, dataset, model), found in groups(rows).items():
        shown = [p for p in pictures if p.dataset == dataset and p.model in (model, None)]
        parts.append(f"<h2>{html.escape(f'{dataset}: {task}, {model}')}</h2>")
        parts += [_img(picture) for picture in shown[:1]]
        parts += [_scores(found), _adaptivity(found)]
        parts += [_img(picture) for picture in shown[1:]]
    parts.append(_paper(rows))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _img(picture: Picture) -> str:
    code, text = base64.b64encode(picture.png).decode(), html.escape(picture.caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{code}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table of texts."""
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line in lines
    )
    name = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{name}<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _scores(rows: Sequence[Row]) -> str:
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    found: dict[tuple[str, float], dict[str, Row]] = {}
    for shown, row in labelled(rows):
        found.setdefault((shown, row["skip_rate_asked"]), {})[row["metric"]] = row
    lines = []
    for (shown, _), by_metric in found.items():
        row = next(r for r in by_metric.values() if r["primary"])
        kept = "" if row["retention"] is None else f"{row['retention']:.1%}"
        spread = f"{row['skip_rate_p5']:.0%} to {row['skip_rate_p95']:.0%}"
        lines.append(
            [
                shown,
                f"{row['skip_rate']:.1%} ({spread})",
                *(f"{by_metric[m]['score']:.1f}" for m in metrics),
                "{:.1f} to {:.1f}".format(*row["ci95"]),
                kept,
                f"{row['seeds']} x {row['n_test']}",
            ]
        )
    primary = next(row["metric"] for row in rows if row["primary"])
    head = ["policy", "layers skipped (p5 to p95)", *(_metric(m) for m in metrics)]
    head += [f"95% of {_metric(primary)}", "of base + LoRA", "seeds x items"]
    return _table(head, lines)


def _adaptivity(rows: Sequence[Row]) -> str:
    lines = []
    for shown, row in labelled(rows):
        if not (row["primary"] and row["policy"] == "first" and row["skip_rate_asked"]):
            continue
        gain, length = row["gain_over_majority"], row["length_correlation"]
        interval = row["gain_over_majority_ci95"] or (0.0, 0.0)
        lines.append(
            [
                f"{shown}, {row['skip_rate_asked']:.0%}",
                f"{row['distinct_masks']:.1f}",
                f"{row['mask_entropy']:.2f}",
                "-" if length is None else f"{length:+.2f}",
                "-" if gain is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(gain, *interval),
            ]
        )
    if not lines:
        return ""
    head = ["asked", "distinct masks", "entropy, bits", "correlation with length"]
    return _table(
        [*head, "above its majority mask"], lines, "How much FiRST's masks differ by prompt"
    )


def _paper(rows: Sequence[Row]) -> str:
    """Return the paper's figures beside ours at 15%."""
    lines = [
        [f"paper: {task}, Llama-3-8B", metric, f"{lora:.1f}", f"{first:.1f}", f"{first / lora:.0%}"]
        for task, metric, lora, first in PAPER
    ]
    for (task, dataset, model), found in groups(rows).items():
        for row in found:
            near = row["policy"] == "first" and row["lora"] and row["skip_rate_asked"] == 0.15
            if not (near and row["primary"]):
                continue
            plain = [
                other["score"]
                for other in found
                if (other["policy"], other["lora"], other["metric"])
                == ("base", True, row["metric"])
            ]
            lines.append(
                [
                    f"{task} ({dataset}), {model}",
                    _metric(row["metric"]),
                    f"{plain[0]:.1f}" if plain else "-",
                    f"{row['score']:.1f}",
                    "-" if row["retention"] is None else f"{row['retention']:.0%}",
                ]
            )
    head = ["about 15% of layers skipped", "metric", "base + LoRA", "FiRST", "kept"]
    return "<h2>Beside the paper</h2>" + _table(head, lines)
