# SPDX-License-Identifier: Apache-2.0
"""Try the KV cache: decode with it, compute the same again whole, and count what really ran.

Trusts neither the model's own counters nor its cache: calls are counted by hooks inside the layers,
and every step's logits are compared with a pass that has no cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from firstlm.generate import Decoding, decode_step, prefill
from firstlm.model import FirstModel
from firstlm.policies import FixedMask, Policy
from firstlm.probes import Batch, difference

LOW_PRECISION = (torch.bfloat16, torch.float16)


def weights_dtype(model: FirstModel) -> torch.dtype:
    """Return the number format of the base model's weights."""
    return next(model.base.parameters()).dtype


@contextmanager
def in_float32(model: FirstModel) -> Iterator[None]:
    """Within this scope 16-bit weights are float32, where rounding can't hide or feign an error."""
    weights = [(p, p.data) for p in model.base.parameters() if p.dtype in LOW_PRECISION]
    buffers = [(b, b.data) for b in model.base.buffers() if b.dtype in LOW_PRECISION]
    try:
        for tensor, data in (*weights, *buffers):
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in (*weights, *buffers):
            tensor.data = data


class CallCounter:
    """Counts what runs inside each unit, by a hook on one inner module of each.

    `take()` returns, per layer, the (rows, tokens) of each call since it was last asked.
    """

    def __init__(self, model: FirstModel) -> None:
        self.calls: list[list[tuple[int, int]]] = [[] for _ in range(model.layer_count)]
        self.modules = self._inner_modules(model)
        self._hooks: list[Any] = []

    def __enter__(self) -> CallCounter:
        for layer, module in self.modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._note(self.calls[layer])))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self) -> list[list[tuple[int, int]]]:
        """Return the calls per layer since the last time, and start again."""
        taken = [list(calls) for calls in self.calls]
        for calls in self.calls:
            calls.clear()
        return taken

    @staticmethod
    def _note(calls: list[tuple[int, int]]) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 3:
                calls.append((args[0].shape[0], args[0].shape[1]))

        return hook

    @torch.no_grad()
    def _inner_modules(self, model: FirstModel) -> dict[int, nn.Module]:
        """Find in each unit a leaf that one forward pass calls once, on [rows, tokens, ...]."""
        seen: dict[int, list[tuple[nn.Module, list[tuple[int, int]]]]] = {}
        hooks = []
        for layer, unit in enumerate(model.routing.stack.units):
            leaves = [m for m in unit.modules() if not list(m.children()) and m is not unit]
            seen[layer] = [(leaf, []) for leaf in leaves if list(leaf.parameters(recurse=False))]
            hooks += [m.register_forward_pre_hook(self._note(calls)) for m, calls in seen[layer]]
        try:
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            model.base(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        found = {
            layer: next((module for module, calls in leaves if calls == [(1, 2)]), None)
            for layer, leaves in seen.items()
        }
        return {layer: module for layer, module in found.items() if module is not None}


@torch.no_grad()
def cached_against_whole(
    model: FirstModel, batch: Batch, policy: Policy, mode: str, steps: int
) -> dict[str, Any]:
    """Decode a batch greedily with the cache; compare with one whole pass under the same masks.

    Returns:
        Per-step differences of the logits (largest absolute one, and the norm relative to that of
        the centred logits, worst row), masks, counted layer calls, and `problems` in words.
    """
    ids, mask = (tensor.to(model.device) for tensor in batch)
    with CallCounter(model) as counter:
        decoding = prefill(model, ids, mask, policy, prefill=mode, max_new_tokens=steps)
        calls, logits, tokens = [counter.take()], [decoding.logits.float()], []
        for _ in range(steps):
            tokens.append(decoding.logits.argmax(-1))
            logits.append(decode_step(model, decoding, tokens[-1]).float())
            calls.append(counter.take())
    keep = decoding.state.keep
    new = torch.stack(tokens, 1)
    prompt_mask = torch.cat([mask, torch.zeros_like(new)], 1)
    state = model.new_state(prompt_mask, FixedMask(keep), prefill=mode)
    output, _ = model.forward(
        torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1), state=state
    )
    wanted = output.logits[:, ids.shape[1] - 1 :].float()
    found = torch.stack(logits, 1)
    size = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    relative = ((found - wanted).norm(dim=-1) / size).nan_to_num(nan=float("inf"))
    problems = [
        *_call_problems(calls, keep, mode, ids.shape[1], counter.modules.keys()),
        *_total_problems(calls, decoding, len(counter.modules) == model.layer_count),
        *(_kv_problems(decoding, keep) if model.router_config.unit != "mlp" else ()),
    ]
    return {
        "dtype": str(weights_dtype(model)),
        "rows": len(ids),
        "padded": not bool(mask.all()),
        "steps": steps,
        "max_abs_difference": difference(found, wanted),
        "relative_difference": float(relative.max()),
        "relative_by_step": [float(x) for x in relative.amax(0)],
        "skip_rate": 1 - float(keep.float().mean()),
        "layer_calls": decoding.state.layer_calls,
        "layers_counted": len(counter.modules),
        "problems": problems,
    }


def _call_problems(
    steps: list[list[list[tuple[int, int]]]],
    keep: torch.Tensor,
    mode: str,
    prompt_length: int,
    counted: Any,
) -> Iterator[str]:
    """Say where a layer ran that is skipped, not once, on other rows, or on tokens of the past."""
    for step, layers in enumerate(steps):
        where = f"decode step {step}" if step else "prefill"
        for layer in counted:
            calls = layers[layer]
            rows = len(keep) if not step and mode == "full" else int(keep[:, layer].sum())
            tokens = 1 if step else prompt_length
            if not rows and calls:
                yield f"layer {layer} ran in {where}, though every prompt skips it"
            elif rows and len(calls) != 1:
                yield f"layer {layer} was called {len(calls)} times in {where}, expected once"
            elif rows and calls[0][0] != rows:
                yield f"layer {layer} ran {calls[0][0]} rows in {where}, expected {rows}"
            elif rows and calls[0][1] != tokens:
                yield f"layer {layer} was fed {calls[0][1]} tokens in {where}, expected {tokens}"


def _total_problems(
    steps: list[list[list[tuple[int, int]]]], decoding: Decoding, all_counted: bool
) -> Iterator[str]:
    """Say where the state's own count of layer calls is not what the hooks counted."""
    if not all_counted:
        return
    totals = [sum(map(len, layers)) for layers in steps]
    for phase, counted in (("prefill", totals[0]), ("decode", sum(totals[1:]))):
        said = decoding.state.layer_calls[phase]
        if said != counted:
            yield f"layer_calls says {said} in {phase}, but {counted} were counted"


def _kv_problems(decoding: Decoding, keep: torch.Tensor) -> Iterator[str]:
    """Say which layers hold keys and values of prompts that skip them."""
    for layer in range(min(keep.shape[1], len(decoding.cache.layers))):
        keys = getattr(decoding.cache.layers[layer], "keys", None)
        held = len(keys) if isinstance(keys, torch.Tensor) and keys.numel() else 0
        kept = int(keep[:, layer].sum())
        if held > kept:
            yield f"layer {layer} holds keys and values of {held} prompts, but {kept} run it"
