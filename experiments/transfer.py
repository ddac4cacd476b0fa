# SPDX-License-Identifier: Apache-2.0
"""Do domains want other layers? Each set's ranking of layers, measured on every other set.

Layers are ranked on some training rows of each set, as `firstlm train` begins; then as many of them
as a skip rate says are left out on test rows of each set, by its own ranking, by that of each other
set, by the mean place in those of all other sets, and at equal distances. Nothing is trained. A
ranking takes minutes; an interrupted call goes on after the last one.

    python experiments/transfer.py --data qa/qamr qa/squad_v1 summarization/debian_synopsis \\
        --output results/transfer_smollm2.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from firstlm import FirstModel
from firstlm.data import Encoded, draw, encode, scored_examples
from firstlm.errors import FirstError
from firstlm.examples import Example, load_examples
from firstlm.importance import removal_order
from firstlm.journal import Journal
from firstlm.losses import item_losses
from firstlm.matrix import data_files
from firstlm.metrics import Groups, grouped, means, over_seeds
from firstlm.policies import Policy, RunAll
from firstlm.pretrained import load_base
from firstlm.results import DATA_VARIABLE, provenance, sha256_of, write_json
from firstlm.rows import check_sources

SPARE = 20  # times as many rows are looked at as are wanted, for ones that are short enough
SPLITS = ("train", "test")
RANKED = 64  # rows at most that layers are ranked on


def rows_of(
    model: FirstModel, examples: list[Example], longest: int, count: int, tokens: int | None = None
) -> tuple[list[Encoded], list[str]]:
    """Return rows of at most `longest` tokens, and what each is about.

    Args:
        model: whose tokenizer is used.
        examples: to take them from, in order.
        longest: tokens of a row, with its answer.
        count: rows to take.
        tokens: of all rows together, with which they are enough, too.
    """
    rows, groups, seen = [], [], 0
    for example in examples:
        row = encode(example, model.tokenizer)
        length = len(row.prompt_ids) + len(row.answer_ids)
        if length <= longest:
            rows.append(row)
            groups.append(example.group)
            seen += length
        if len(rows) == count or (tokens is not None and seen >= tokens):
            break
    return rows, groups


def masks_for(
    model: FirstModel, orders: dict[str, list[int]], name: str, rate: float
) -> dict[str, Policy]:
    """Return what is measured on a set, by what it is made of; its own ranking first."""
    layers = model.layer_count
    count = round(rate * layers)
    others = [other for other in orders if other != name]
    skipped = {other: orders[other][:count] for other in [name, *others]}
    if others:
        places = np.mean([np.argsort(orders[other]) for other in others], axis=0)
        skipped["others"] = np.argsort(places, kind="stable")[:count].tolist()
    found = {mask: model.choices.asked(skip_layers=some) for mask, some in skipped.items()}
    found["unified"] = model.baseline_for("unified", count / layers).at()
    return found


def above(losses: np.ndarray, own: np.ndarray, groups: Groups) -> dict[str, Any]:
    """Return the mean loss, and by how much it is above that of the set's own mask [items]."""
    ours, base = (means(one.tolist(), scale=1.0) for one in (losses, own))
    worse = over_seeds([ours], [base], groups=groups, difference=True)
    return {
        "loss": float(losses.mean()),
        "above_own": worse.value,
        "above_own_ci95": [worse.low, worse.high],
    }


def compare(
    model: FirstModel,
    orders: dict[str, list[int]],
    tests: dict[str, tuple[list[Encoded], list[str]]],
    rate: float,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return a row for each set: losses in nats per answer token, by mask."""

    def measured(rows: list[Encoded], policy: Policy) -> np.ndarray:
        total, tokens, _ = item_losses(model, rows, policy, batch_size)
        return (total / tokens).numpy()

    found = []
    for name, (rows, about) in tqdm(tests.items(), desc="measuring"):
        losses = {
            mask: measured(rows, policy)
            for mask, policy in masks_for(model, orders, name, rate).items()
        }
        groups, own = grouped(about), losses[name]
        found.append(
            {
                "set": name,
                "items": len(rows),
                "groups": int(groups.max()) + 1,
                "tokens": float(np.mean([len(row.prompt_ids) for row in rows])),
                "all_layers": float(measured(rows, RunAll()).mean()),
                "masks": {mask: above(one, own, groups) for mask, one in losses.items()},
            }
        )
    return found


@torch.no_grad()
def main() -> None:
    """Rank the layers on every set, and measure every ranking on every set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", nargs="+", required=True, help=f"folders, or sets below ${DATA_VARIABLE}"
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--skip-rate", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=1200, help="of rows to rank layers on")
    parser.add_argument("--limit", type=int, default=40, help="test rows of each set")
    parser.add_argument("--longest", type=int, default=320, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    base, tokenizer = load_base(options.model)
    model = FirstModel.from_base(base, tokenizer=tokenizer)
    model.eval()
    try:
        files = {name: data_files(name, "--data") for name in options.data}
        check_sources(*(by_split[split] for by_split in files.values() for split in SPLITS))
    except FirstError as error:
        parser.error(str(error))
    hashes = {
        f"{name} {split}": sha256_of(file)
        for name, by_split in files.items()
        for split in SPLITS
        if (file := by_split[split])
    }
    kept = ("model", "skip_rate", "tokens", "longest", "seed")
    journal = Journal(
        Path(f"{options.output}.partial"), {key: getattr(options, key) for key in kept}
    )
    orders, tests = {}, {}
    for name, by_split in files.items():
        ranked = hashes[f"{name} train"]  # so that the same call with other sets goes on, too
        if (order := journal.get(ranked)) is None:
            drawn = draw(load_examples(by_split["train"]), SPARE * RANKED, options.seed)
            rows, _ = rows_of(model, drawn, options.longest, RANKED, options.tokens)
            print(f"{name}: ranking layers on {len(rows)} rows", flush=True)
            order = removal_order(model, rows, options.skip_rate + 0.05, options.batch_size)
            journal.put(ranked, order)
        orders[name] = order
        drawn = scored_examples(by_split["test"], limit=SPARE * options.limit)
        tests[name] = rows_of(model, drawn, options.longest, options.limit)
    result = {
        "model": options.model,
        "skipped": round(options.skip_rate * model.layer_count) / model.layer_count,
        "tokens": options.tokens,
        "longest": options.longest,
        "orders": orders,
        "rows": compare(model, orders, tests, options.skip_rate, options.batch_size),
        "provenance": provenance(seed=options.seed, data=hashes),
    }
    for row in result["rows"]:
        print(f"{row['set']}: all layers {row['all_layers']:.3f}")
        for mask, found in row["masks"].items():
            low, high = found["above_own_ci95"]
            print(
                f"  {mask:32} {found['loss']:.3f}, {found['above_own']:+.3f} "
                f"({low:+.3f} to {high:+.3f})"
            )
    write_json(options.output, result)
    journal.close()


if __name__ == "__main__":
    main()
