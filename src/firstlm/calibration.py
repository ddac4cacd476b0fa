# SPDX-License-Identifier: Apache-2.0
"""Measure the thresholds with which one artifact meets many asked skip rates.

One logit offset is added to all routers. With prefill="skip" a router reads states that earlier
skips have shaped, so an offset's rate is measured by really skipping (closed loop), and offsets
are searched by bisection. With prefill="full" the logits do not depend on the offset: one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm

from firstlm import artifact, artifact_files, processes
from firstlm.command_config import CalibrateConfig
from firstlm.config import RATES
from firstlm.data import check_room, draw, encode_prompt, prompt_batches
from firstlm.errors import ConfigError, DataError
from firstlm.examples import load_examples
from firstlm.inputs import pad_left
from firstlm.model import FirstModel
from firstlm.policies import RouterPolicy
from firstlm.rows import check_sources
from firstlm.thresholds import Threshold

TOLERANCE = 0.004  # of the measured rate, where the search ends early
SEARCH_STEPS = 10


def calibrate(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    rates: Sequence[float] = RATES,
    prefill_modes: Sequence[str] = ("skip", "full"),
    batch_size: int = 16,
    progress: bool = True,
) -> None:
    """Measure `model.thresholds` on validation prompts (lists of token ids).

    Args:
        model: a model whose routers are trained.
        prompts: token ids of prompts as inference sees them, 100 or more for
            rates within some two points.
        rates: skip rates to serve; those in between are interpolated.
        prefill_modes: modes to serve.
        batch_size: prompts per forward pass.
        progress: show a progress bar.
    """
    model.need_routers()
    if not prompts:
        raise DataError("Calibration needs prompts, but there are none.")
    for mode in prefill_modes:
        model.thresholds.table[mode] = find_offsets(
            model, prompts, rates, mode, batch_size, progress
        )


@torch.no_grad()
def find_offsets(
    model: FirstModel,
    prompts: Sequence[Sequence[int]],
    rates: Sequence[float],
    prefill: str = "skip",
    batch_size: int = 16,
    progress: bool = True,
) -> list[Threshold]:
    """Return what meets each rate, in rising order."""
    known: dict[float, float] = {}
    skipped: dict[float, tuple[float, ...]] = {}
    was_training = model.training
    model.eval()
    hidden = not (progress and processes.is_first())
    with tqdm(disable=hidden, desc=f"calibrating {prefill}", unit="pass") as bar:
        skips = _full_skips if prefill == "full" else _closed_loop_skips
        measure = skips(model, prompts, batch_size, bar)

        def rate_at(offset: float) -> float:
            if offset not in known:
                skip = measure(offset)
                # What comes next depends on it, and processes must take the same passes.
                shares = processes.same(skip.mean(0).tolist())
                known[offset] = sum(shares) / len(shares)
                skipped[offset] = tuple(round(share, 4) for share in shares)
            return known[offset]

        rows = _table(rate_at, known, sorted(rates))
    model.train(was_training)
    return [Threshold(asked, offset, rate, skipped[offset]) for asked, offset, rate in rows]


def _table(
    rate_at: Callable[[float], float], known: dict[float, float], rates: Sequence[float]
) -> list[tuple[float, float, float]]:
    """Find the offset for every rate; one that cannot be told from the one before is left out."""
    rows: list[tuple[float, float, float]] = []
    for wanted in rates:
        offset, found = _search(rate_at, known, wanted)
        if not rows or (offset < rows[-1][1] and found > rows[-1][2]):
            rows.append((wanted, offset, found))
    # Rates may rise in steps of a whole layer: the lowest and the highest rate asked for shall lie
    # between measured ones too.
    below = [offset for offset in known if known[offset] < rates[0]]
    above = [offset for offset in known if known[offset] > rates[-1]]
    if below and rows[0][2] > rates[0]:
        rows.insert(0, (known[min(below)], min(below), known[min(below)]))
    if above and rows[-1][2] < rates[-1]:
        rows.append((known[max(above)], max(above), known[max(above)]))
    return rows


def _search(
    rate_at: Callable[[float], float], known: dict[float, float], wanted: float
) -> tuple[float, float]:
    """Return the (offset, rate) closest to the wanted rate; more is skipped as the offset falls.

    Starts from what earlier searches measured, and cuts the bracket where a straight line between
    its ends would meet the wanted rate.
    """
    rate_at(0.0)
    for _ in range(SEARCH_STEPS):
        best = min(known, key=lambda offset: abs(known[offset] - wanted))
        if abs(known[best] - wanted) <= TOLERANCE:
            break
        above = [o for o in known if known[o] > wanted]
        below = [o for o in known if known[o] <= wanted]
        if not above:
            rate_at(min(below) - max(1.0, abs(min(below))))
        elif not below:
            rate_at(max(above) + max(1.0, abs(max(above))))
        else:
            low, high = max(above), min(below)
            share = (known[low] - wanted) / (known[low] - known[high])
            # Rates rise in steps, so a line through the ends may not get off one; stay inside.
            rate_at(low + (high - low) * min(max(share, 0.1), 0.9))
    best = min(known, key=lambda offset: abs(known[offset] - wanted))
    return best, known[best]


def _closed_loop_skips(
    model: FirstModel, prompts: Sequence[Sequence[int]], batch_size: int, bar: tqdm
) -> Callable[[float], torch.Tensor]:
    """Return what each prompt skips [prompts, layers] float64 as a function of the offset.

    Layers read what skipped layers left, so prompts are run at the offset. But what a prompt skips
    stays as it is between the offsets at which one of its logits changes its sign, and there it is
    not run again.
    """
    rows = sorted(prompts, key=len)
    spans: list[list[tuple[float, float, torch.Tensor]]] = [[] for _ in rows]
    free = torch.ones(model.layer_count, dtype=torch.bool)
    free[sorted(model.routing.stack.locked)] = False

    def known(row: int, offset: float) -> torch.Tensor | None:
        return next((skip for low, high, skip in spans[row] if low <= offset < high), None)

    def run(picked: Sequence[int], offset: float) -> None:
        ids, mask = pad_left([rows[row] for row in picked], model.pad_id)
        state = model.decide(ids, mask, RouterPolicy(model.routers, offset))
        scores = torch.stack([s.double().cpu() for s in state.scores if s is not None], 1)
        turns = offset - scores  # at these offsets a layer's logit changes its sign
        low = turns.masked_fill(~(state.keep & free), -torch.inf).amax(1).clamp(max=offset)
        high = turns.masked_fill(state.keep, torch.inf).amin(1)
        high = high.clamp(min=math.nextafter(offset, math.inf))
        # What runs next depends on it, and processes must run the same.
        found = processes.same((low.tolist(), high.tolist(), (~state.keep).double()))
        for row, low, high, skip in zip(picked, *found, strict=True):
            spans[row].append((low, high, skip))

    def measure(offset: float) -> torch.Tensor:
        left = [row for row in range(len(rows)) if known(row, offset) is None]
        for start in range(0, len(left), batch_size):
            run(left[start : start + batch_size], offset)
            bar.update()
        found = (known(row, offset) for row in range(len(rows)))
        return torch.stack([skip for skip in found if skip is not None])

    return measure


def _full_skips(
    model: FirstModel, prompts: Sequence[Sequence[int]], batch_size: int, bar: tqdm
) -> Callable[[float], torch.Tensor]:
    """Score every prompt once with all layers running; return the skips as a function of offset."""
    scores = []
    for ids, mask in prompt_batches(prompts, batch_size, model.pad_id):
        state = model.decide(ids, mask, RouterPolicy(model.routers), prefill="full")
        scores.append(torch.stack([s.cpu() for s in state.scores if s is not None], 1))
        bar.update()
    logits = torch.cat(scores)
    logits[:, sorted(model.routing.stack.locked)] = torch.inf
    return lambda offset: (logits + offset < 0).double()


@torch.no_grad()
def serve_by_default(model: FirstModel, rate: float, prefill: str = "skip") -> None:
    """Shift all biases so that the plain threshold, rho = 0.5, serves a calibrated rate.

    Raises:
        ConfigError: the rate was not met in calibration.
    """
    shift = model.thresholds.offset(rate, prefill)
    for router in model.routers:
        processes.put(router.bias, processes.whole(router.bias) + shift)
    for mode, rows in model.thresholds.table.items():
        model.thresholds.table[mode] = [row._replace(offset=row.offset - shift) for row in rows]


def run(options: CalibrateConfig) -> int:
    """Calibrate an artifact on the user's prompts and save it (`firstlm calibrate`)."""
    target = options.output or options.artifact
    if options.output is None:
        artifact_files.local_folder(
            options.artifact,
            "it cannot be calibrated in place",
            "name a folder for the calibrated artifact with --output",
        )
    artifact_files.check_target(target)
    source = artifact_files.find(options.artifact)
    check_sources(options.data)
    model = FirstModel.from_pretrained(
        options.artifact, base=options.model, dtype=options.dtype, device=options.device
    )
    model.need_routers()
    if not model.has_routers:
        raise ConfigError(
            f"The routers of {options.artifact} were never trained, and decide the same for every "
            "prompt and layer; train them with `firstlm train --artifact`, which calibrates them."
        )
    tokenizer = model.need_tokenizer()
    examples = load_examples(options.data, template=options.template, tokenizer=tokenizer)
    examples = draw(examples, options.limit)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    for example, ids in zip(examples, prompts, strict=True):
        check_room(ids, 1, model.context_length, example.where)
    model.results = {}  # measured with other thresholds
    model.base_id = artifact_files.base_id(options.artifact)  # whatever copy of it is used here
    calibrate(model, prompts, options.rates, batch_size=options.batch_size)
    artifact.save(model, target, more_from=source)
    print(f"{'asked':>7} {'measured':>9} {'offset':>8}   prefill")
    for mode, rows in model.thresholds.table.items():
        for row in rows:
            print(f"{row.asked:7.2f} {row.rate:9.3f} {row.offset:8.3f}   {mode}")
    return 0
