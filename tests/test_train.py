# SPDX-License-Identifier: Apache-2.0
"""Training: gradients reach the routers, each phase moves its own parameters, rates are met."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from training import adaptive_model, config, make_examples, make_model, write_run

from firstlm.adapters import add_lora, raise_rank
from firstlm.artifact_files import read_config
from firstlm.calibration import calibrate
from firstlm.config import RouterConfig, TrainConfig
from firstlm.data import Collator, Encoded, draw
from firstlm.errors import ConfigError, DataError, FirstError
from firstlm.inputs import pad_left
from firstlm.lora import lora_parameters
from firstlm.losses import answer_cross_entropy, answer_logits, mean_loss, non_skip_penalty
from firstlm.model import FirstModel
from firstlm.options import to_dict
from firstlm.phases import train_joint, train_lora, train_routers, work_folder
from firstlm.policies import RouterPolicy, RunAll
from firstlm.starts import first_offsets
from firstlm.train import changed_options, run
from firstlm.trainer import FirstTrainer


@pytest.mark.parametrize("prefill", ["skip", "full"])
@pytest.mark.parametrize("gate", ["straight_through", "soft"])
def test_cross_entropy_has_a_gradient_for_every_router(gate: str, prefill: str) -> None:
    model = make_model()
    inputs = Collator(0)(make_examples(8, seed=1))
    with torch.no_grad():  # some rows skip some layers, so that both sides of the gate are seen
        for i, router in enumerate(model.routers):
            router.weight.normal_(generator=torch.Generator().manual_seed(i))
            router.bias.zero_()
    model.requires_grad_(False)
    model.routers.requires_grad_(True)
    state = model.new_state(inputs["prompt_mask"], prefill=prefill, gate=gate)
    loss = answer_cross_entropy(*answer_logits(model, inputs, state))
    loss.backward()
    assert 0 < state.keep.float().mean() < 1
    for router in model.routers:
        assert router.weight.grad.abs().max() > 0
        assert router.bias.grad.abs() > 0


def test_straight_through_is_hard_forward() -> None:
    model = make_model()
    inputs = Collator(0)(make_examples(8, seed=1))
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.weight.normal_(generator=torch.Generator().manual_seed(i))
            router.bias.zero_()
    outputs = {}
    for gate in ("hard", "straight_through", "soft"):
        state = model.new_state(inputs["prompt_mask"], gate=gate)
        outputs[gate], _ = answer_logits(model, inputs, state)
    torch.testing.assert_close(outputs["hard"], outputs["straight_through"])
    assert (outputs["hard"] - outputs["soft"]).abs().max() > 1e-3


def test_soft_gate_is_the_papers_equation() -> None:
    """h_i = h_{i-1} + rho_i * phi_i(h_{i-1}), checked layer by layer from the base's own layers."""
    model = make_model(layers=3)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    mask = torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.weight.normal_(generator=torch.Generator().manual_seed(i))
        state = model.new_state(mask, gate="soft")
        logits = model(ids, state=state)[0].logits
    base = model.detach()
    with torch.no_grad():
        inner = base.model
        hidden = inner.embed_tokens(ids)
        position_embeddings = inner.rotary_emb(hidden, torch.arange(5)[None])
        for layer, router in zip(inner.layers, model.routers, strict=True):
            rho = torch.sigmoid(hidden[:, :3].mean(1) @ router.weight + router.bias)
            phi = layer(hidden, position_embeddings=position_embeddings) - hidden
            hidden = hidden + rho * phi
        expected = base.lm_head(inner.norm(hidden))
    torch.testing.assert_close(logits, expected)


