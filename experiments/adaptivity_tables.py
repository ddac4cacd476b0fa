# SPDX-License-Identifier: Apache-2.0
"""The tables on whether masks should differ, from a summary's rows and other reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import markdown

from firstlm.sections import Row, Section, from_elsewhere, gain_text, model_name, seeds_text

Report = Mapping[str, Any]  # what a script of this folder wrote

MAJORITIES = {
    "its own majority mask": ("majority", "first"),
    "that mask with LoRA of its own": ("majority", "majority"),
    "one mask a test set": ("majority_here", "first"),
}


def adaptivity_table(sections: Mapping[Section, list[Row]]) -> list[str]:
    """Return a table of how far FiRST's masks are above masks that do not differ by prompt."""
    lines, own = [], []
    for section, rows in sections.items():
        for row in rows:
            mine = [gain for gain in row["gains"] if gain["mask_of"] == row["mask_of"]]
            gains = {(gain["policy"], gain["lora_of"]): gain for gain in mine}
            found = [gains.get(key) for key in MAJORITIES.values()]
            if found[0] is None:
                continue
            own.append(found[0])
            lines.append(
                [
                    f"{row['file']}-{row['arm']}, {section.dataset}",
                    f"{row['skip_rate_asked']:.0%}",
                    f"{row['distinct_masks']:.1f}",
                    f"{row['mask_entropy']:.2f}",
                    *("" if gain is None else gain_text(gain) for gain in found),
                ]
            )
    names = ["model, test set", "asked", "masks", "entropy, bits", *MAJORITIES]
    return [
        *markdown(names, lines),
        "",
        "Above, in points of the primary metric, paired, with 95% intervals. Held against its own "
        "majority mask under the same LoRA, routers are above it beyond the interval in "
        f"{_tally([gain for gain in own if gain['seeds'] > 1])} of two seeds or more, and in "
        f"{_tally([gain for gain in own if gain['seeds'] == 1])} of one seed, whose intervals are "
        "over items alone.",
    ]


def _tally(gains: Sequence[Row]) -> str:
    """Say how many gains are above and below 0 beyond their intervals."""
    above, below = (sum(gain["low"] > 0 for gain in gains), sum(gain["high"] < 0 for gain in gains))
    return f"{above} (below it in {below}) of {len(gains)} comparisons"


CHOICES = {
    "by_set": "the best mask of each set",
    "mean": "predicted from the mean of its states",
    "mean_of_first_layer": "from that of the first layer",
    "last_token": "from the last token's state",
    "length": "from its length",
    "hindsight": "the best of each prompt, in hindsight",
}


def headroom_table(reports: Sequence[Report]) -> list[str]:
    """Return a table of what choosing a mask by prompt could gain."""
    lines = []
    for report in reports:
        found = report["choices"]
        cells = [
            "{gain:+.3f} ({0:+.3f} to {1:+.3f})".format(*found[name]["gain_ci95"], **found[name])
            if name != "by_set" or len(report["sets"]) > 1
            else ""
            for name in CHOICES
        ]
        about = (
            f"{report['artifact']}, {report['order_of']}, {' + '.join(report['sets'])}: "
            f"{report['skip_rate']:.0%} skipped, {report['masks']} masks, {report['prompts']} "
            f"prompts on {report['groups']} texts"
        )
        lines.append([about, f"{found['one_mask']['loss']:.3f}", *cells])
    return markdown(["model, masks of, sets", "one mask for all", *CHOICES.values()], lines)


def transfer_table(reports: Sequence[Report]) -> list[str]:
    """Return tables of what it costs a set that layers were ranked on another one."""
    found = []
    for report in reports:
        rows = report["rows"]
        names = {row["set"]: f"ranked on {_short(row['set'])}" for row in rows}
        names |= {"others": "ranked on all others", "unified": "equal distances"}
        lines = [["all", *(f"{row['all_layers']:.2f}" for row in rows)]]
        lines += [
            [shown, *(_loss(row["masks"][name], own=name == row["set"]) for row in rows)]
            for name, shown in names.items()
        ]
        found += [
            f"{model_name(report)}, {report['skipped']:.0%} of layers skipped, no training, "
            f"{min(row['items'] for row in rows)} test rows of a set:",
            "",
            *markdown(["layers", *(_short(row["set"]) for row in rows)], lines),
            "",
        ]
    return found[:-1]


def _short(path: str) -> str:
    """Return the name of a set without its task."""
    return path.rpartition("/")[2]


def _loss(found: Report, own: bool) -> str:
    """Return the loss of a set's own mask, or how far another is above it; bold if clear of 0."""
    if own:
        return f"{found['loss']:.2f}"
    low, high = found["above_own_ci95"]
    text = f"{found['above_own']:+.2f}"
    return f"**{text}**" if low > 0 or high < 0 else text


def domains_table(sections: Mapping[Section, list[Row]]) -> list[str]:
    """Return a table of routers that were trained on another set than the one they serve."""
    names = ["test set", "routers of", "asked", "kept of base + LoRA"]
    lines = []
    for section, rows in sections.items():
        routed = [row for row in rows if row["primary"] and row["policy"] == "first"]
        own = [row for row in routed if row["lora"] and not from_elsewhere(row)]
        for row in routed:
            if not (row["lora"] and from_elsewhere(row)):
                continue
            at = row["skip_rate_asked"]
            same = [here for here in own if here["skip_rate_asked"] == at]
            about = [section.dataset, row["routers_of"], f"{at:.0%}", _kept(row)]
            lines += [
                [*about, gain_text(gain)]
                for here in same
                for gain in here["gains"]
                if gain["arm"] == row["arm"]
            ]
    above = "The last column is in points of the primary metric, paired, of seeds that both have."
    return [*markdown([*names, "routers of its own above these"], lines), "", above]


def _kept(row: Row) -> str:
    if row["retention"] is None:
        return ""
    low, high = row["retention_ci95"]
    return f"{row['retention']:.0%} ({low:.0%} to {high:.0%}), {seeds_text(row)}"


def together_table(report: Report) -> list[str]:
    """Return a table of what one artifact keeps over two tasks at once."""
    names = ["policy", "asked", "skipped, by task", "kept of base + LoRA, mean of tasks"]
    names += ["worst task", "mean above one mask for all", "worst above"]
    lines = []
    for row in report["rows"]:
        policy, _, rate = row["run"].partition("@")
        rates = " and ".join(f"{one:.1%}" for one in row["skip_rates"])
        kept = (
            f"{row[k]:.1f} ({row[f'{k}_ci95'][0]:.1f} to {row[f'{k}_ci95'][1]:.1f})"
            for k in ("kept", "worst")
        )
        gains = [gain for gain in row["gains"] if gain["above"].startswith("majority@")]
        above = [gain_text(gain) for gain in gains]
        worst = ["{:+.1f} ({:+.1f} to {:+.1f})".format(*gain["worst"]) for gain in gains]
        shown = "FiRST, balanced" if policy == "router" else policy
        asked = f"{float(rate or 0):.0%}"
        lines.append([shown, asked, rates, *kept, " ".join(above), " ".join(worst)])
    return [*markdown(names, lines), "", "In percent, with 95% intervals over texts and seeds."]
