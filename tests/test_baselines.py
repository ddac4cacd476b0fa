# SPDX-License-Identifier: Apache-2.0
"""Policies to compare with: exact rates, the same mask for the same prompt, layers as promised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training import config, make_examples, make_model, write_run

from firstlm import FirstModel, cli
from firstlm.baselines import (
    KEPT,
    Baseline,
    OrderedSkip,
    RandomSkip,
    UnifiedSkip,
    random_order,
    truncation,
)
from firstlm.calibration import calibrate
from firstlm.config import BASELINES
from firstlm.diagnose import diagnose
from firstlm.errors import ArtifactError, ConfigError
from firstlm.importance import influence_order
from firstlm.inputs import pad_left
from firstlm.losses import mean_loss
from firstlm.train import run

LAYERS = 8


def policies(rate: float) -> dict:
    return {
        "ordered": OrderedSkip([3, 1, 4, 0, 5], LAYERS, rate),
        "random": RandomSkip(LAYERS, rate),
        "interior": RandomSkip(LAYERS, rate, free=range(1, LAYERS - 1)),
        "unified": UnifiedSkip(LAYERS, rate),
        "truncation": OrderedSkip(truncation(LAYERS), LAYERS, rate),
        "one draw": OrderedSkip(random_order(LAYERS), LAYERS, rate),
    }


@pytest.mark.parametrize("name", list(policies(0.25)))
@pytest.mark.parametrize("rate", [0.0, 0.25, 0.3, 0.5])
def test_rates_are_met_with_two_numbers_of_layers_at_most(name: str, rate: float) -> None:
    policy = policies(rate)[name]
    counts = [policy.mask(key).count(False) for key in range(4000)]
    assert sum(counts) / len(counts) / LAYERS == pytest.approx(rate, abs=0.005)
    assert set(counts) <= {int(rate * LAYERS), -int(-rate * LAYERS // 1)}


@pytest.mark.parametrize("name", list(policies(0.25)))
@pytest.mark.parametrize("rate", [0.0, 0.25, 0.3, 0.3124])
def test_known_prompts_meet_the_rate_exactly(name: str, rate: float) -> None:
    policy = policies(rate)[name]
    before = [policy.mask(key) for key in range(50)]
    found = policy.meeting(range(50))
    gone = sum(found.mask(key).count(False) for key in range(50))
    assert gone == round(rate * LAYERS * 50)
    assert [policy.mask(key) for key in range(50)] == before
    repeated = policy.meeting([1] * 20 + [2] * 20 + [3] * 10)
    more = [repeated.mask(key).count(False) - int(rate * LAYERS) for key in (1, 2, 3)]
    reached = more[0] * 20 + more[1] * 20 + more[2] * 10
    assert abs(reached - (rate * LAYERS % 1) * 50) <= 10
    assert not policy.meeting([]).mask(0).count(False) > rate * LAYERS + 1


@pytest.mark.parametrize("name", list(policies(0.25)))
def test_a_prompt_has_one_mask_alone_batched_and_padded(name: str) -> None:
    model, policy = make_model(), policies(0.3)[name]
    prompts = [row.prompt_ids for row in make_examples(12, 0)]
    ids, mask = pad_left(prompts, 0)
    batched = model.decide(ids, mask, policy).keep
    right = torch.zeros_like(ids)
    for i, row in enumerate(prompts):
        right[i, : len(row)] = torch.tensor(row)
        alone = torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)
        assert torch.equal(model.decide(*alone, policies(0.3)[name]).keep[0], batched[i])
        made = model.generate(alone[0], policy=policy, max_new_tokens=2, do_sample=False)
        assert torch.equal(made.keep[0], batched[i])
    sides = model.decide(right, mask.flip(1).sort(1, descending=True).values, policy).keep
    assert torch.equal(sides, batched)


def test_masks_of_all_prompts_that_ever_came_are_not_kept() -> None:
    policy = RandomSkip(8, 0.3)
    masks = [policy.mask(key) for key in range(3 * KEPT)]
    assert len(policy._masks) <= KEPT
    assert [policy.mask(key) for key in range(3 * KEPT)] == masks


def test_which_layers_go() -> None:
    assert OrderedSkip([3, 1, 4], LAYERS, 0.25).mask(0) == [True, False, True, False] + [True] * 4
    assert OrderedSkip(truncation(LAYERS), LAYERS, 0.25).mask(7) == [True] * 6 + [False] * 2
    unified = {
        tuple(i for i, kept in enumerate(UnifiedSkip(LAYERS, count / LAYERS).mask(0)) if not kept)
        for count in (1, 2, 3)
    }
    assert unified == {(4,), (2, 5), (2, 4, 6)}
    drawn = {tuple(RandomSkip(LAYERS, 0.25).mask(key)) for key in range(300)}
    assert len(drawn) == 28  # all pairs of eight
    inner = [RandomSkip(LAYERS, 0.25, free=range(1, LAYERS - 1)).mask(key) for key in range(300)]
    assert all(mask[0] and mask[-1] for mask in inner)


def test_seeds_draw_other_layers_and_other_prompts() -> None:
    masks = [[RandomSkip(LAYERS, 0.25, seed=s).mask(key) for key in range(50)] for s in (0, 1)]
    assert masks[0] != masks[1]
    assert random_order(LAYERS, seed=0) != random_order(LAYERS, seed=1)
    counts = [
        [OrderedSkip([1, 2, 3], LAYERS, 0.3, seed=s).mask(key).count(False) for key in range(50)]
        for s in (0, 1)
    ]
    assert counts[0] != counts[1]


def test_losses_are_measured_under_them() -> None:
    model, rows = make_model(), make_examples(16, 0)
    loss, keep = mean_loss(model, rows, RandomSkip(LAYERS, 0.5), 4)
    assert loss > 0
    assert keep.sum(1).tolist() == [4] * 16
    assert len(keep.unique(dim=0)) > 4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OrderedSkip([1, 1], LAYERS, 0.1), "different layers below 8"),
        (lambda: OrderedSkip([9], LAYERS, 0.1), "different layers below 8"),
        (lambda: OrderedSkip([1], LAYERS, 0.5), "only 1 may be skipped"),
        (lambda: UnifiedSkip(LAYERS, 0.875), "only 6 may be skipped"),
        (lambda: RandomSkip(LAYERS, float("nan")), "skip_rate is nan"),
    ],
)
def test_what_cannot_be_skipped_is_refused(make, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


def family(name: str, rate: float = 0.25, **more) -> Baseline:
    orders = {"orders": ((0.25, (3, 1, 4, 0, 5)), (0.5, (1, 2, 6, 7, 0)))}
    return Baseline(name, LAYERS, tuple(range(1, LAYERS)), rate, **{**orders, **more})


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "skip_decode"])
def test_a_family_gives_a_policy_for_every_rate(name: str) -> None:
    for rate in (None, 0.125, 0.5):
        masks = [family(name).at(rate).mask(key) for key in range(40)]
        assert {mask.count(False) for mask in masks} == {LAYERS * (rate or 0.25)}
        assert all(mask[0] for mask in masks)  # layer 0 is not free
        if name == "random_interior":
            assert all(mask[-1] for mask in masks)
    assert (len({tuple(mask) for mask in masks}) > 1) == (name in ("random", "random_interior"))


def test_the_nearest_rate_has_the_order() -> None:
    assert family("majority").at(0.125).mask(0).index(False) == 3
    assert family("majority").at(0.5).mask(0) == [
        True, False, False, True, True, True, False, False,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="needs an order"):
        family("majority", orders=())
    with pytest.raises(ConfigError, match="expected one of random, "):
        family("best")


def test_influence_is_how_far_a_layer_turns_the_states() -> None:
    model, rows = make_model(), make_examples(24, 0)
    with torch.no_grad():
        for layer, size in ((2, 0.0), (5, 0.2), (6, 6.0)):
            block = model.base.model.layers[layer]
            block.self_attn.o_proj.weight.mul_(size)
            block.mlp.down_proj.weight.mul_(size)
    order = influence_order(model, rows, 8)
    assert (order[0], order[1], order[-1]) == (2, 5, 6)
    assert sorted(order) == list(range(LAYERS))
    assert order == influence_order(model, rows, 5)
    assert not model.routing.stack.modules[-1]._forward_hooks


@pytest.mark.parametrize("name", ["random", "unified", "static_importance", "majority"])
def test_lora_learns_under_a_policy_and_the_artifact_keeps_it(
    name: str, tmp_path: Path, byte_tokenizer, capsys
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    shared = {"model": str(folder), "data": str(data), "warm_start": 4, "skip_rate": 0.34}
    more = {}
    if name == "majority":
        routers = config(tmp_path, **shared, router_steps=2, stage="routers")
        assert run(routers) == 0
        more["majority_of"] = routers.output
    output = str(tmp_path / "policy")
    settings = config(
        tmp_path, **{**shared, "output": output}, lora_steps=2, policy=name, seed=3, **more
    )
    assert run(settings) == 0
    model = FirstModel.from_pretrained(output)
    assert model.baseline is not None
    assert (model.baseline.name, model.baseline.seed, model.baseline.rate) == (name, 3, 0.34)
    assert not (Path(output + "-run") / "checkpoints" / "routers").exists()
    if name == "majority":
        wrong = config(tmp_path, **shared, output="wrong", policy=name, majority_of=output)
        with pytest.raises(ConfigError, match=f"majority_of={output} has no routers of its own"):
            run(wrong)
        assert not Path("wrong").exists()
        table = FirstModel.from_pretrained(more["majority_of"]).thresholds
        assert model.baseline.orders == ((0.34, tuple(table.majority(0.34, "skip"))),)
    ids = torch.randint(4, 90, (40, 6), generator=torch.Generator().manual_seed(0))
    for rate in (None, 0.5):
        keep = model.decide(ids, torch.ones_like(ids), skip_rate=rate).keep
        assert float((~keep).float().mean()) == pytest.approx(rate or 0.34, abs=0.06)
        made = model.generate(ids[:2], skip_rate=rate, max_new_tokens=2, do_sample=False)
        assert torch.equal(made.keep, keep[:2])
    capsys.readouterr()
    words = ["eval", output, "--data", str(data), "--limit", "4", "--max-new-tokens", "2"]
    words += ["--task", "qa", "--output", str(tmp_path / "scores.json")]
    assert cli.main([*words, "--skip-rates", "0.5"]) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report["runs"]) == ["base", "run_all", f"{name}@0.5"]
    assert report["runs"][f"{name}@0.5"]["skip_rate"]["mean"] == 0.5
    assert cli.main([*words, "--policies", "early_exit", "--skip-rates", "0.5"]) == 0
    exits = json.loads((tmp_path / "scores.json").read_text())["runs"]["early_exit@0.5"]
    assert exits["layer_skip_share"] == [0, 0, 0, 1, 1, 1]
    assert cli.main([*words, "--policies", "router"]) == 2
    assert "artifact without" in capsys.readouterr().err


def test_artifacts_without_routers_are_not_calibrated_or_diagnosed() -> None:
    model = make_model()
    model.baseline = family("unified")
    prompts = [row.prompt_ids for row in make_examples(4, 0)]
    for call in (calibrate, diagnose):
        with pytest.raises(ConfigError, match="trained for the policy 'unified'"):
            call(model, prompts)


def test_drawn_policies_take_their_seed() -> None:
    model = make_model()
    drawn = {tuple(model.baseline_for("random_fixed", 0.5, seed=s).at().mask(0)) for s in range(9)}
    assert len(drawn) > 1


def test_policies_that_lack_something_are_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="train --policy static_importance"):
        model.baseline_for("static_importance", 0.25)
    with pytest.raises(ConfigError, match="firstlm calibrate"):
        model.baseline_for("majority", 0.25)
    with pytest.raises(ConfigError, match="'routers'; expected one of random, "):
        model.baseline_for("routers", 0.25)
    with pytest.raises(ConfigError, match="'routers'; expected one of router, run_all, random, "):
        model.choices.asked("routers")
    for wrong in ({"policy": "majority"}, {"majority_of": "x"}):
        with pytest.raises(ConfigError, match="go together"):
            config(tmp_path, **wrong)
    for wrong in ({"stage": "routers"}, {"skip_rate": 0.0}, {"skip_rate": None}):
        with pytest.raises(ConfigError, match="without routers"):
            config(tmp_path, policy="unified", **wrong)
    model.baseline = family("unified")
    model.save_pretrained(str(tmp_path / "a"))
    file = tmp_path / "a" / "first_config.json"
    file.write_text(file.read_text().replace('"unified"', '"best"'))
    with pytest.raises(ArtifactError, match="damaged"):
        FirstModel.from_pretrained(str(tmp_path / "a"), base=make_model().detach())
