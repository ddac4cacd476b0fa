# SPDX-License-Identifier: Apache-2.0
"""What test_processes.py runs in two processes: FSDP2 over routed layers, each with its own masks.

Prints one JSON object: the losses of some steps, and of one step more after what was trained was
saved whole and put into a fresh model.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from training import make_examples, make_model

from firstlm import processes
from firstlm.adapters import add_lora
from firstlm.config import TrainConfig
from firstlm.data import Collator
from firstlm.losses import answer_cross_entropy, answer_pass, non_skip_penalty
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Policy, RouterPolicy
from firstlm.trainer import take_weights

STEPS, ROWS, LAYERS = 6, 8, 4
# Rows of the first process run no layer 1, those of the second none of layers 0 and 2.
MASKS = [[True, False, True, True]] * 4 + [[False, True, False, True]] * 4


def build(sharded: bool, routers: bool) -> FirstModel:
    """Return a model whose LoRA, or whose routers, train."""
    model = make_model(layers=LAYERS)
    torch.manual_seed(0)
    add_lora(model, TrainConfig(lora_rank=4))
    with torch.no_grad():  # B begins at 0: with it, A would get no gradient
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("routers." if routers else "lora_") in name)
    if sharded:
        for layer in model.routing.stack.modules:
            fully_shard(layer)
        fully_shard(model)
    return model


def step(model: FirstModel, rows: list, policy: Policy, gate: str) -> torch.Tensor:
    """Return the loss of this process's rows, a part of the mean over all."""
    inputs = Collator(model.pad_id)(rows)
    state = model.new_state(inputs["prompt_mask"], policy, gate=gate)
    with model.routing.tracing(state):
        output, labels = answer_pass(model, inputs, state)
    loss = processes.weight(torch.ones_like(labels)) * answer_cross_entropy(output.logits, labels)
    return loss if state.rho is None else loss + 0.1 * non_skip_penalty(state.rho)


def main(routers: bool) -> None:
    """Train on batches of eight rows, split among the processes there are."""
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    count = processes.count()
    rank = distributed.get_rank() if count > 1 else 0
    part = slice(rank * ROWS // count, (rank + 1) * ROWS // count)
    found = []

    def train(model: FirstModel, first: int, steps: int) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for number in range(first, first + steps):
            rows = make_examples(ROWS, number)[part]
            masks = FixedMask(torch.tensor(MASKS[part]))
            policy = RouterPolicy(model.routers) if routers else masks
            loss = step(model, rows, policy, "straight_through" if routers else "hard")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(processes.total(loss.detach())) / count)

    model = build(count > 1, routers)
    frozen = {n: processes.whole(p.detach()).clone() for n, p in model.named_parameters()}
    train(model, 0, STEPS)
    now = {n: processes.whole(p.detach()).clone() for n, p in model.named_parameters()}
    saved = {n: now[n] for n, p in model.named_parameters() if p.requires_grad}
    moved = sum(not torch.equal(now[n], frozen[n]) for n in saved)
    held = all(torch.equal(now[n], frozen[n]) for n in now.keys() - saved.keys())
    model = build(count > 1, routers)
    take_weights(model, saved)
    train(model, STEPS, 1)
    if processes.is_first():
        sums = {n: float(t.double().square().sum()) for n, t in saved.items()}
        print(json.dumps({"losses": found, "moved": moved, "held": held, "saved": sums}))
    if count > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] == "routers")
