# SPDX-License-Identifier: Apache-2.0
"""Losses of the paper (arXiv 2410.12513, section 3.2), distance to the full depth, forward pass."""

from __future__ import annotations

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
    """Run a batch and return its answer tokens' logits [answers, vocab] and labels [answers]."""
    output, labels = answer_pass(first, inputs, state)
    return output.logits, labels


def answer_pass(
    first: FirstModel,
    inputs: dict[str, torch.Tensor],
    state: RoutingState,
    call: nn.Module | None = None,
    **more: Any,
) -> tuple[Any, torch.Tensor]:
    """Run a batch; return the model's output, with logits of answer tokens alone, and those tokens.

    The vocabulary is most of a small model's work, and only answers need it: logits are [answers,
    vocab], row after row, each of the position before its token, and labels are [answers]. Whose
    they are, `answer_rows` says.

    Args:
        first: the model.
        inputs: what `Collator` makes.
        state: the decisions to take or obey.
        call: what to call in the model's place, where something wraps it (DDP).
        more: passed on to the model, such as `output_hidden_states`.
    """
    asked = _asked(inputs)
    output = _headed_pass(first, inputs, state, asked, call, **more)
    return output, inputs["labels"].roll(-1, dims=1)[asked]


def answer_rows(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the row [answers] that each of a batch's answer tokens is of."""
    return _asked(inputs).nonzero()[:, 0]


def _asked(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the positions [batch, tokens] that are followed by a token of an answer."""
    asked = inputs["labels"].roll(-1, dims=1) != IGNORE
    asked[:, -1] = False
    return asked


def layers_pass(first: FirstModel, inputs: dict[str, torch.Tensor], state: RoutingState) -> None:
    """Run a batch for what hooks see of its layers; no logits are computed."""
    nothing = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    _headed_pass(first, inputs, state, nothing)


def _headed_pass(
    first: FirstModel,
    inputs: dict[str, torch.Tensor],
    state: RoutingState,
    asked: torch.Tensor,
    call: nn.Module | None = None,
    **more: Any,
) -> Any:
    """Run a batch; the head sees but the positions asked for [batch, tokens], row after row."""

    def pick(_head: nn.Module, args: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        return args[0][asked] if args and args[0].shape[:2] == asked.shape else None

    head = first.plain_base.get_output_embeddings()
    hook = head.register_forward_pre_hook(pick) if head is not None else None
    try:
        output, _ = (call or first)(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            state=state,
            **more,
        )
    finally:
        if hook is not None:
            hook.remove()
    if output.logits.ndim == 3:  # a head that cannot be found computes them all
        output.logits = output.logits[asked]
    return output


@dataclass(frozen=True)
class FullDepth:
    """What a model computes with all its layers; what skipping shall stay close to.

    Attributes:
        states: the last hidden states [batch, tokens, hidden].
        logits: those of the answers' tokens [answers, vocab].
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
        mask: torch.Tensor,
        weights: tuple[torch.Tensor | float, torch.Tensor | float] = (1.0, 1.0),
    ) -> torch.Tensor:
        """Return how far a pass over the same batch is from this one: 0 where they are equal.

        Args:
            states: its last hidden states [batch, tokens, hidden].
            logits: those of its answers' tokens [answers, vocab].
            mask: [batch, tokens] of `states`; padding is left out.
            weights: of the part that states have, and of the part that answers have.
        """
        distance = weights[0] * state_distance(states, self.states, mask)
        divergence = answer_divergence(logits, self.logits)
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


def answer_divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the mean Kullback-Leibler divergence KL(wanted || logits) over answer tokens, in nats.

    Args:
        logits: [answers, vocab].
        wanted: [answers, vocab], of the full depth.
    """
    found, teacher = (part.float().log_softmax(-1) for part in (logits, wanted))
    return F.kl_div(found, teacher, log_target=True, reduction="batchmean")


def row_losses(
    logits: torch.Tensor, labels: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return summed cross-entropy and number of answer tokens, both [batch].

    Args:
        logits: [answers, vocab], of `answer_pass`.
        labels: [answers].
        inputs: the batch that they are of.
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    tokens = _asked(inputs).sum(1)
    return losses.new_zeros(len(tokens)).index_add(0, answer_rows(inputs), losses), tokens


def answer_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of answer tokens.

    Args:
        logits: [answers, vocab].
        labels: [answers].
    """
    return F.cross_entropy(logits.float(), labels)


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
        sums, tokens = row_losses(*answer_logits(first, inputs, state), inputs)
        losses.append(sums.double().cpu())
        counts.append(tokens.cpu())
        keep.append(state.keep)
    back = torch.tensor(order).argsort()
    return torch.cat(losses)[back], torch.cat(counts)[back], torch.cat(keep)[back]
