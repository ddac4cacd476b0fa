# SPDX-License-Identifier: Apache-2.0
"""Tell whether a routed model computes what it should, and whether its routers decide something.

Brings measurements (`probes.py`, `kv_probe.py`) and what they mean (`verdicts.py`) together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from firstlm import kv_probe, probes, verdicts
from firstlm.command_config import DiagnoseConfig
from firstlm.data import Encoded, check_room, encode_all, encode_prompt, prompt_batches
from firstlm.errors import ConfigError, DataError
from firstlm.examples import load_examples
from firstlm.inputs import pad_left
from firstlm.losses import mean_loss
from firstlm.masks import describe_masks, describe_rates, length_correlation
from firstlm.model import FirstModel
from firstlm.options import to_dict
from firstlm.policies import FixedMask, Policy, RouterPolicy, RunAll
from firstlm.results import check_file, provenance, sha256_of, write_json
from firstlm.rows import check_sources

BINS = 10
PROMPTS = (
    "Hello",
    "Name three colours.",
    "Question: how many legs has a spider?\nAnswer:",
    "Write one sentence about a lighthouse at night.",
    "The recipe asks for flour, two eggs and a pinch of salt. First, one should",
    "English: Where is the nearest bakery?\nFrench:",
    "def median(values):\n    ordered = sorted(values)\n",
    "The meeting was moved from Monday to Thursday because the hall is being painted. Ann, who "
    "booked the train for Monday, asks whether someone can take her place.\nSummary:",
)


def diagnose(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    encoded: Sequence[Encoded] = (),
    *,
    skip_rate: float | None = None,
    prefill: str = "skip",
    batch_size: int = 8,
    steps: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model on prompts and judge what was found.

    Args:
        model: a routed model with its tokenizer.
        prompts: token ids of prompts as inference sees them, two or more.
        encoded: prompts with answers, for the quality check.
        skip_rate: share of layers to skip; None is the trained threshold.
        prefill: "skip" or "full".
        batch_size: prompts per forward pass.
        steps: decode steps to compare with full recomputation.
        progress: show a progress bar.

    Returns:
        A JSON object: `sound`, the `checks`, and the numbers behind them.
    """
    model.need_routers()
    policy = model.policy_for(skip_rate, prefill)
    if not isinstance(policy, RouterPolicy):
        raise ConfigError("skip_rate=0 runs all layers, so there are no routers to diagnose.")
    if len(prompts) < 2 or min(map(len, prompts)) < 1:
        raise DataError("Diagnosing takes two prompts or more, each with a token or more.")
    longest = max(prompts, key=len)
    new_tokens = max(steps, probes.TIMED_STEPS + probes.WARMUP_STEPS)
    check_room(longest, new_tokens, model.context_length, "The longest prompt")
    model.eval()
    pad = model.pad_id
    everything = prompt_batches(prompts, batch_size, pad, by_length=False)
    mixed = prompt_batches(_spread(prompts, batch_size), batch_size, pad)[0]
    numbers: dict[str, Any] = {}
    with tqdm(total=6, desc="diagnosing", unit="check", disable=not progress) as bar:
        numbers["identity"] = probes.identity(model, everything)
        bar.update()
        with kv_probe.in_float32(model):
            numbers["kv"] = {
                name: kv_probe.cached_against_whole(model, mixed, chosen, prefill, steps)
                for name, chosen in _mask_sets(model, policy, len(mixed[0])).items()
            }
            bar.update()
            numbers["mask_flips"] = probes.mask_flips(model, mixed, policy, prefill)
        numbers["mask_flips_as_loaded"] = None
        if kv_probe.weights_dtype(model) in kv_probe.LOW_PRECISION:
            numbers["mask_flips_as_loaded"] = probes.mask_flips(model, mixed, policy, prefill)
            numbers["kv"]["routers, as loaded"] = kv_probe.cached_against_whole(
                model, mixed, policy, prefill, steps
            )
        bar.update()
        logits, keep = probes.router_outputs(model, everything, policy, prefill)
        numbers["routers"] = describe_routers(
            logits, keep, float(policy.offset), list(map(len, prompts))
        )
        bar.update()
        numbers["quality"] = _quality(model, encoded, policy, prefill, batch_size)
        bar.update()
        numbers["time"] = _time(model, prompts, keep, policy, prefill, pad)
        bar.update()
    checks = verdicts.judge(numbers, skip_rate)
    return {
        "sound": all(check.level != "FAIL" for check in checks),
        "checks": [asdict(check) for check in checks],
        **numbers,
    }


