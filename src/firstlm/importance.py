# SPDX-License-Identifier: Apache-2.0
"""A starting point for routers: which layers a task misses least, found by greedy removal.

Round by round, the layer goes whose removal (besides those already removed) leaves a few training
examples closest to what all layers compute. Cross-entropy would be a poor guide: it has a handful
of answer tokens to go by, and a model that does not know the task yet is wrong about them anyway.
The order sets the routers' biases, from where training makes them depend on the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from firstlm import processes
from firstlm.data import Collator, Encoded
from firstlm.losses import FullDepth, answer_pass, layers_pass
from firstlm.model import FirstModel
from firstlm.policies import FixedMask

SPACING = 0.25  # logit distance between layers that are next to each other in the order
CANDIDATES = 8  # layers measured per round after the first; 5 found a worse order (LOG)
FORWARD_ROWS = 8  # rows of a forward pass for each row of a training batch

Inputs = dict[str, torch.Tensor]


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
        examples: on which the distance to the full depth is measured.
        share: of all layers whose place is measured round by round; the others follow by what
            their removal cost when it was last measured.
        batch_size: examples that training runs at once; a pass here, which keeps nothing for a
            backward pass, runs up to `FORWARD_ROWS` times as many.
        prefill: "skip" or "full".
    """
    rows = sorted(examples, key=lambda e: len(e.prompt_ids) + len(e.answer_ids))
    collate = Collator(model.pad_id, model.device)
    batches = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    count = model.layer_count
    free = model.free_layers
    order: list[int] = []
    rounds = min(max(round(share * count), 1), len(free) - 1)
    # A layer that cost much in an earlier round is not measured again while others are cheaper.
    measured = [min(CANDIDATES, len(free) - i) if i else len(free) for i in range(rounds)]
    known = dict.fromkeys(free, 0.0)  # distance without the layer, as last measured
    full = [FullDepth.of(model, inputs) for inputs in batches]
    with tqdm(
        total=sum(measured) * len(batches),
        desc="finding layers that matter least",
        unit="pass",
        leave=False,
        disable=not processes.is_first(),
    ) as bar:
        for candidates in measured:
            cheapest = sorted(known, key=known.__getitem__)[:candidates]
            known.update(_distances(model, batches, full, order, sorted(cheapest), prefill, bar))
            order.append(min(cheapest, key=known.__getitem__))
            del known[order[-1]]
    return [*order, *sorted(known, key=known.__getitem__)]


def _distances(
    model: FirstModel,
    batches: Sequence[Inputs],
    full: Sequence[FullDepth],
    removed: Sequence[int],
    candidates: Sequence[int],
    prefill: str,
    bar: tqdm,
) -> dict[int, float]:
    """Return the distance to the full depth with each candidate removed besides `removed`."""
    total, rows = torch.zeros(len(candidates)), sum(len(b["input_ids"]) for b in batches)
    mask = torch.ones(model.layer_count, dtype=torch.bool)
    mask[list(removed)] = False
    for inputs, wanted in zip(batches, full, strict=True):
        entered = _entering_states(model, inputs, mask, candidates, prefill)
        share = len(inputs["input_ids"]) / rows
        for first in range(0, len(candidates), FORWARD_ROWS):
            part = candidates[first : first + FORWARD_ROWS]
            found = _pass_without(model, inputs, wanted, mask, part, entered, prefill)
            total[first : first + len(part)] += share * found
            bar.update(len(part))
    return dict(zip(candidates, total.tolist(), strict=True))


def _entering_states(
    model: FirstModel, inputs: Inputs, mask: torch.Tensor, layers: Sequence[int], prefill: str
) -> dict[int, torch.Tensor]:
    """Return the states [batch, tokens, hidden] that enter some layers under a mask [layers]."""
    found: dict[int, torch.Tensor] = {}
    hooks = {layer: partial(found.__setitem__, layer) for layer in layers}
    state = model.new_state(inputs["prompt_mask"], FixedMask(mask), prefill=prefill)
    with hooked(model, hooks):
        layers_pass(model, inputs, state)
    return found