def test_mean_loss_is_that_of_the_answers():
    model = make_model(layers=4)
    generator = torch.Generator().manual_seed(0)
    items = [
        Encoded(*(torch.randint(3, 259, (n,), generator=generator).tolist() for n in sizes))
        for sizes in ((5, 3), (2, 4), (7, 1))
    ]
    total, count = 0.0, 0
    for item in items:
        ids = torch.tensor([item.prompt_ids + item.answer_ids])
        with torch.no_grad():
            scores = model.base(ids).logits[0].log_softmax(-1)
        for place, token in enumerate(item.answer_ids, start=len(item.prompt_ids)):
            total, count = total - float(scores[place - 1, token]), count + 1
    ce, keep = mean_loss(model, items, RunAll(), batch_size=2)
    assert ce == pytest.approx(total / count, rel=1e-4)
    assert keep.shape == (3, 4)
    assert keep.all()


def test_penalty_is_the_sum_over_layers() -> None:
    rho = torch.tensor([[0.5, 0.5, 1.0], [0.0, 0.5, 0.5]])
    assert non_skip_penalty(rho) == pytest.approx(1.5)


def test_phase_one_moves_routers_only_and_phase_two_lora_only(tmp_path: Path) -> None:
    model = make_model()
    train, validation = make_examples(64, 0), make_examples(16, 1)

    def snapshot() -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    before = snapshot()
    train_routers(model, train, validation, config(tmp_path, router_steps=5))
    after = snapshot()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("routers.")}

    train_lora(model, train, validation, config(tmp_path, lora_steps=1))
    before = snapshot()
    train_lora(model, train, validation, config(tmp_path, lora_steps=5))
    after = snapshot()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert any("self_attn" in name for name in changed)
    assert any("mlp" in name for name in changed)


def test_both_at_once_move_each_at_its_own_rate(tmp_path: Path) -> None:
    """Adam's first step is as long as the learning rate."""

    def moved(router_lr: float) -> dict[str, float]:
        model, rows = make_model(), make_examples(64, 0)
        add_lora(model, config(tmp_path))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        options = {"lora_steps": 1, "router_lr": router_lr, "lora_lr": 3e-3, "warmup": 0.0}
        settings = config(tmp_path / str(router_lr), **options)
        assert train_joint(model, rows, rows[:16], settings)["steps"] == 1
        after = dict(model.named_parameters())
        return {n: float((after[n].detach() - before[n]).abs().max()) for n in before}

    slow, fast = moved(0.01), moved(0.02)
    for name, by in slow.items():
        if "lora_B" in name:
            assert by == pytest.approx(3e-3, rel=0.02)
            assert fast[name] == pytest.approx(by, rel=0.02)
        elif name.startswith("routers."):
            assert by > 0
            assert fast[name] == pytest.approx(2 * by, rel=0.02)
        elif "lora_" not in name:
            assert by == 0


