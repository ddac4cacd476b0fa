# SPDX-License-Identifier: Apache-2.0
"""`firstlm report`: results as one HTML page with its pictures inside, and as PNG files.

Reads `summary.json` and the results beside it, as `firstlm experiment` writes them.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firstlm.command_config import ReportConfig
from firstlm.errors import ConfigError, DataError
from firstlm.figures import Picture, draw
from firstlm.results import write_bytes, write_text
from firstlm.scoreboard import SUMMARY, checked
from firstlm.sections import (
    Row,
    Section,
    gain_text,
    groups,
    labelled,
    metric_name,
    metric_text,
    read_rows,
    recomputed,
    title,
)

# arXiv 2410.12513, Llama-3-8B, about 15% of 32 layers skipped: score over that of base + LoRA.
PAPER = (
    ("translation (WMT En-De)", "BLEU-1", 41.78, 38.01),
    ("summarisation (CNN/DailyMail)", "ROUGE-1", 28.46, 31.80),
    ("summarisation (CNN/DailyMail)", "ROUGE-L", 16.99, 20.13),
)
PAPER_METRICS = ("bleu1", "rouge1")
TITLE = "firstlm: what was measured"
INTRODUCTION = (
    "FiRST (arXiv 2410.12513) puts a small router before each layer of a language model: it reads "
    "the prompt, and decides whether that layer runs for the whole answer. LoRA, a small addition "
    "to the weights, gets back what skipped layers cost. Below, what is left of quality at a skip "
    "rate, beside other policies for choosing layers. Within an experiment every arm has a LoRA of "
    "its own of the same budget, unless its name says whose it ran with; arms in brackets have the "
    "budget that the experiment's file gives them. Rates in column heads are those asked for, "
    "“skipped” and curves show what was measured. Intervals of 95% are over test items and seeds; "
    "with one seed, over items alone. Where seeds differ far more than items leave to chance, they "
    "hold the mean of all seeds in four of five cases with three seeds, and in three of five with "
    "two. “Of base + LoRA” is against LoRA with all layers, the best of an experiment's."
)
GLOSSARY = {
    "policy": "what decides which layers a prompt runs",
    "FiRST": "trained routers, which read the prompt",
    "majority": "the layers that routers skip for most prompts, skipped for every prompt",
    "majority here": "the same, counted on just these test prompts",
    "random": "layers drawn for each prompt; random fixed: drawn once; interior: neither end",
    "unified": "layers at equal distances are skipped (Unified Skip)",
    "static importance": "the layers go that change their input least (ShortGPT's block influence)",
    "early exit": "the last layers are skipped, for every prompt",
    "SkipDecode": "more layers go the longer the answer grows",
    "length only": "routers that are told nothing but the prompt's length",
    "token level": "each token decides anew, and missing keys and values are computed again",
    "attention alone, mlp alone": "of a skipped layer this half is left out, and the other runs",
    "prompts whole": "prompts run all layers, and only answers skip some (prefill: full)",
    "number formats differ": "one was scored in bfloat16 and the other in float32, for some seed",
    "p5-p95": "nine of ten prompts skip a share between these",
    "masks": "how many different sets of layers the prompts of a test set ran; entropy in bits",
    "policy@0.25": "a policy at the skip rate asked for",
}
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 80rem; margin: 2rem auto;
  padding: 0 1rem; }
p, dl { max-width: 62rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: .9rem; display: block; overflow-x: auto;
  margin: 1rem 0; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1.2rem; }
details { margin: 1rem 0; } summary { cursor: pointer; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td:first-child { min-width: 9rem; } td:not(:first-child) { white-space: nowrap; }
td .small { white-space: normal; }
th { border-bottom: 2px solid #9ca3af; } caption { text-align: left; color: #4b5563; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; }
figcaption, .small { color: #4b5563; font-size: .9rem; }
"""


