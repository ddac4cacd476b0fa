# SPDX-License-Identifier: Apache-2.0
"""Where LoRA with skips starts from: what skipped layers leave missing, put back at once.

A layer that runs before others that are skipped shall leave the states that those would have left.
Its last linear map adds to the states, so the best change of that map is a linear regression, from
what enters it to what is missing, and LoRA of a rank gets the best change of that rank
(reduced-rank regression). ReplaceMe (arXiv 2505.02819) puts linear maps in the place of pruned
blocks alike; here masks differ by prompt and rate, and training goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from firstlm import processes
from firstlm.data import Collator, Encoded
from firstlm.errors import ConfigError
from firstlm.importance import Inputs, hooked, layer_states
from firstlm.losses import layers_pass
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, RunAll

ADAPTER = "default"
RIDGES = (0.01, 0.1, 1.0)  # of the inputs' mean square; held-out prompts choose
HELD_OUT = 5  # every fifth prompt
MISSING = 1e-4  # squared distance over squared length, below which nothing is missing
WORTH_IT = 0.98  # of what is missing; a layer that would leave more stays as it is
ADDS = 0.1  # median error of a sum, in units of what was added, that rounding can explain


@dataclass(frozen=True)
class _Map:
    """A linear map with LoRA, and the module after which its output is added to the states.

    That is the map itself, a dropout, or a norm as Gemma's, which divides each token by its length
    and weighs features.
    """

    part: Any
    end: Any


@torch.no_grad()
def heal(model: FirstModel, examples: Sequence[Encoded], keep: torch.Tensor) -> dict[int, float]:
    """Change LoRA such that masks leave the states that all layers leave, as nearly as it can.

    One pass over all prompts and masks goes from the first layer to the last, so that each makes up
    for what those before it left too. That all layers run is one of the masks.

    Args:
        model: a routed model with LoRA, unit "block".
        examples: what the regression sees; all are in memory at once.
        keep: [masks, examples, layers], True = the layer runs.

    Returns:
        For each layer that was changed the share of the squared distance that is left behind it,
        on prompts that were held out.

    Raises:
        ConfigError: no layer has LoRA on a linear map that adds to its states.
    """
    model.eval()
    inputs = Collator(model.pad_id, model.device)(examples)
    longest = inputs["attention_mask"].sum(1).argmax()
    maps = _adding_maps(model, {name: tensor[longest][None] for name, tensor in inputs.items()})
    if not maps:
        raise ConfigError(
            "heal needs layers whose last module with LoRA is a linear map that adds to their "
            "states, through a norm at most, and this model has none (mixtures of experts and "
            "layers that scale what they add are not supported, nor is DoRA). Leave heal at 0."
        )
    states = torch.stack(layer_states(model, inputs))
    masks = torch.cat([torch.ones_like(keep[:1]), keep])
    rows = torch.arange(len(examples)).repeat(len(masks))
    inputs = {name: tensor.repeat(len(masks), 1) for name, tensor in inputs.items()}
    masks = masks.flatten(0, 1)
    following = _next_kept(masks)
    passed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    left: dict[int, float] = {}

    def note(layer: int, _part: Any, args: tuple, output: torch.Tensor) -> None:
        passed[layer] = args[0], output

    @torch.autocast(model.device.type, enabled=False)  # a regression is no matter for bfloat16
    def leave(layer: int, _module: Any, _args: tuple, output: Any) -> Any:
        bar.update()
        kept = masks[:, layer].nonzero().flatten()
        (x, y), out = passed.pop(layer), output[0] if isinstance(output, tuple) else output
        goal = states[following[kept, layer], rows[kept]].float()
        real = inputs["attention_mask"][kept].bool()
        # A state counts by its distance over its length, as in `state_distance`.
        weight = 1 / goal[real].norm(dim=-1, keepdim=True).clamp_min(1e-6)
        missing = weight * (goal[real] - out[kept][real].float())
        held_out = (rows[kept] % HELD_OUT == HELD_OUT - 1).to(real.device)
        held_out = held_out.unsqueeze(1).expand_as(real)[real]
        found = _mend(maps[layer], x, y, weight, missing, real, held_out)
        if found is None:
            return None
        change, left[layer] = found
        out = out.index_add(0, kept.to(out.device), change.to(out.dtype))
        return (out, *output[1:]) if isinstance(output, tuple) else out

    bar = tqdm(
        total=len(maps), desc="healing", unit="layer", leave=False, disable=not processes.is_first()
    )
    with bar, ExitStack() as stack:
        for layer, found in maps.items():
            module = model.routing.stack.modules[layer]
            stack.callback(found.part.register_forward_hook(partial(note, layer)).remove)
            stack.callback(module.register_forward_hook(partial(leave, layer)).remove)
        layers_pass(model, inputs, model.new_state(inputs["prompt_mask"], FixedMask(masks)))
    return left


def _mend(
    place: _Map,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    missing: torch.Tensor,
    real: torch.Tensor,
    held_out: torch.Tensor,
) -> tuple[torch.Tensor, float] | None:
    """Let a map's LoRA add what is missing, if that is worth a change.

    Args:
        place: the map.
        x: what entered it [rows, tokens, in].
        y: what left it [rows, tokens, out].
        weight: of real tokens [real, 1].
        missing: what real tokens miss, weighed [real, hidden].
        real: [rows, tokens], False at padding.
        held_out: [real], tokens that are not fitted.

    Returns:
        What it adds to the states now and did not before [rows, tokens, hidden], and the share of
        what was missing that is left on held-out tokens.
    """
    part, end = place.part, place.end
    old = _lora_map(part)
    added, tokens, features = y, x.new_ones(()), x.new_ones(())
    if end is not part:
        added = end(y)
        tokens, features = _scales(y[real].float(), added[real].float())
    found = reduced_rank(
        weight * tokens * x[real].float(), missing, old * features, part.r[ADAPTER], held_out
    )
    if found is None:
        return None
    down, up = found
    up = up / features
    y = y + (x.float() @ (down @ up - old)).to(y.dtype)
    change = (y if end is part else end(y)) - added
    after = missing - weight * change[real].float()  # a norm takes back some of what it is told
    share = float(after[held_out].square().sum() / missing[held_out].square().sum())
    if not share < WORTH_IT:
        return None
    _set_lora(part, down, up)
    return change, share


def reduced_rank(
    x: torch.Tensor, missing: torch.Tensor, old: torch.Tensor, rank: int, held_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the map of a rank that, in the place of an old one, adds most of what is missing.

    Args:
        x: [rows, in], what enters the map.
        missing: [rows, out].
        old: [in, out], the map as it is; the new one is fitted to what it does and `missing`.
        rank: of the new map.
        held_out: [rows] bool, rows that are not fitted and choose the ridge.

    Returns:
        The new map's two factors, [in, rank] and [rank, out]; None where it is not worth a change.
    """
    if not missing.square().sum(-1).mean() > MISSING:
        return None
    test_x, test_missing = x[held_out], missing[held_out]
    total = test_missing.square().sum()
    x, missing = x[~held_out], missing[~held_out]
    gram, cross = (x.T @ x).double(), (x.T @ missing).double()

    def factors(ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        held = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        whole = torch.linalg.solve(held, cross) + old.double()
        up = torch.linalg.eigh(whole.T @ held @ whole).eigenvectors[:, -rank:]
        return (whole @ up).float(), up.T.float()

    def share_left(down: torch.Tensor, up: torch.Tensor) -> float:
        return float((test_missing - test_x @ (down @ up - old)).square().sum() / total)

    found = [factors(ridge) for ridge in RIDGES]
    shares = [share_left(*pair) for pair in found]
    best = min(shares)
    return found[shares.index(best)] if best < WORTH_IT else None


def _next_kept(masks: torch.Tensor) -> torch.Tensor:
    """Return for each layer [masks, layers] the next one that runs, or the number of layers."""
    found, after = torch.empty_like(masks, dtype=torch.long), masks.shape[1]
    following = torch.full((len(masks),), after)
    for layer in reversed(range(after)):
        found[:, layer] = following
        following = torch.where(masks[:, layer], layer, following)
    return found


def _adding_maps(model: FirstModel, inputs: Inputs) -> dict[int, _Map]:
    """Return each layer's last map with LoRA, where its output is added to the layer's.

    Whether it is, a pass says in which something is added to that output.
    """
    layers = model.routing.stack.modules
    parts: dict[int, Any] = {}
    ends: dict[int, Any] = {}
    outputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of parts, and of ends

    def follow(layer: int, module: Any, args: tuple, output: Any) -> None:
        if hasattr(module, "lora_A"):
            parts[layer], outputs[layer], ends[layer] = module, (output, output), module
        elif layer in parts and args and args[0] is outputs[layer][1] and output is not args[0]:
            outputs[layer], ends[layer] = (outputs[layer][0], output), module

    with ExitStack() as stack:
        for layer, module in enumerate(layers):
            for inner in module.modules():
                if inner is not module:
                    hook = inner.register_forward_hook(partial(follow, layer))
                    stack.callback(hook.remove)
        states = layer_states(model, inputs)
    random, added = torch.Generator().manual_seed(0), {}
    maps: dict[int, _Map] = {}

    def add(layer: int, _end: Any, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + added[layer]

    def compare(layer: int, _module: Any, _args: tuple, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        wrong = (out - states[layer + 1] - added[layer]).float().abs().median()
        if wrong < ADDS * added[layer].float().abs().median():
            maps[layer] = _Map(parts[layer], ends[layer])

    with ExitStack() as stack:
        for layer, (before, after) in outputs.items():
            if not (states[0].shape == before.shape == after.shape and _scaled(before, after)):
                continue  # experts see some tokens, for one
            if getattr(parts[layer], "use_dora", {}).get(ADAPTER):
                continue
            noise = torch.randn(before.shape, generator=random).to(states[layer + 1])
            added[layer] = noise * states[layer + 1].float().abs().median().to(noise.dtype)
            stack.callback(ends[layer].register_forward_hook(partial(add, layer)).remove)
            stack.callback(layers[layer].register_forward_hook(partial(compare, layer)).remove)
        stack.enter_context(hooked(model, {layer: lambda _, i=layer: states[i] for layer in added}))
        layers_pass(model, inputs, model.new_state(inputs["prompt_mask"], RunAll()))
    return maps


def _scales(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a norm multiplies tokens [tokens, 1] and features [features] by.

    Args:
        before: what enters it, [tokens, features].
        after: what leaves it.
    """
    ratio = after / torch.where(before == 0, 1.0, before)
    tokens = ratio.abs().median(dim=1, keepdim=True).values.clamp_min(1e-6)
    features = (ratio / tokens).median(dim=0).values
    smallest = 1e-3 * features.abs().median().clamp_min(1e-6)  # features are divided by them
    return tokens, torch.where(features.abs() < smallest, smallest, features)


def _scaled(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Tell whether tokens and features were multiplied, and nothing else was done to them."""
    before, after = before.flatten(0, -2).float(), after.flatten(0, -2).float()
    tokens, features = _scales(before, after)
    wrong = (after - before * tokens * features).abs().median()
    return bool(wrong <= ADDS * after.abs().median())


def _lora_map(part: Any) -> torch.Tensor:
    """Return what LoRA adds to a linear map, [in, out]."""
    down, up = part.lora_A[ADAPTER].weight, part.lora_B[ADAPTER].weight
    return part.scaling[ADAPTER] * (up.float() @ down.float()).T


def _set_lora(part: Any, down: torch.Tensor, up: torch.Tensor) -> None:
    """Let LoRA add a map of factors [in, rank] and [rank, out], both of its matrices alike long."""
    a, b = part.lora_A[ADAPTER].weight, part.lora_B[ADAPTER].weight
    balance = (down.norm() / part.scaling[ADAPTER] / up.norm().clamp_min(1e-12)).sqrt()
    b.zero_()
    a[: len(up)] = (down / part.scaling[ADAPTER] / balance.clamp_min(1e-12)).T
    b[:, : len(up)] = (up * balance).T
