# SPDX-License-Identifier: Apache-2.0
"""Losses of the paper (arXiv 2410.12513, section 3.2), distance to the full depth, forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from firstlm.data import IGNORE, Collator, Encoded
from firstlm.decisions import RoutingState
from firstlm.model import FirstModel
from firstlm.policies import Policy, RunAll

DIVERGENCE = 0.5  # weight of the answers' divergence beside the distance of states


def answer_logits(
    first: FirstModel, inputs: dict[str, torch.Tensor], state: RoutingState
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch and return its logits [batch, tokens, vocab] and labels, answers only."""
    output, labels = answer_pass(first, inputs, state)
    return output.logits, labels


def answer_pass(
    first: FirstModel,
    inputs: dict[str, torch.Tensor],
    state: RoutingState,
    call: nn.Module | None = None,
    **more: Any,
) -> tuple[Any, torch.Tensor]:
    """Run a left-padded batch; return the model's output, with logits for answers only, and labels.

    Left padding puts answers last, and only they need the vocabulary-sized matmul.

    Args:
        first: the model.
        inputs: what `Collator` makes.
        state: the decisions to take or obey.
        call: what to call in the model's place, where something wraps it (DDP).
        more: passed on to the model, such as `output_hidden_states`.
    """
    labels, kwargs = inputs["labels"], dict[str, Any](more)
    if "logits_to_keep" in inspect.signature(first.plain_base.forward).parameters:
        start = max(int((labels != IGNORE).any(0).nonzero()[0]) - 1, 0)
        # As indices: a slice would be a strided view, which is many times slower on the CPU.
        kwargs["logits_to_keep"] = torch.arange(start, labels.shape[1], device=labels.device)
        labels = labels[:, start:]
    output, _ = (call or first)(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        state=state,
        **kwargs,
    )
    return output, labels


@dataclass(frozen=True)
class FullDepth:
    """What a model computes with all its layers; what skipping shall stay close to.

    Attributes:
        states: the last hidden states [batch, tokens, hidden].
        logits: those of the answers [batch, tokens, vocab].
    """

    states: torch.Tensor
    logits: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, first: FirstModel, inputs: dict[str, torch.Tensor]) -> FullDepth:
        """Run a batch through all layers, without dropout."""
        training = first.training
        first.eval()
        try:
            state = first.new_state(inputs["prompt_mask"], RunAll())
            output, _ = answer_pass(first, inputs, state, output_hidden_states=True)
        finally:
            first.train(training)
        return cls(output.hidden_states[-1], output.logits)

    def distance(
        self,
        states: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        weights: tuple[torch.Tensor | float, torch.Tensor | float] = (1.0, 1.0),
    ) -> torch.Tensor:
        """Return how far a pass over the same batch is from this one: 0 where they are equal.

        Args:
            states: its last hidden states [batch, tokens, hidden].
            logits: those of its answers [batch, tokens, vocab].
            labels: of the answers [batch, tokens], -100 where there is no loss.
            mask: [batch, tokens] of `states`; padding is left out.
            weights: of the part that states have, and of the part that answers have.
        """
        distance = weights[0] * state_distance(states, self.states, mask)
        divergence = answer_divergence(logits, self.logits, labels)
        return distance + DIVERGENCE * weights[1] * divergence


def state_distance(states: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of hidden states over the wanted ones' squared length.

    Args:
        states: [batch, tokens, hidden], what skipping left.
        wanted: [batch, tokens, hidden], of the full depth.
        mask: [batch, tokens]; padding is left out of the mean.
    """
    real = mask.bool()
    states, wanted = states[real].float(), wanted[real].float()
    return ((states - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6)).mean()


def answer_divergence(
    logits: torch.Tensor, wanted: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence KL(wanted || logits) over answer tokens, in nats.

    Args:
        logits: [batch, tokens, vocab]; position t predicts token t + 1.
        wanted: [batch, tokens, vocab], of the full depth.
        labels: [batch, tokens], -100 where there is no loss.
    """
    asked = labels[:, 1:].flatten() != IGNORE
    found, teacher = (
        part[:, :-1].flatten(0, 1)[asked].float().log_softmax(-1) for part in (logits, wanted)
    )
    return F.kl_div(found, teacher, log_target=True, reduction="batchmean")


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return summed next-token cross-entropy and number of answer tokens, both [batch]."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(labels.shape).sum(1), (labels != IGNORE).sum(1)


def answer_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy over answer tokens.

    Args:
        logits: [batch, tokens, vocab]; position t predicts token t + 1.
        labels: [batch, tokens], -100 where there is no loss.
    """
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = labels != IGNORE
    return F.cross_entropy(logits[wanted].float(), labels[wanted])


def non_skip_penalty(rho: torch.Tensor) -> torch.Tensor:
    """Return sum_i rho_i, averaged over the batch; `rho` is [batch, layers]."""
    return rho.sum(1).mean()


def mean_loss(
    first: FirstModel,
    items: Sequence[Encoded],
    policy: Policy,
    batch_size: int,
    prefill: str = "skip",
) -> tuple[float, torch.Tensor]:
    """Return cross-entropy per answer token under hard skips, in nats, and keep [items, layers]."""
    sums, tokens, keep = item_losses(first, items, policy, batch_size, prefill)
    return float(sums.sum() / tokens.sum()), keep


@torch.no_grad()
def item_losses(
    first: FirstModel,
    items: Sequence[Encoded],
    policy: Policy,
    batch_size: int,
    prefill: str = "skip",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each item's summed loss under hard skips, in nats, its answer tokens, and keep.

    The first two are [items], keep is [items, layers], in the items' order; batches hold prompts of
    similar length.
    """
    first.eval()
    collate = Collator(first.pad_id, first.device)
    order = sorted(range(len(items)), key=lambda i: -len(items[i].prompt_ids))
    losses, counts, keep = [], [], []
    for start in range(0, len(items), batch_size):
        inputs = collate([items[i] for i in order[start : start + batch_size]])
        state = first.new_state(
            inputs["prompt_mask"], policy, prefill=prefill, input_ids=inputs["input_ids"]
        )
        sums, tokens = row_losses(*answer_logits(first, inputs, state))
        losses.append(sums.double().cpu())
        counts.append(tokens.cpu())
        keep.append(state.keep)
    back = torch.tensor(order).argsort()
    return torch.cat(losses)[back], torch.cat(counts)[back], torch.cat(keep)[back]