def describe_routers(
    logits: torch.Tensor, keep: torch.Tensor, offset: float, lengths: Sequence[int]
) -> dict[str, Any]:
    """Describe what routers gave and decided, both [prompts, layers].

    `logits` include the offset; rho is described as trained, without it, and a layer is kept where
    rho >= threshold.
    """
    rho = torch.sigmoid(logits.double() - offset)
    rates = 1 - keep.double().mean(1).numpy()
    return {
        "prompts": len(keep),
        "threshold": float(torch.sigmoid(torch.tensor(-offset, dtype=torch.float64))),
        "rho_mean": rho.mean(0).tolist(),
        "rho_std": rho.std(0, correction=0).tolist(),
        "rho_histogram": [torch.histc(r, BINS, 0, 1).int().tolist() for r in rho.T.contiguous()],
        "near_half": float(((rho - 0.5).abs() <= verdicts.STUCK_WIDTH).double().mean()),
        "skip_rate": describe_rates(rates),
        **describe_masks(keep.numpy()),
        "length_correlation": length_correlation(rates.tolist(), lengths),
    }


def _spread(prompts: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Pick prompts of all lengths, the shortest and the longest among them."""
    ordered = sorted(prompts, key=len)
    places = np.linspace(0, len(ordered) - 1, min(max(count, 2), len(ordered))).round().astype(int)
    return [ordered[i] for i in places]


def _mask_sets(model: FirstModel, policy: Policy, rows: int) -> dict[str, Policy]:
    """Return masks to try the cache with: the routers' own, and holes that break stock caches."""
    layers = model.layer_count
    last, middle = layers - 1, layers // 2
    ends = [i in (0, last) for i in range(layers)]
    holes = [
        [i != 0 for i in range(layers)],
        [not end for end in ends],
        [i == middle for i in range(layers)],
        [False] * layers,
        [i % 2 == 1 for i in range(layers)],
    ]
    mixed = torch.tensor([holes[row % len(holes)] for row in range(rows)])
    without_ends = ~torch.tensor(ends)
    for keep in (mixed, without_ends):
        keep[..., sorted(model.routing.stack.locked)] = True
    return {
        "routers": policy,
        "a different mask per row": FixedMask(mixed),
        "first and last layer skipped": FixedMask(without_ends),
    }


def _quality(
    model: FirstModel, encoded: Sequence[Encoded], policy: Policy, mode: str, batch_size: int
) -> dict[str, Any] | None:
    if not encoded:
        return None
    full = mean_loss(model, encoded, RunAll(), batch_size, mode)[0]
    routed = mean_loss(model, encoded, policy, batch_size, mode)[0]
    return {
        "answers": len(encoded),
        "ce_run_all": full,
        "ce_routed": routed,
        "increase": routed / full - 1,
    }


def _time(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    keep: torch.Tensor,
    policy: Policy,
    mode: str,
    pad: int,
) -> dict[str, Any] | None:
    """Time the prompt whose skip rate is nearest to the mean; None if nothing is skipped."""
    rates = 1 - keep.float().mean(1)
    row = int((rates - rates.mean()).abs().argmin())
    batch = pad_left([prompts[row]], pad)
    found = probes.decode_times(model, batch, policy, mode)
    if not found["skip_rate"]:
        return None
    seconds = {name: np.array(values) for name, values in found["seconds"].items()}
    layers = float(np.median(seconds["run_all"] - seconds["none"]))
    gaps = seconds["run_all"] - seconds["routed"]
    low, high = np.percentile(gaps, [25, 75])
    ideal = found["skip_rate"] * layers
    return {
        "steps": len(gaps),
        "skip_rate": found["skip_rate"],
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ideal_saved_ms": 1e3 * ideal,
        "saved_ms": 1e3 * float(np.median(gaps)),
        "error_ms": 1e3 * float(high - low) / math.sqrt(len(gaps)),
        "saved_of_ideal": float(np.median(gaps)) / ideal if ideal > 0 else math.nan,
    }


def run(options: DiagnoseConfig) -> int:
    """Diagnose an artifact (`firstlm diagnose`); 1 if a check failed."""
    check_file(options.output)
    if options.data is not None:
        check_sources(options.data)
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    tokenizer = model.need_tokenizer()
    encoded: list[Encoded] = []
    if options.data is None:
        prompts = [encode_prompt(text, tokenizer) for text in PROMPTS]
    else:
        examples = load_examples(
            options.data,
            template=options.template,
            tokenizer=tokenizer,
            limit=options.limit,
        )
        encoded = encode_all(examples, tokenizer, options.max_length)[1]
        prompts = [item.prompt_ids for item in encoded]
    report = diagnose(
        model,
        prompts,
        encoded,
        skip_rate=options.skip_rate,
        prefill=options.prefill,
        batch_size=options.batch_size,
        steps=options.max_new_tokens,
    )
    print(verdicts.table(report))
    if options.output is not None:
        file = options.data is not None and Path(options.data).is_file()
        data_hash = sha256_of(options.data) if file and options.data else None
        report["options"] = to_dict(options)
        report["provenance"] = provenance(data_sha256=data_hash)
        write_json(options.output, report)
    return 0 if report["sound"] else 1
