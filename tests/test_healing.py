# SPDX-License-Identifier: Apache-2.0
"""LoRA's start by regression: what it finds, what it is worth, and where it does not apply."""

from __future__ import annotations

import json
from pathlib import Path

import families
import pytest
import torch
from test_distill import skipping
from training import config, make_examples, make_model, write_run

from firstlm import cli, healing
from firstlm.adapters import add_lora
from firstlm.artifact_files import read_config
from firstlm.data import Collator, Encoded
from firstlm.errors import ConfigError
from firstlm.healing import _lora_map, _next_kept, _scaled, _scales, _set_lora, heal, reduced_rank
from firstlm.importance import layer_states
from firstlm.lora import lora_layers
from firstlm.losses import FullDepth, answer_pass
from firstlm.model import FirstModel
from firstlm.phases import train_lora
from firstlm.policies import FixedMask

ROWS = 2000


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def regress(missing: torch.Tensor, x: torch.Tensor, old: torch.Tensor, rank: int):
    return reduced_rank(x, missing, old, rank, torch.arange(len(x)) % 5 == 4)


def test_a_map_of_the_rank_is_found() -> None:
    x = numbers(ROWS, 12) * torch.linspace(0.5, 3, 12)
    wanted = numbers(12, 3, seed=1) @ numbers(3, 9, seed=2)
    down, up = regress(x @ wanted, x, torch.zeros(12, 9), 3)
    assert (down.shape, up.shape) == ((12, 3), (3, 9))
    wrong = (x @ (down @ up - wanted)).square().sum() / (x @ wanted).square().sum()
    assert float(wrong) < 1e-3


def test_of_more_than_the_rank_the_part_that_inputs_show_most_is_kept() -> None:
    """The best map of a rank, as the singular values of what it predicts say (Izenman 1975)."""
    x = numbers(ROWS, 12) * torch.logspace(-1, 1, 12)
    missing = x @ numbers(12, 9, seed=1)
    down, up = regress(missing, x, torch.zeros(12, 9), 3)
    left = float((missing - x @ down @ up).square().sum() / missing.square().sum())
    energy = torch.linalg.svdvals(missing).square()
    assert left == pytest.approx(float(energy[3:].sum() / energy.sum()), rel=0.15)
    weights = torch.linalg.svd(numbers(12, 9, seed=1))
    plain = weights.U[:, :3] @ torch.diag(weights.S[:3]) @ weights.Vh[:3]
    of_plain = (missing - x @ plain).square().sum() / missing.square().sum()
    assert left < 0.9 * float(of_plain)


def test_what_lora_knew_is_kept_where_the_rank_has_room_for_it() -> None:
    x = numbers(ROWS, 12)
    old = numbers(12, 2, seed=3) @ numbers(2, 9, seed=4)
    more = numbers(12, 2, seed=5) @ numbers(2, 9, seed=6)
    down, up = regress(x @ more, x, old, 4)
    assert torch.allclose(down @ up, old + more, atol=0.1)


def test_where_there_is_nothing_to_find_nothing_changes() -> None:
    x = numbers(ROWS, 12)
    assert regress(numbers(ROWS, 9, seed=1), x, torch.zeros(12, 9), 3) is None
    assert regress(1e-4 * x[:, :9], x, torch.zeros(12, 9), 3) is None


@torch.no_grad()
def test_lora_adds_what_it_is_set_to(tmp_path: Path) -> None:
    model = make_model()
    add_lora(model, config(tmp_path, lora_rank=4, lora_alpha=12))
    for part in lora_layers(model)[4:7]:  # up, down and more: of different widths
        x, down = numbers(5, part.in_features), numbers(part.in_features, 3, seed=1)
        up = numbers(3, part.out_features, seed=2)
        before = part(x)
        _set_lora(part, down, up)
        assert torch.allclose(part(x) - before, x @ down @ up, atol=1e-3)
        assert torch.allclose(_lora_map(part), down @ up, atol=1e-4)
        a, b = part.lora_A["default"].weight[:3], part.lora_B["default"].weight
        assert float(a.norm() / b.norm()) == pytest.approx(1, rel=1e-3)


