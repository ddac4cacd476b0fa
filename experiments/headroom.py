# SPDX-License-Identifier: Apache-2.0
"""Is there anything to adapt to? What the best choice of layers for each prompt could gain.

Masks that skip equally many layers, and differ from an artifact's majority mask in one layer, are
scored on each prompt of one or more test sets. Compared by cross-validation, prompts about one text
together: one mask for all; one mask a test set; the mask that ridge regression predicts to be best,
from the mean of a prompt's states a third of the way up, that of the first layer, the last token's
state, or the prompt's length alone; and the best mask of each prompt in hindsight, which knows the
answer.

    python experiments/headroom.py runs/qamr-first-0 --data qa/qamr \\
        --output results/headroom_qamr_first.json
    python experiments/headroom.py runs/mix-clustered-0 \\
        --data qa/qamr summarization/debian_synopsis --output results/headroom_mix.json
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from firstlm import artifact_files
from firstlm.clusters import DEPTH, router_inputs
from firstlm.data import encode, scored_examples
from firstlm.inputs import pad_left
from firstlm.losses import item_losses
from firstlm.matrix import data_files
from firstlm.metrics import grouped, means, over_seeds
from firstlm.model import FirstModel
from firstlm.policies import FixedMask
from firstlm.results import DATA_VARIABLE, provenance, sha256_of, write_json

INSIDE, OUTSIDE = 4, 5  # layers of the mask, and beside it, that are exchanged one for one
FOLDS, BATCH = 5, 16
RIDGES = (0.1, 1.0, 10.0, 100.0, 1e9)  # on standardised features, per feature


def features_of(model: FirstModel, prompts: list[list[int]], keep: torch.Tensor) -> dict:
    """Return what a router might read of prompts under a mask [prompts, width], by its name."""
    deep = int(DEPTH * model.layer_count)
    seen = router_inputs(model, prompts, keep)
    last = []
    for first in range(0, len(prompts), BATCH):
        ids, mask = (
            part.to(model.device) for part in pad_left(prompts[first : first + BATCH], model.pad_id)
        )
        output, _ = model(
            ids, mask, FixedMask(keep), output_hidden_states=True, logits_to_keep=torch.tensor([-1])
        )
        last.append(output.hidden_states[deep][:, -1].float().cpu())
    return {
        "mean": seen[deep].numpy(),
        "mean_of_first_layer": seen[1].numpy(),
        "last_token": torch.cat(last).numpy(),
        "length": np.log([[len(prompt)] for prompt in prompts]),
    }


def order_of(folder: str, rate: float) -> list[int]:
    """Return an artifact's layers, those first that most prompts skip; ties by its ranking."""
    record = artifact_files.read_config(artifact_files.find(folder))["training"]["routers"]
    rankings = record.get("removal_orders") or [record["removal_order"]]
    places = np.mean([np.argsort(ranking) for ranking in rankings], axis=0)
    skipped = artifact_files.read_thresholds(folder).skipped(rate, "skip")
    return sorted(range(len(skipped)), key=lambda layer: (-skipped[layer], places[layer]))


def masks_near(order: list[int], layers: int, rate: float) -> torch.Tensor:
    """Return keep [masks, layers]: the one that an order begins with, and its neighbours."""
    count = round(rate * layers)
    base = order[:count]
    last, next_ones = order[max(count - INSIDE, 0) : count], order[count : count + OUTSIDE]
    swaps = product(last, next_ones)
    sets = [base, *([layer for layer in base if layer != out] + [new] for out, new in swaps)]
    keep = torch.ones(len(sets), layers, dtype=torch.bool)
    for row, skipped in zip(keep, sets, strict=True):
        row[skipped] = False
    return keep


def predicted(known: np.ndarray, losses: np.ndarray, asked: np.ndarray, ridge: float) -> np.ndarray:
    """Return the mask that ridge regression expects to lose least on each prompt.

    Args:
        known: features of the prompts to learn from [prompts, width].
        losses: of them under each mask [prompts, masks].
        asked: features of the prompts to choose for.
        ridge: weight of the penalty.
    """
    mean, scale = known.mean(0), known.std(0) + 1e-6
    rows, new = (known - mean) / scale, (asked - mean) / scale
    # Against the prompt's mean over masks: how hard a prompt is says nothing about masks.
    wish = losses - losses.mean(1, keepdims=True)
    width = rows.shape[1]
    alike = rows @ rows.T / width + ridge * np.eye(len(rows))
    weight = np.linalg.solve(alike, wish - wish.mean(0))
    return (wish.mean(0) + new @ rows.T / width @ weight).argmin(1)