def _pass_without(
    model: FirstModel,
    inputs: Inputs,
    full: FullDepth,
    mask: torch.Tensor,
    candidates: Sequence[int],
    entered: dict[int, torch.Tensor],
    prefill: str,
) -> torch.Tensor:
    """Return the distance to the full depth without each candidate [candidates].

    All candidates share a forward pass. What comes before a removed layer is the same with and
    without it: a candidate's rows skip all of that, and take up the states that enter the layer.
    """
    size, copies = len(inputs["input_ids"]), len(candidates)
    masks = mask.repeat(copies, 1)
    masks[torch.arange(copies), torch.tensor(candidates)] = False
    # Layers that lend keys and values to later ones must see real states: nothing is left out.
    resumed = {} if model.routing.stack.locked else {layer: i for i, layer in enumerate(candidates)}
    for layer, i in resumed.items():
        masks[i, :layer] = False

    def take_up(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        i, hidden = resumed[layer], hidden.clone()
        hidden[i * size : (i + 1) * size] = entered[layer]
        return hidden

    repeated = {name: tensor.repeat(copies, 1) for name, tensor in inputs.items()}
    policy = FixedMask(masks.repeat_interleave(size, dim=0))
    state = model.new_state(repeated["prompt_mask"], policy, prefill=prefill)
    with hooked(model, {layer: partial(take_up, layer) for layer in resumed}):
        output, _ = answer_pass(model, repeated, state, output_hidden_states=True)
    parts = zip(
        output.hidden_states[-1].split(size),
        output.logits.chunk(copies),
        repeated["attention_mask"].split(size),
        strict=True,
    )
    return torch.stack([full.distance(*part).cpu() for part in parts])


@contextmanager
def hooked(
    model: FirstModel, hooks: Mapping[int, Callable[[torch.Tensor], torch.Tensor | None]]
) -> Iterator[None]:
    """Call `hooks[i]` with the states that enter layer i; what it returns enters in their place."""

    def call(hook: Callable, _module: Any, args: tuple, kwargs: dict) -> tuple | None:
        new = hook(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    with ExitStack() as stack:
        for layer, hook in hooks.items():
            module = model.routing.stack.modules[layer]
            handle = module.register_forward_pre_hook(partial(call, hook), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def layer_states(model: FirstModel, inputs: Inputs) -> list[torch.Tensor]:
    """Return the states [batch, tokens, hidden] that enter each layer, and that leave the last.

    All layers run.
    """
    last: list[torch.Tensor] = []

    def leave(_module: Any, _args: tuple, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    layers = range(model.layer_count)
    handle = model.routing.stack.modules[-1].register_forward_hook(leave)
    try:
        mask = torch.ones(len(layers), dtype=torch.bool)
        entered = _entering_states(model, inputs, mask, layers, "skip")
    finally:
        handle.remove()
    return [*map(entered.__getitem__, layers), *last]


@torch.no_grad()
def influence_order(
    model: FirstModel, examples: Sequence[Encoded], batch_size: int = 16
) -> list[int]:
    """Return all layers by their block influence, the least influential first.

    Block influence (arXiv 2403.03853, equation 1) is 1 minus the cosine between the states that
    enter a layer and those that leave it, averaged over tokens, all layers running.
    """
    layers = range(model.layer_count)
    collate, alike, tokens = Collator(model.pad_id, model.device), torch.zeros(len(layers)), 0
    for start in range(0, len(examples), batch_size):
        inputs = collate(examples[start : start + batch_size])
        states, real = layer_states(model, inputs), inputs["attention_mask"].bool()
        tokens += int(real.sum())
        for layer in layers:
            before, after = (states[i][real].float() for i in (layer, layer + 1))
            alike[layer] += torch.cosine_similarity(before, after, -1).sum().cpu()
    influence = (1 - alike / tokens).tolist()
    return sorted(layers, key=influence.__getitem__)


@torch.no_grad()
def start_from_order(model: FirstModel, order: Sequence[int], skip_rate: float) -> None:
    """Set router biases so that the first layers of the order are skipped at `skip_rate`."""
    logits = order_logits(order, model.layer_count, skip_rate)
    for router, logit in zip(model.routers, logits.tolist(), strict=True):
        router.bias.fill_(logit)


def order_logits(order: Sequence[int], layers: int, skip_rate: float) -> torch.Tensor:
    """Return logits [layers] that rise with the place in an order, below 0 for what goes first."""
    place = {layer: i for i, layer in enumerate(order)}
    places = torch.tensor([float(place.get(i, len(order) + 2)) for i in range(layers)])
    return SPACING * (places + 0.5 - skip_rate * layers)