def test_the_states_that_are_wanted_are_those_before_the_next_layer_that_runs() -> None:
    keep = torch.tensor([[True, False, False, True], [True, True, True, False]])
    assert _next_kept(keep).tolist() == [[3, 3, 3, 4], [1, 2, 4, 4]]


def distance(model: FirstModel, inputs: dict, full: FullDepth, keep: torch.Tensor) -> float:
    state = model.new_state(inputs["prompt_mask"], FixedMask(keep))
    with torch.no_grad():
        output, _ = answer_pass(model, inputs, state, output_hidden_states=True)
    states, mask = output.hidden_states[-1], inputs["attention_mask"]
    return full.distance(states, output.logits, mask).item()


@pytest.mark.parametrize("rows", [1, 3])
def test_masks_leave_less_missing_on_prompts_that_were_not_seen(tmp_path: Path, rows: int) -> None:
    """For one mask and for masks that differ by prompt; all layers lose little of what they do."""
    model, held = make_model(), Collator(0)(make_examples(64, seed=2))
    add_lora(model, config(tmp_path, lora_rank=16))
    masks = torch.ones(rows, model.layer_count, dtype=torch.bool)
    masks[torch.arange(rows), 2 + torch.arange(rows)] = False
    masks[:, 6] = False
    examples = make_examples(600, seed=1)
    full = FullDepth.of(model, held)
    everything = torch.ones(model.layer_count, dtype=torch.bool)

    def far() -> tuple[float, float]:
        some = masks[torch.arange(64) % rows]
        return distance(model, held, full, some), distance(model, held, full, everything)

    before = far()
    left = heal(model, examples, masks[torch.arange(600) % rows][None])
    after = far()
    assert before[1] == 0.0
    assert 5 in left  # the layer before the one that nobody runs
    assert 0 not in left  # nothing is missing before the first layer that is skipped
    assert after[0] < 0.8 * before[0]
    assert after[1] < 0.5 * (before[0] - after[0])


def test_what_the_pass_computes_on_is_what_the_model_does_then(tmp_path: Path) -> None:
    """Later layers see the change of earlier ones: a second pass finds nothing worth a change."""
    model, examples = make_model(), make_examples(600, seed=1)
    add_lora(model, config(tmp_path, lora_rank=32))
    keep = torch.ones(1, 600, model.layer_count, dtype=torch.bool)
    keep[..., [2, 3]] = False
    inputs = Collator(0)(examples)
    full = FullDepth.of(model, inputs)
    heal(model, examples, keep)
    found = distance(model, inputs, full, keep[0])
    heal(model, examples, keep)
    assert distance(model, inputs, full, keep[0]) < 1.5 * found


def test_all_states_are_those_that_transformers_returns() -> None:
    model, inputs = make_model(), Collator(0)(make_examples(4, seed=1))
    with torch.no_grad():
        states = layer_states(model, inputs)
        state = model.new_state(inputs["prompt_mask"])
        output, _ = answer_pass(model, inputs, state, output_hidden_states=True)
    assert len(states) == model.layer_count + 1
    for entered, returned in zip(states[:-1], output.hidden_states, strict=False):
        assert torch.equal(entered, returned)
    norm = model.plain_base.model.norm
    with torch.no_grad():
        assert torch.allclose(norm(states[-1]), output.hidden_states[-1], atol=1e-5)