def test_both_at_once_learn_the_task_and_meet_the_rate(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    options = {"model": str(folder), "data": str(data), "stage": "joint", "lora_steps": 40}
    settings = config(tmp_path, **options, skip_rate=0.34, warm_start=4, router_lr=0.002)
    assert run(settings) == 0
    model = FirstModel.from_pretrained(settings.output)
    assert model.has_adapter
    record = model.training_record["joint"]
    assert record["ce_after"] < record["ce_before"] - 0.4
    assert record["skip_rate"] == pytest.approx(0.34, abs=0.1)


@pytest.mark.parametrize("wanted", [0.15, 0.25])
@pytest.mark.parametrize("gate", ["straight_through", "soft"])
def test_driven_alpha_meets_the_rate(tmp_path: Path, wanted: float, gate: str) -> None:
    """From routers that keep all layers, but not equally: equal ones allow no rate in between."""
    model = make_model(layers=16)
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.bias.fill_(0.2 + 0.15 * ((7 * i) % 16))
    train, validation = make_examples(256, 0), make_examples(32, 1)
    settings = config(
        tmp_path,
        skip_rate=wanted,
        gate=gate,
        router_steps=120,
        router_lr=0.03,
        batch_size=8,
        logging_steps=4,
    )
    record = train_routers(model, train, validation, settings)
    lines = (work_folder(settings) / "log_routers.jsonl").read_text().splitlines()
    last = [json.loads(line)["skip_rate"] for line in lines][-10:]
    assert sum(last) / len(last) == pytest.approx(wanted, abs=0.02)
    assert record["alpha"] != 0.0


def test_alpha_by_hand_is_left_alone_and_more_alpha_skips_more(tmp_path: Path) -> None:
    rates = []
    for alpha in (0.0, 1.0):
        model = make_model()
        settings = config(tmp_path / str(alpha), skip_rate=None, alpha=alpha, router_steps=30)
        record = train_routers(model, make_examples(64, 0), make_examples(32, 1), settings)
        assert record["alpha"] == alpha
        rates.append(record["skip_rate"])
    assert rates[1] > rates[0]


def test_one_model_serves_many_rates_on_unseen_prompts(tmp_path: Path) -> None:
    model = make_model(layers=20)
    settings = config(
        tmp_path, skip_rate=0.25, skip_rates=[0.1, 0.15, 0.4], warm_start=8, router_steps=30
    )
    train_routers(model, make_examples(256, 0), make_examples(32, 1), settings)
    prompts = [e.prompt_ids for e in make_examples(200, 2)]
    calibrate(model, prompts, progress=False)
    for prefill in ("skip", "full"):
        for rate in (0.10, 0.15, 0.25, 0.40):
            ids, mask = pad_left([e.prompt_ids for e in make_examples(200, 3)], 0)
            state = model.decide(ids, mask, skip_rate=rate, prefill=prefill)
            found = 1 - state.keep.float().mean()
            assert found == pytest.approx(rate, abs=0.02), (prefill, rate)
    assert model.policy_for(0.0).__class__.__name__ == "RunAll"
    with pytest.raises(ConfigError, match="outside what was calibrated"):
        model.policy_for(0.85)


def test_a_rate_without_calibration_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibrate"):
        make_model().policy_for(0.25)
    with pytest.raises(ConfigError, match="between 0 and"):
        make_model().policy_for(float("nan"))
    with pytest.raises(DataError):
        calibrate(make_model(), [])


def test_full_prefill_trains_the_answer_positions_only() -> None:
    """Prompt positions are ungated: with all layers skipped, their logits are the base model's."""
    model = make_model()
    inputs = Collator(0)(make_examples(4, seed=1))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    none = RouterPolicy(model.routers, offset=-1e6)
    state = model.new_state(inputs["prompt_mask"], none, prefill="full")
    routed = model(ids, mask, state=state)[0].logits
    with model.run_all():
        whole = model(ids, mask)[0].logits
    prompt = inputs["prompt_mask"]
    answer = mask.bool() & ~prompt
    torch.testing.assert_close(routed[prompt], whole[prompt])
    assert (routed[answer] - whole[answer]).abs().max() > 1e-3


def test_gradient_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    weights = []
    same = [Encoded([65 + i % 20] * 4, [70 + i % 9, 257]) for i in range(32)]
    for batch, accumulate in ((16, 1), (4, 4)):
        model = make_model()
        settings = config(
            tmp_path / str(batch),
            batch_size=batch,
            grad_accum=accumulate,
            lora_steps=2,
            skip_rate=0.0,
        )
        train_lora(model, same, same[:4], settings)
        weights.append([p.detach() for n, p in model.named_parameters() if "lora_B" in n])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_checkpointing_trains_the_same(tmp_path: Path, unit: str) -> None:
    weights = []
    for checkpointing in (False, True):
        model = FirstModel.from_base(tiny_llama(layers=4), RouterConfig(unit=unit, init_bias=0.3))
        settings = config(
            tmp_path / str(checkpointing),
            router_steps=3,
            lora_steps=3,
            gradient_checkpointing=checkpointing,
        )
        examples = make_examples(32, 0)
        train_lora(model, examples, examples[:4], replace(settings, skip_rate=0.0))
        train_routers(model, examples, examples[:4], settings)
        weights.append({n: p.detach() for n, p in model.named_parameters()})
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], msg=name)