def choose_by(features: np.ndarray, losses: np.ndarray, fold: np.ndarray, at: int) -> np.ndarray:
    """Return a mask for each prompt of a fold, learnt on the others.

    The ridge is picked on one of them; the strongest is one mask for all.
    """
    held, test = fold == (at + 1) % FOLDS, fold == at
    inner = ~held & ~test
    scores = [
        losses[held, predicted(features[inner], losses[inner], features[held], ridge)].mean()
        for ridge in RIDGES
    ]
    ridge = RIDGES[int(np.argmin(scores))]
    return predicted(features[~test], losses[~test], features[test], ridge)


def compare(
    losses: np.ndarray, features: dict[str, np.ndarray], sets: np.ndarray, groups: np.ndarray
) -> dict:
    """Return the mean loss of each way to choose, and by how much it is below one mask for all.

    Args:
        losses: per answer token [prompts, masks].
        features: what a choice may know [prompts, width], by its name.
        sets: the test set of each prompt.
        groups: of prompts about one text; they are in one fold, and drawn together.
    """
    rng = np.random.default_rng(0)
    number = groups.max() + 1
    fold = (rng.permutation(number) % FOLDS)[groups]
    chosen = {name: np.empty(len(losses), int) for name in ("one_mask", "by_set", *features)}
    for i in range(FOLDS):
        train, test = np.flatnonzero(fold != i), np.flatnonzero(fold == i)
        chosen["one_mask"][test] = losses[train].mean(0).argmin()
        for one in np.unique(sets):
            of_set = train[sets[train] == one]
            chosen["by_set"][test[sets[test] == one]] = losses[of_set].mean(0).argmin()
        for name, known in features.items():
            chosen[name][test] = choose_by(known, losses, fold, i)
    chosen["hindsight"] = losses.argmin(1)
    rows = np.arange(len(losses))
    one = losses[rows, chosen["one_mask"]]
    found = {}
    for name, picked in chosen.items():
        mine = losses[rows, picked]
        seeds = ([means(loss.tolist(), scale=1.0)] for loss in (one, mine))
        gain = over_seeds(*seeds, groups=groups, difference=True)
        found[name] = {
            "loss": float(mine.mean()),
            "gain": gain.value,
            "gain_ci95": [gain.low, gain.high],
            "masks_used": len(set(picked.tolist())),
        }
    return found


@torch.no_grad()
def main() -> None:
    """Score every mask on every prompt, and compare ways to choose one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("artifact")
    parser.add_argument(
        "--data", nargs="+", required=True, help=f"folders, or sets below ${DATA_VARIABLE}"
    )
    parser.add_argument("--order-of", help="artifact whose majority mask is meant, if another")
    parser.add_argument("--skip-rate", type=float, default=0.25)
    parser.add_argument("--limit", type=int, default=500, help="prompts of each set")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output")
    options = parser.parse_args()
    model = FirstModel.from_pretrained(options.artifact, dtype=options.dtype)
    order = order_of(options.order_of or options.artifact, options.skip_rate)
    keep = masks_near(order, model.layer_count, options.skip_rate)
    files = [data_files(name, "--data")["test"] for name in options.data]
    rows, sets, names = [], [], []
    for number, file in enumerate(files):
        found = scored_examples(file, limit=options.limit)
        names += [f"{number} {example.group}" for example in found]
        rows += [encode(example, model.tokenizer, model.context_length) for example in found]
        sets += [number] * len(found)
    columns = []
    for mask in tqdm(keep, desc="masks"):
        total, tokens, _ = item_losses(model, rows, FixedMask(mask), options.batch_size)
        columns.append((total / tokens).numpy())
    losses = np.stack(columns, axis=1)
    prompts = [row.prompt_ids for row in rows]
    groups = grouped(names)
    result = {
        "artifact": Path(options.artifact).name,
        "order_of": Path(options.order_of or options.artifact).name,
        "sets": options.data,
        "prompts": len(rows),
        "groups": int(groups.max()) + 1,
        "masks": len(keep),
        "skip_rate": float(1 - keep[0].float().mean()),
        "choices": compare(losses, features_of(model, prompts, keep[0]), np.array(sets), groups),
        "provenance": provenance(
            data={n: sha256_of(file) for n, file in zip(options.data, files, strict=True)}
        ),
    }
    for name, found in result["choices"].items():
        print(
            f"{name:20} loss {found['loss']:.4f}, below one mask by {found['gain']:+.4f} "
            f"({found['gain_ci95'][0]:+.4f} to {found['gain_ci95'][1]:+.4f}), "
            f"{found['masks_used']} masks"
        )
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