def test_autocast_leaves_the_regression_alone(tmp_path: Path) -> None:
    """In bfloat16, what enters a map has a mean that hides the rest."""
    found = []
    for enabled in (False, True):
        model, examples = make_model(), make_examples(200, seed=1)
        add_lora(model, config(tmp_path, lora_rank=16))
        seen: list[torch.dtype] = []
        regress_in = healing.reduced_rank
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                healing,
                "reduced_rank",
                lambda x, *rest: (seen.append((x.T @ x).dtype), regress_in(x, *rest))[1],  # noqa: B023
            )
            keep = torch.ones(1, 200, model.layer_count, dtype=torch.bool)
            keep[..., 2] = False
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(heal(model, examples, keep))
        assert set(seen) == {torch.float32}
    assert 1 in found[1]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "phi", "gpt_neox", "falcon", "gemma3_text", "olmo2"]
)
def test_families_heal_whether_they_normalise_what_they_add_or_not(
    tmp_path: Path, name: str
) -> None:
    model = FirstModel.from_base(families.make_model(name))
    add_lora(model, config(tmp_path, lora_rank=16))
    letters = make_examples(600, seed=1)  # their vocabulary is smaller
    examples = [Encoded([i - 90 for i in e.prompt_ids], [1, 2]) for e in letters]
    keep = torch.ones(1, 600, model.layer_count, dtype=torch.bool)
    keep[..., 2] = False
    held = Collator(0)(examples[:40])
    full = FullDepth.of(model, held)
    before = distance(model, held, full, keep[0, 0])
    assert 1 in heal(model, examples, keep)
    assert distance(model, held, full, keep[0, 0]) < 0.9 * before


def test_norms_are_told_from_other_things() -> None:
    before, tokens = numbers(50, 9), 1 + numbers(50, 1, seed=1).abs()
    features = torch.linspace(-2, 2, 9)  # one of them is 0
    found = _scales(before, before * tokens * features)
    assert torch.allclose(found[0] * found[1], tokens * features, atol=0.01)
    assert found[1].abs().min() > 0
    assert _scaled(before, before * tokens * features)
    assert not _scaled(before, before * tokens + numbers(50, 9, seed=2))


def test_a_norm_that_weighs_features_is_reckoned_with(tmp_path: Path) -> None:
    """With LoRA that knows something already."""
    model = FirstModel.from_base(families.make_model("gemma3_text"))
    torch.manual_seed(5)
    add_lora(model, config(tmp_path, lora_rank=32))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "post_feedforward_layernorm" in name:
                weight.copy_(torch.linspace(0.2, 2, len(weight)) - 1)
            if "lora_B" in name:
                weight.normal_(0, 0.02)
    examples = [Encoded([i - 90 for i in e.prompt_ids], [1, 2]) for e in make_examples(600, seed=1)]
    keep = torch.ones(1, 600, model.layer_count, dtype=torch.bool)
    keep[..., 2] = False
    held = Collator(0)(examples[:40])
    full = FullDepth.of(model, held)
    before = distance(model, held, full, keep[0, 0])
    left = heal(model, examples, keep)
    assert left[2] < 0.68  # 0.69 and more where tokens or features were not weighed
    assert distance(model, held, full, keep[0, 0]) < 0.7 * before


def test_a_model_whose_maps_do_not_add_is_refused(tmp_path: Path) -> None:
    model = make_model()
    add_lora(model, config(tmp_path))
    for layer in model.routing.stack.modules:
        layer.mlp.register_forward_hook(lambda _mlp, _args, output: output.abs())
    keep = torch.ones(1, 40, model.layer_count, dtype=torch.bool)
    with pytest.raises(ConfigError, match="Leave heal at 0"):
        heal(model, make_examples(40, seed=1), keep)


def test_phase_2_begins_healed_and_its_record_says_so(tmp_path: Path) -> None:
    examples, found = make_examples(256, seed=1), []
    for count in (0, 200):
        model = skipping(2)
        settings = config(
            tmp_path / str(count), heal=count, lora_steps=0, lora_rank=16, skip_rate=0.125
        )
        record = train_lora(model, examples, examples[:64], settings)
        found.append(record)
    assert "healed" not in found[0]
    assert 1 in found[1]["healed"]
    assert all(0 < share < 1 for share in found[1]["healed"].values())


def test_a_run_heals_and_says_what_was_left(tmp_path: Path, byte_tokenizer) -> None:
    base, data = write_run(tmp_path, byte_tokenizer)
    words = ["train", "--model", str(base), "--data", str(data), "--output", str(tmp_path / "a")]
    words += ["--heal", "40", "--skip-rate", "0.34", "--router-steps", "1", "--lora-steps", "2"]
    assert cli.main([*words, "--warm-start", "4", "--no-tensorboard"]) == 0
    training = read_config(tmp_path / "a")["training"]
    assert training["run"]["heal"] == 40
    assert json.dumps(training["lora"]["healed"]).count(":") >= 1
