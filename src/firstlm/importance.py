# SPDX-License-Identifier: Apache-2.0
"""A starting point for routers: which layers a task misses least, found by greedy removal.

Round by round, the layer whose removal (besides those already removed) costs the least
cross-entropy on a few training examples goes. The order sets the routers' biases, from where
training makes them depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from firstlm.data import Collator, Encoded
from firstlm.losses import answer_logits, row_losses
from firstlm.model import FirstModel
from firstlm.policies import FixedMask

SPACING = 0.25  # logit distance between layers that are next to each other in the order
CANDIDATES = 8  # layers measured per round after the first; 5 found a worse order (LOG)
FORWARD_ROWS = 8  # rows of a forward pass for each row of a training batch


@torch.no_grad()
def removal_order(
    model: FirstModel,
    examples: Sequence[Encoded],
    share: float,
    batch_size: int = 16,
    prefill: str = "skip",
) -> list[int]:
    """Return all layers in the order in which they can go.

    Args:
        model: a routed model.
        examples: on which cross-entropy is measured.
        share: of all layers whose place is measured round by round; the others follow by what
            their removal cost when it was last measured.
        batch_size: examples that training runs at once; a pass here, which keeps nothing for a
            backward pass, runs up to `FORWARD_ROWS` times as many.
        prefill: "skip" or "full".
    """
    rows = FORWARD_ROWS * batch_size
    collate = Collator(model.pad_id)
    batches = [
        {name: tensor.to(model.device) for name, tensor in collate(examples[i : i + rows]).items()}
        for i in range(0, len(examples), rows)
    ]
    together = max(1, rows // len(examples))  # masks that share a forward pass
    count = model.layer_count
    free = [i for i in range(count) if i not in model.routing.stack.locked]
    order: list[int] = []
    rounds = min(max(round(share * count), 1), len(free) - 1)
    known = dict.fromkeys(free, 0.0)  # loss without the layer, as last measured
    for _ in tqdm(range(rounds), desc="finding layers that matter least", leave=False):
        # A layer that cost much in an earlier round is not measured again while others are cheaper.
        candidates = sorted(known, key=known.__getitem__)[: CANDIDATES if order else None]
        masks = torch.ones(len(candidates), count, dtype=torch.bool)
        masks[:, order] = False
        masks[torch.arange(len(candidates)), torch.tensor(candidates)] = False
        losses = torch.cat(
            [_losses(model, batches, part, prefill) for part in masks.split(together)]
        )
        known.update(zip(candidates, losses.tolist(), strict=True))
        order.append(min(candidates, key=known.__getitem__))
        del known[order[-1]]
    return [*order, *sorted(known, key=known.__getitem__)]


def _losses(
    model: FirstModel,
    batches: Sequence[dict[str, torch.Tensor]],
    masks: torch.Tensor,
    prefill: str,
) -> torch.Tensor:
    """Return the answer cross-entropy [masks] of the batches under each mask."""
    copies = len(masks)
    total, count = torch.zeros(copies), torch.zeros(copies)
    for batch in batches:
        size = len(batch["input_ids"])
        repeated = {name: tensor.repeat(copies, 1) for name, tensor in batch.items()}
        policy = FixedMask(masks.repeat_interleave(size, dim=0))
        state = model.new_state(repeated["prompt_mask"], policy, prefill=prefill)
        sums, tokens = row_losses(*answer_logits(model, repeated, state))
        total += sums.view(copies, -1).sum(1).cpu()
        count += tokens.view(copies, -1).sum(1).cpu()
    return total / count


@torch.no_grad()
def start_from_order(model: FirstModel, order: Sequence[int], skip_rate: float) -> None:
    """Set router biases so that the first layers of the order are skipped at `skip_rate`."""
    cut = skip_rate * model.layer_count
    place = {layer: i for i, layer in enumerate(order)}
    for layer, router in enumerate(model.routers):
        router.bias.fill_(SPACING * (place.get(layer, len(order) + 2) + 0.5 - cut))
