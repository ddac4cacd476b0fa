# SPDX-License-Identifier: Apache-2.0
"""Measurements on a routed model, each against something computed another way.

Numbers only; what they mean is said in `verdicts.py`. The cache has its own file, `kv_probe.py`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from firstlm.data import prompt_batches
from firstlm.generate import decode_step, prefill
from firstlm.inputs import position_ids
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Policy, RouterPolicy, RunAll

KEEP_ALL = 1e9  # an offset above any logit: routers are asked, and every layer is kept
TIMED_STEPS, WARMUP_STEPS = 32, 4
LOGITS_AT_ONCE = 2**27  # numbers; the logits of all positions of a batch need memory

Batch = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def detached(model: FirstModel) -> Iterator[Any]:
    """Within this scope the base model has its own forwards back; yields it."""
    model.routing.detach()
    try:
        yield model.base
    finally:
        model.routing.attach()


def decide_all(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    prefill: str = "skip",
    batch_size: int = 16,
) -> torch.Tensor:
    """Return what a policy decides about prompts, keep [prompts, layers] in their order."""
    batches = prompt_batches(prompts, batch_size, model.pad_id)
    states = [model.decide(*batch, policy, prefill=prefill) for batch in batches]
    places = torch.tensor(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    return torch.cat([state.keep.cpu() for state in states])[places.argsort()]


@torch.no_grad()
def identity(model: FirstModel, prompts: Sequence[Batch], steps: int = 3) -> dict[str, Any]:
    """Compare logits with routers on and all layers kept to those of the untouched base model.

    Returns:
        Largest absolute difference of whole forward passes and of cached decoding (first batch),
        and whether the routers were really asked and kept every layer.
    """
    policy = RouterPolicy(model.routers, KEEP_ALL)
    worst, asked, kept, count = 0.0, True, True, 0
    with model.disable_adapter():
        for whole_ids, whole_mask in prompts:
            rows = max(1, LOGITS_AT_ONCE // (whole_ids.shape[1] * model.config.vocab_size))
            for first in range(0, len(whole_ids), rows):
                ids = whole_ids[first : first + rows].to(model.device)
                mask = whole_mask[first : first + rows].to(model.device)
                output, state = model.forward(ids, mask, policy)
                with detached(model) as base:
                    wanted = base(
                        input_ids=ids,
                        attention_mask=mask,
                        use_cache=False,
                        **model._positions(mask),
                    )
                real = mask.bool()
                worst = max(worst, difference(output.logits[real], wanted.logits[real]))
                asked = asked and state.rho is not None
                kept = kept and bool(state.keep.all())
                count += len(ids)
        cached = _cached_difference(model, prompts[0], policy, steps)
    return {
        "prompts": count,
        "max_abs_difference": worst,
        "max_abs_difference_cached": cached,
        "routers_asked": asked,
        "all_kept": kept,
    }


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest absolute difference; nan counts as infinite."""
    gap = (ours.float() - theirs.float()).abs()
    return float(gap.nan_to_num(nan=float("inf")).max())


def _cached_difference(model: FirstModel, batch: Batch, policy: Policy, steps: int) -> float:
    """Decode some steps with the routed model and with the untouched one and its stock cache."""
    ids, mask = (tensor.to(model.device) for tensor in batch)
    decoding = prefill(model, ids, mask, policy)
    ours, tokens = [decoding.logits], []
    for _ in range(steps):
        tokens.append(ours[-1].argmax(-1))
        ours.append(decode_step(model, decoding, tokens[-1]))
    with detached(model) as base:
        takes = inspect.signature(model.plain_base.forward).parameters
        more: dict[str, Any] = {}
        if "logits_to_keep" in takes:  # the same matmul, so that equal means equal bits
            more["logits_to_keep"] = torch.tensor([-1], device=model.device)
        positions = position_ids(mask)
        worst = 0.0
        more[model.routing.stack.cache_argument] = DynamicCache(config=model.config)
        for step, found in enumerate(ours):
            if "position_ids" in takes:
                more["position_ids"] = positions
            output = base(input_ids=ids, attention_mask=mask, use_cache=True, **more)
            worst = max(worst, difference(found, output.logits[:, -1]))
            if step < steps:
                ids = tokens[step].unsqueeze(1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                positions = positions[:, -1:] + 1
    return worst


@torch.no_grad()
def router_outputs(
    model: FirstModel, prompts: Sequence[Batch], policy: Policy, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (offset included) and keep, both [prompts, layers]."""
    logits, keep = [], []
    for ids, mask in prompts:
        state = model.decide(ids, mask, policy, prefill=mode)
        logits.append(torch.stack([s.float().cpu() for s in state.scores if s is not None], 1))
        keep.append(state.keep)
    return torch.cat(logits), torch.cat(keep)


@torch.no_grad()
def mask_flips(
    model: FirstModel, batch: Batch, policy: Policy, mode: str
) -> list[tuple[int, int, float]]:
    """Decide each prompt of a batch alone, too, and return where the answers first part.

    Returns:
        (row, layer, distance of the logit from the threshold in the batch) per row that differs.
    """
    ids, mask = batch
    together = model.decide(ids, mask, policy, prefill=mode)
    flips = []
    for row in range(len(ids)):
        length = int(mask[row].sum())
        alone_ids = ids[row : row + 1, -length:]
        alone = model.decide(alone_ids, torch.ones_like(alone_ids), policy, prefill=mode)
        other = (alone.keep[0] != together.keep[row]).nonzero().flatten()
        if len(other):
            layer = int(other[0])
            score = together.scores[layer]
            flips.append((row, layer, 0.0 if score is None else abs(float(score[row]))))
    return flips


@torch.no_grad()
def decode_times(model: FirstModel, batch: Batch, policy: Policy, mode: str) -> dict[str, Any]:
    """Time decode steps routed, with all layers and with none, one after the other in turn.

    Returns:
        Seconds per step of each, the steps in the same order.
    """
    ids, mask = (tensor.to(model.device) for tensor in batch)
    locked = model.routing.stack.locked
    nothing = FixedMask([layer in locked for layer in range(model.layer_count)])
    policies = {"run_all": RunAll(), "routed": policy, "none": nothing}
    runs = {
        name: prefill(model, ids, mask, chosen, prefill=mode) for name, chosen in policies.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        names = names[1:] + names[:1]
        for name in names:
            token = runs[name].logits.argmax(-1)
            synchronize(model.device)
            start = time.perf_counter()
            decode_step(model, runs[name], token)
            synchronize(model.device)
            if step >= WARMUP_STEPS:
                seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "skip_rate": 1 - float(runs["routed"].state.keep.float().mean())}


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int | None:
    """Return the most memory that is taken while something is called; None where nobody tells.

    On a GPU by tensors, elsewhere by all of this process (Linux): weights that others use, too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        return None
    call()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
