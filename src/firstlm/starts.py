# SPDX-License-Identifier: Apache-2.0
"""Where training starts from: routers from a ranking of layers, phase 2 from measured offsets, LoRA
from a regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from firstlm import processes
from firstlm.calibration import find_offsets
from firstlm.clusters import DEPTH, group, router_inputs, start_from_orders
from firstlm.config import TrainConfig
from firstlm.data import Encoded, draw
from firstlm.healing import heal
from firstlm.importance import removal_order, start_from_order
from firstlm.model import FirstModel
from firstlm.policies import Policy
from firstlm.probes import decide_all
from firstlm.trainer import mixed_precision

CLUSTER_PROMPTS = 64  # for each group of prompts, to find groups and to fit routers to them
STATISTICS_PROMPTS = 64  # prompts on which router inputs are standardised
OFFSET_PROMPTS = 32  # on which phase 2 finds its first offsets


def warm_start(
    model: FirstModel, train: list[Encoded], config: TrainConfig, skip_rate: float
) -> dict[str, Any]:
    """Rank layers, for each group of prompts by itself, and start routers from the ranking."""
    highest = max([skip_rate, *(config.skip_rates or ())])

    def ranked(rows: list[Encoded]) -> list[int]:
        picked = draw(rows, config.warm_start, config.seed)
        return removal_order(model, picked, highest + 0.05, config.batch_size, config.prefill)

    model.eval()
    with mixed_precision(model):
        if config.clusters == 1:
            order = processes.same(ranked(train))
            start_from_order(model, order, skip_rate)
            return {"removal_order": order}
        rows = draw(train, CLUSTER_PROMPTS * config.clusters, config.seed)
        prompts = [row.prompt_ids for row in rows]
        everything = torch.ones(model.layer_count, dtype=torch.bool)
        layer = int(DEPTH * model.layer_count)
        states = router_inputs(model, prompts, everything, config.prefill)[layer]
        labels = processes.same(group(states, config.clusters, config.seed))
        groups = [
            [row for row, label in zip(rows, labels.tolist(), strict=True) if label == i]
            for i in range(int(labels.max()) + 1)
        ]
        orders = processes.same([ranked(rows) for rows in groups])
        start_from_orders(model, prompts, labels, orders, skip_rate, config.prefill)
    return {"removal_orders": orders, "cluster_prompts": [len(rows) for rows in groups]}


@torch.no_grad()
def standardise(model: FirstModel, train: list[Encoded], config: TrainConfig) -> None:
    """Give every router an input of mean 0 and deviation 1 over prompts."""
    rows = draw(train, STATISTICS_PROMPTS, config.seed)
    everything = torch.ones(model.layer_count, dtype=torch.bool)
    seen = router_inputs(model, [row.prompt_ids for row in rows], everything)
    for router, states in zip(model.routers, seen, strict=True):
        states = states.to(router.weight.device)
        if len(states) > 1:
            router.standardise(states.mean(0), states.std(0))


def first_offsets(
    model: FirstModel, train: list[Encoded], config: TrainConfig
) -> dict[float, float]:
    """Measure the logit offsets that meet a run's rates before phase 2 begins."""
    prompts = [row.prompt_ids for row in draw(train, OFFSET_PROMPTS, config.seed)]
    rates = sorted({config.skip_rate or 0.0, *(config.skip_rates or ())})
    with mixed_precision(model):
        rows = find_offsets(model, prompts, rates, config.prefill, config.batch_size)
    measured = [row.rate for row in rows]
    return {r: float(np.interp(r, measured, [row.offset for row in rows])) for r in rates}


def healed_start(
    model: FirstModel,
    train: list[Encoded],
    config: TrainConfig,
    policy_at: Callable[[float | None], Policy],
) -> dict[str, Any]:
    """Let LoRA put back what a run's rates leave missing, as far as a regression can."""
    if not config.heal:
        return {}
    rows = draw(train, config.heal, config.seed)
    prompts = [row.prompt_ids for row in rows]
    with mixed_precision(model):
        keep = [
            decide_all(model, prompts, policy_at(rate), config.prefill, config.batch_size)
            for rate in dict.fromkeys([config.skip_rate, *(config.skip_rates or ())])
        ]
        return {"healed": heal(model, rows, torch.stack(keep))}