LISTED = ".pictures"  # holds the names of the pictures that the last report wrote


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
    text = page(rows, pictures)
    target.mkdir(parents=True, exist_ok=True)
    listed = target / LISTED
    before = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    names = [f"{picture.name}.png" for picture in pictures]
    for old in {Path(name).name for name in before} - set(names):  # of results that are gone
        (target / old).unlink(missing_ok=True)
    write_text(listed, "\n".join(names))
    for picture in pictures:
        write_bytes(target / f"{picture.name}.png", picture.png)
    write_text(target / "index.html", text)
    print(f"The report is {target / 'index.html'}, with {len(pictures)} pictures beside it.")
    return 0


def _read(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the summary's rows, and the results beside it by name."""
    file = folder / SUMMARY
    if not file.is_file():
        raise DataError(
            f"{folder} has no {SUMMARY}; write it with `firstlm experiment summary FILES "
            f"--results {folder}`."
        )
    rows = read_rows(file)
    if not rows:
        raise DataError(
            f"{file} has no rows: nothing was scored yet. See `firstlm experiment run`."
        )
    found = {}
    for other in sorted(folder.glob("*.json")):
        try:
            content = json.loads(other.read_bytes())
        except ValueError as error:
            raise DataError(
                f"{other} is damaged ({error}); remove it, or make it anew with the command that "
                "did."
            ) from error
        # Other results, such as timings, lie in the same folder; a task is what answers have.
        if other != file and isinstance(content, dict) and "task" in content:
            found[other.stem] = checked(content, other)
    return rows, found


def page(rows: Sequence[Row], pictures: Sequence[Picture]) -> str:
    """Return the HTML page."""
    sections = groups(rows)
    words = "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in GLOSSARY.items())
    parts = [f"<h1>{TITLE}</h1>", f"<p>{INTRODUCTION}</p>"]
    parts += [f"<details><summary>Words</summary><dl>{words}</dl></details>", _overview(sections)]
    for number, (section, found) in enumerate(sections.items()):
        shown = [picture for picture in pictures if picture.section == section]
        parts.append(f'<h2 id="s{number}">{html.escape(title(section, found))}</h2>')
        parts += [_img(picture) for picture in shown[:1]]
        parts += [_scores(found), _gains(found), _adaptivity(found)]
        parts += [f"<p>{html.escape(text)}</p>" for text in [recomputed(found)] if text]
        parts += [_img(picture) for picture in shown[1:] if not picture.detail]
        if details := [_img(picture) for picture in shown if picture.detail]:
            parts.append(
                f"<details><summary>Layers and router outputs, run by run ({len(details)} "
                f"pictures)</summary>{''.join(details)}</details>"
            )
    parts.append(_paper(rows))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{TITLE}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _overview(sections: Mapping[Section, Sequence[Row]]) -> str:
    """Return a table of what FiRST keeps in each section, with links to the sections."""
    found: dict[tuple[str, int], dict[float, str]] = {}
    for number, (section, rows) in enumerate(sections.items()):
        for row in rows:
            routed = row["policy"] == row["lora_of"] == "first" and row["skip_rate_asked"]
            if not (routed and row["primary"] and row["retention"] is not None):
                continue
            name = html.escape(title(section, rows))
            link = f'<a href="#s{number}">{name}</a>, {html.escape(row["arm"])}'
            by_rate = found.setdefault((link, row["seeds"]), {})
            by_rate[row["skip_rate_asked"]] = f"{row['retention']:.0%}"
    if not found:
        return ""
    rates = sorted({rate for by_rate in found.values() for rate in by_rate})
    lines = [
        [link, *(by_rate.get(rate, "") for rate in rates), str(seeds)]
        for (link, seeds), by_rate in found.items()
    ]
    head = ["experiment, arm", *(f"{rate:.0%} asked" for rate in rates), "seeds"]
    caption = "What FiRST keeps of base + LoRA with all layers, by the skip rate asked for"
    return _marked_up(head, lines, caption)


def _img(picture: Picture) -> str:
    code, text = base64.b64encode(picture.png).decode(), html.escape(picture.caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{code}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table of texts."""
    return _marked_up(head, [[html.escape(cell) for cell in line] for line in lines], caption)


def _marked_up(head: Sequence[str], lines: Iterable[Sequence[str]], caption: str) -> str:
    """Return an HTML table of cells that are HTML themselves."""
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
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
                *(metric_text(by_metric.get(m), row) for m in metrics),
                "{:.1f} to {:.1f}".format(*row["ci95"]),
                kept,
                f"{row['seeds']} x {row['n_test']}",
            ]
        )
    primary = next(row["metric"] for row in rows if row["primary"])
    head = ["policy", "layers skipped (p5 to p95)", *(metric_name(m) for m in metrics)]
    head += [f"95% of {metric_name(primary)}", "of base + LoRA", "seeds x items"]
    return _table(head, lines)


def _adaptivity(rows: Sequence[Row]) -> str:
    lines = []
    for shown, row in labelled(rows):
        if not (row["primary"] and row["policy"] == "first" and row["skip_rate_asked"]):
            continue
        lines.append(
            [
                f"{shown}, {row['skip_rate_asked']:.0%}",
                f"{row['distinct_masks']:.1f}",
                f"{row['mask_entropy']:.2f}",
                *(
                    "-" if row[name] is None else f"{row[name]:+.2f}"
                    for name in ("length_correlation", "layer_length_correlation")
                ),
            ]
        )
    if not lines:
        return ""
    head = ["asked", "distinct masks", "entropy, bits", "correlation with length", "of one layer"]
    return _table(head, lines, "How much FiRST's masks differ by prompt")


def _gains(rows: Sequence[Row]) -> str:
    """Return a table of how far FiRST is above each policy, a column for each rate."""
    routed = [row for row in rows if row["primary"] and row["gains"]]
    arms = list(dict.fromkeys(row["arm"] for row in routed))
    tables = []
    for arm in arms:
        mine = [row for row in routed if row["arm"] == arm]
        found: dict[str, dict[float, str]] = {}
        gains = [{**gain, "at": row["skip_rate_asked"]} for row in mine for gain in row["gains"]]
        for shown, gain in labelled(gains):
            # Figures above, what else differs below: in one line three rates are wider than a page.
            figures, _, notes = html.escape(gain_text(gain)).partition("), ")
            cell = f'{figures})<br><span class="small">{notes}</span>'
            found.setdefault(shown, {})[gain["at"]] = cell
        rates = [row["skip_rate_asked"] for row in mine]
        lines = [
            [html.escape(name), *(by_rate.get(rate, "-") for rate in rates)]
            for name, by_rate in found.items()
        ]
        metric = metric_name(mine[0]["metric"])
        caption = (
            f"{metric} of {arm} above that of others asked for the same rate, with 95% intervals"
        )
        head = ["above", *(f"{rate:.0%} asked" for rate in rates)]
        tables.append(_marked_up(head, lines, caption))
    return "".join(tables)


def _paper(rows: Sequence[Row]) -> str:
    """Return the paper's figures beside ours at 15%."""
    lines = [
        [f"paper: {task}, Llama-3-8B", metric, f"{lora:.1f}", f"{first:.1f}", f"{first / lora:.0%}"]
        for task, metric, lora, first in PAPER
    ]
    for section, found in groups(rows).items():
        for row in found:
            near = row["policy"] == "first" and row["lora"] and row["skip_rate_asked"] == 0.15
            if not (near and (row["primary"] or row["metric"] in PAPER_METRICS)):
                continue
            lines.append(
                [
                    f"{title(section, found)}, {row['arm']}",
                    metric_name(row["metric"]),
                    "-" if row["retention"] is None else f"{row['reference_score']:.1f}",
                    f"{row['score']:.1f}",
                    "-" if row["retention"] is None else f"{row['retention']:.0%}",
                ]
            )
    head = ["about 15% of layers skipped", "metric", "base + LoRA", "FiRST", "kept"]
    return "<h2>Beside the paper</h2>" + _table(head, lines)
