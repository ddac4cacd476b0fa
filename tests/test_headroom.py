# SPDX-License-Identifier: Apache-2.0
"""What choosing layers by prompt could gain is found where it is there, and not where it is not."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = runpy.run_path(
    str(Path(__file__).resolve().parent.parent / "experiments" / "headroom.py"), run_name="headroom"
)


def test_masks_differ_from_the_first_in_one_layer_and_skip_as_many():
    order = [7, 3, 5, 2, 9, 8, 0, 1, 4, 6, 10, 11]
    keep = SCRIPT["masks_near"](order, 12, 0.5)
    assert (~keep[0]).nonzero().flatten().tolist() == sorted(order[:6])
    assert (~keep).sum(1).tolist() == [6] * 21
    assert set((keep[1:] != keep[0]).sum(1).tolist()) == {2}
    assert len(torch.unique(keep, dim=0)) == 21
    assert not keep[:, [7, 3]].any()  # what goes first is in no exchange
    assert len(SCRIPT["masks_near"](order, 12, 0.25)) == 16  # three layers, each for one of five


@pytest.mark.parametrize("told", [True, False])
def test_a_choice_gains_where_what_it_knows_tells_the_better_mask(told):
    """Half the prompts lose less under one mask, half under the other; a feature says which."""
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 2, 400)
    losses = rng.normal(1.0, 0.1, (400, 3))
    losses[np.arange(400), kinds] -= 0.5
    sets = np.sort(rng.integers(0, 2, 400))
    known = rng.normal(size=(400, 20))
    if told:
        known[:, 3] += 4 * kinds
    found = SCRIPT["compare"](losses, {"mean": known}, sets, np.arange(400))
    assert found["one_mask"]["gain"] == 0
    assert found["hindsight"]["gain"] > 0.2
    low, high = found["mean"]["gain_ci95"]
    assert low <= found["mean"]["gain"] <= high
    assert (low > 0.15) == told
    assert abs(found["by_set"]["gain"]) < 0.1  # kinds are not what parts the sets
    order = np.argsort(kinds)
    by_kind = SCRIPT["compare"](losses[order], {"mean": known}, kinds[order], np.arange(400))
    assert by_kind["by_set"]["gain_ci95"][0] > 0.15
    assert by_kind["by_set"]["masks_used"] == 2


def test_texts_are_not_learnt_by_heart():
    """Where a feature says which text a prompt is about, and texts alone tell masks apart."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 20)
    better = rng.integers(0, 2, 20)[groups]
    losses = rng.normal(1.0, 0.1, (400, 2))
    losses[np.arange(400), better] -= 0.5
    known = np.eye(20)[groups]
    sets = np.zeros(400, int)
    honest = SCRIPT["compare"](losses, {"mean": known}, sets, groups)["mean"]
    leaked = SCRIPT["compare"](losses, {"mean": known}, sets, np.arange(400))["mean"]
    assert leaked["gain"] > 0.15
    assert honest["gain"] < 0.05