def test_run_writes_an_artifact_with_its_run_file(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(
        tmp_path,
        model=str(folder),
        data=str(data),
        router_steps=20,
        lora_steps=6,
        eval_steps=3,
        tensorboard=True,
        warm_start=4,
    )
    assert run(settings) == 0
    artifact = Path(settings.output)
    assert {f.name for f in artifact.iterdir()} >= {
        "first_config.json",
        "routers.safetensors",
        "adapter",
        "README.md",
        "run.yaml",
    }
    record = json.loads((artifact / "first_config.json").read_text())["training"]
    assert record["run"]["router_steps"] == 20
    assert record["provenance"]["data"]["train"]
    assert {"ce_before", "ce_after", "skip_rate", "alpha"} <= record["lora"].keys()
    assert list((work_folder(settings) / "logs").rglob("events.out.tfevents*"))
    log = (work_folder(settings) / "log_routers.jsonl").read_text().splitlines()
    assert {"ce", "skip_rate", "mean_rho", "alpha", "mostly_skipped"} <= json.loads(log[0]).keys()

    model = FirstModel.from_pretrained(str(artifact))
    ids = torch.tensor([model.tokenizer("say 3:")["input_ids"]])
    assert model.generate(ids, max_new_tokens=3).keep.shape == (1, 6)


def test_what_cannot_be_trained_is_refused_before_the_model_is_loaded(
    tmp_path: Path, byte_tokenizer
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    assert run(settings) == 0
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="other options"):
        run(replace(settings, lora_lr=1e-4))
    with data.open("a") as file:
        file.write('\n{"prompt": "say more:", "completion": " 1"}')
    with pytest.raises(ConfigError, match="data that has changed since"):
        run(settings)
    data.write_text('{"prompt": "no answer"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:\d+"):
        run(replace(settings, output=str(tmp_path / "other")))
    assert not (tmp_path / "other-run").exists()


def test_rows_longer_than_the_context_are_refused(tmp_path: Path, byte_tokenizer) -> None:
    folder = tmp_path / "short"
    base = tiny_llama(layers=2)
    base.config.max_position_embeddings = 16
    base.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}", "completion": " " + "x" * (4 if i else 40)} for i in range(9)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match=r"data\.jsonl:1.*more than max_length 16"):
        run(config(tmp_path, model=str(folder), data=str(data), validation=str(data)))
    assert not (tmp_path / "artifact").exists()
    assert not (tmp_path / "artifact-run").exists()


@pytest.mark.parametrize(
    ("run_has", "asked", "found"),
    [
        ({}, {"router_steps": 3, "distill": 0.5}, ["distill", "router_steps"]),
        ({"stage": "lora", "skip_rate": 0.0}, {"router_steps": 3, "warm_start": 5}, []),
        ({"stage": "lora", "skip_rate": None}, {"init_bias": -1.0}, ["init_bias"]),
        ({"policy": "unified"}, {"distill": 0.0, "router_lr": 0.5, "lora_lr": 0.5}, ["lora_lr"]),
        ({"stage": "joint"}, {"router_steps": 3, "router_lr": 0.5}, ["router_lr"]),
    ],
)
def test_options_that_nothing_looks_at_make_no_other_run(run_has, asked, found) -> None:
    before = to_dict(TrainConfig(**run_has))
    assert changed_options(before, TrainConfig(**run_has, **asked)) == found


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"skip_rate": 0.99}, "between 0 and"),
        ({"skip_rate": -1}, "between 0 and"),
        ({"skip_rate": float("nan")}, "between 0 and"),
        ({"skip_rates": [0.1], "skip_rate": None}, "skip_rates needs"),
        ({"router_steps": -1}, "0 or more"),
        ({"batch_size": 0}, "1 or more"),
        ({"stage": "lora"}, "stage=lora"),
        ({"clusters": 2, "warm_start": 0}, "clusters=2 ranks layers .* nothing is ranked"),
        ({"clusters": 2, "warm_start": 4, "skip_rate": None}, "clusters=2"),
        ({"clusters": 2, "warm_start": 4, "policy": "unified"}, "clusters=2"),
        ({"distill": 2.0, "stage": "joint"}, "distill=2 is for routers that train by themselves"),
        ({"distill": 2.0, "policy": "unified"}, "distill=2"),
        ({"teach": 1.0, "stage": "joint"}, "teach=1"),
        ({"teach": 1.0, "stage": "lora", "skip_rate": 0.0}, "teach=1.*a skip_rate above 0"),
        ({"heal": 16, "stage": "routers"}, "heal=16 is for LoRA that learns to do without layers"),
        ({"heal": 16, "skip_rate": 0.0, "stage": "lora"}, "heal=16.*a skip_rate above 0"),
        ({"heal": 15}, "heal=15 holds out too few"),
        ({"heal": 16, "unit": "mlp"}, "heal=16 is for whole blocks"),
        ({"heal": 16, "prefill": "full"}, "heal=16 is for whole blocks"),
        ({"heal": 16, "policy": "skip_decode"}, "heal=16 is for whole blocks"),
        ({"stage": "lroa"}, "stage.*expected"),
        ({"gate": "sotf"}, "gate.*expected"),
        ({"warm_start": -1}, "0 or more"),
        ({"lora_lr": float("inf")}, "lora_lr is inf; expected a number"),
        ({"lora_lr": 0.0}, "more than 0"),
        ({"seed": -1}, "seed is -1"),
        ({"warmup": 2.0}, "up to below 1"),
        ({"alpha": -5.0}, "0 or more"),
        ({"lora_dropout": 2.0}, "below 1"),
        ({"validation_limit": 0}, "1 or more"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
        ({"dtype": "float16"}, "bfloat16 or float32"),
    ],
)
def test_impossible_options_are_refused(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TrainConfig(**changes)


def test_lora_trains_in_float32(tmp_path: Path) -> None:
    """Steps are smaller than bfloat16 resolves."""
    model, options = make_model(), config(tmp_path, skip_rate=0.0, stage="lora", lora_steps=1)
    add_lora(model, options)
    for parameter in lora_parameters(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    train_lora(model, make_examples(16, 0), make_examples(4, 1), options)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}


def test_standardised_routers_give_the_same_logits() -> None:
    router = make_model().routers[0]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
    states = 5 + 3 * torch.randn(40, len(router.weight), generator=generator)
    before = router(states)
    for _ in range(2):  # a second run goes on from what the first one left
        router.standardise(states.mean(0), states.std(0))
        torch.testing.assert_close(router(states), before, atol=1e-3, rtol=1e-4)
    router.fold()
    assert router.center is None
    torch.testing.assert_close(states @ router.weight + router.bias, before, atol=1e-3, rtol=1e-4)


def test_trained_routers_go_on_from_where_they_are(tmp_path: Path) -> None:
    """Neither a new ranking nor standardisation may change what they decide before step one."""
    model = make_model()
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.weight.normal_(generator=torch.Generator().manual_seed(i))
            router.bias.zero_()
    ids, mask = pad_left([e.prompt_ids for e in make_examples(64, 3)], 0)
    before = model.decide(ids, mask)
    examples = make_examples(64, 0)
    settings = config(tmp_path, warm_start=8, router_steps=0)
    assert "removal_order" not in train_routers(model, examples, examples[:8], settings)
    after = model.decide(ids, mask)
    assert 0 < before.keep.float().mean() < 1
    assert (before.keep == after.keep).float().mean() > 0.99


def test_any_rate_that_was_trained_is_served(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(
        tmp_path,
        model=str(folder),
        data=str(data),
        skip_rate=0.5,
        warm_start=4,
        router_steps=10,
        lora_steps=2,
    )
    assert run(settings) == 0
    model = FirstModel.from_pretrained(settings.output)
    prompts = [model.tokenizer(f"say {i}:")["input_ids"] for i in range(30)]
    ids, mask = pad_left(prompts, 0)
    for rate in (None, 0.5):  # the plain threshold serves it too
        found = 1 - model.decide(ids, mask, skip_rate=rate).keep.float().mean()
        assert found == pytest.approx(0.5, abs=0.1)


def test_an_artifact_brings_its_base_model_and_its_unit(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    steps = {"router_steps": 1, "lora_steps": 0}
    settings = config(tmp_path, model=str(folder), data=str(data), unit="mlp", **steps)
    assert run(settings) == 0
    more = replace(settings, model=None, artifact=settings.output, output=str(tmp_path / "more"))
    assert run(more) == 0
    behind = [read_config(Path(one.output))["training"]["trainings"] for one in (settings, more)]
    assert behind == [1, 2]
    with pytest.raises(ConfigError, match="give --unit mlp"):
        run(replace(more, unit="block", output=str(tmp_path / "other")))


def test_a_lora_gets_a_higher_rank_and_computes_what_it_did(tmp_path: Path) -> None:
    model, ids = make_model(), torch.arange(97, 113)[None]
    add_lora(model, config(tmp_path, lora_rank=4, lora_alpha=12))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
        before, plain = model(ids)[0].logits, model.plain_base
        raise_rank(model, config(tmp_path, lora_rank=16, lora_alpha=16))
        assert torch.allclose(model(ids)[0].logits, before, atol=1e-5)
        with model.disable_adapter():
            assert not torch.allclose(model(ids)[0].logits, before, atol=1e-2)
    assert model.plain_base is plain
    ranks = {len(p) for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks == {16}


def test_a_run_goes_on_with_a_higher_rank_and_refuses_a_lower_one(
    tmp_path: Path, byte_tokenizer
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    steps = {"router_steps": 1, "lora_steps": 1}
    settings = config(tmp_path, model=str(folder), data=str(data), lora_rank=4, **steps)
    assert run(settings) == 0
    more = replace(settings, artifact=settings.output, output=str(tmp_path / "more"), lora_rank=8)
    assert run(more) == 0
    written = json.loads((tmp_path / "more" / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 8
    less = replace(more, lora_rank=2, output=str(tmp_path / "less"))
    with pytest.raises(ConfigError, match="give --lora-rank 4 or more"):
        run(less)
    assert not (tmp_path / "less").exists()


def test_a_run_that_diverges_stops(tmp_path: Path) -> None:
    model = make_model()
    examples = make_examples(32, 0)
    with pytest.raises(FirstError, match=r"diverged: the loss is .* at step \d"):
        train_lora(model, examples, examples[:8], config(tmp_path, lora_lr=1e30, max_grad_norm=1e9))


def test_no_phase_begins_with_the_rows_that_another_has_just_learnt(tmp_path: Path, monkeypatch):
    seen: dict[str, list] = {"routers": [], "lora": []}
    step = FirstTrainer.training_step

    def noted(self, model, inputs, *args):
        seen[Path(self.args.output_dir).name].append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(FirstTrainer, "training_step", noted)
    model, examples = make_model(), make_examples(256, 0)
    settings = config(tmp_path, router_steps=2, lora_steps=2)
    train_routers(model, examples, examples[:4], settings)
    train_lora(model, examples, examples[:4], settings)
    assert [len(batches) for batches in seen.values()] == [2, 2]
    rows = {
        name: {tuple(row) for batch in batches for row in batch} for name, batches in seen.items()
    }
    assert len(rows["routers"] & rows["lora"]) < 16  # of 32, of 256 drawn at random


def test_what_goes_on_from_an_artifact_learns_from_other_rows(tmp_path: Path, monkeypatch) -> None:
    seen: list[list] = []
    step = FirstTrainer.training_step

    def noted(self, model, inputs, *args):
        seen[-1] += map(tuple, inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(FirstTrainer, "training_step", noted)
    examples = make_examples(256, 0)
    settings = config(tmp_path, lora_steps=2, skip_rate=0.0, stage="lora")
    for behind in range(3):  # an artifact of an artifact, too, does not begin anew
        seen.append([])
        model = make_model()
        model.training_record = {"run": {}, "trainings": behind} if behind else {}
        train_lora(model, examples, examples[:4], settings)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert len(set(seen[one]) & set(seen[other])) < 16  # of 32, of 256 drawn at random


@pytest.mark.parametrize("rate", [0.25, None])
def test_the_penalty_moves_lora_only_where_no_offset_holds_a_rate(
    tmp_path: Path, rate: float | None
) -> None:
    """Beside offsets it would only make LoRA drive frozen routers' masks away."""
    examples, found = make_examples(48, 0), []
    for alpha in (0.0, 3.0):
        torch.manual_seed(0)
        model = adaptive_model()
        settings = config(tmp_path / str(alpha), lora_steps=3, alpha=alpha, skip_rate=rate)
        record = train_lora(model, examples[:32], examples[32:], settings)
        found.append({name: p.detach().clone() for name, p in lora_parameters(model).items()})
        assert record["alpha"] == (alpha if rate is None else 0.0)
    without, weighed = found
    same = all(torch.equal(part, weighed[name]) for name, part in without.items())
    assert same == (rate is not None)


def test_the_share_of_decisions_that_lora_flips_is_told(tmp_path: Path) -> None:
    examples, found = make_examples(64, 0), {}
    for rate in (1e-12, 0.3):
        model = adaptive_model()
        settings = config(tmp_path, lora_steps=2, lora_lr=rate, batch_size=16)
        prompts = [row.prompt_ids for row in draw(examples[:16], None)]
        ids, mask = pad_left(prompts, model.pad_id)
        offset = first_offsets(model, examples, settings)[0.25]
        before = model.decide(ids, mask, RouterPolicy(model.routers, offset)).keep
        record = train_lora(model, examples, examples[:16], settings)
        after = model.decide(ids, mask, RouterPolicy(model.routers, offset)).keep
        assert record["flipped"] == pytest.approx(float((before != after).float().mean()))
        found[rate] = record["flipped"]
    assert found[1e-12] == 0 < found[0.3]


def test_routers_that_read_the_length_see_nothing_else(tmp_path: Path) -> None:
    base = tiny_llama(layers=4)
    model = FirstModel.from_base(base, RouterConfig(init_bias=0.5, reads="length"))
    examples = make_examples(64, 0)
    settings = config(tmp_path, router_steps=4, lora_steps=2, reads="length", skip_rate=0.4)
    train_routers(model, examples, examples[:8], settings)
    assert {tuple(router.weight.shape) for router in model.routers} == {(1,)}
    assert all(bool(router.weight.any()) for router in model.routers)
    train_lora(model, examples, examples[:8], settings)
    with torch.no_grad():  # layer i runs from 2 + 2i tokens on
        for layer, router in enumerate(model.routers):
            router.weight.fill_(10.0)
            router.bias.fill_(-10.0 * torch.log(torch.tensor(1.5 + 2 * layer)).item())
    lengths = [1, 2, 3, 4, 6, 7, 8, 12]
    ids, mask = pad_left([[100 + i, *[97] * (n - 1)] for i, n in enumerate(lengths)], 0)
    keep = model.decide(ids, mask).keep
    assert keep.sum(1).tolist() == [0, 1, 1, 2, 3, 3, 4, 4]
    model.save_pretrained(str(tmp_path / "saved"))
    again = FirstModel.from_pretrained(str(tmp_path / "saved"), base=tiny_llama(layers=4))
    assert torch.equal(again.decide(ids, mask).keep, keep)
    assert again.routers.reads == "length"
