# SPDX-License-Identifier: Apache-2.0
"""Every check and every sign of `firstlm diagnose` is seen to fire by really causing it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_byte_tokenizer, tiny_llama
from transformers import DynamicCache

from firstlm import FirstModel, cli, kv_probe, probes, verdicts
from firstlm.cache import SkipCache
from firstlm.config import RouterConfig
from firstlm.data import Collator, Encoded, encode_prompt, prompt_batches
from firstlm.decisions import RoutingState
from firstlm.diagnose import PROMPTS, describe_routers, diagnose
from firstlm.errors import ConfigError, DataError
from firstlm.losses import mean_loss
from firstlm.policies import FixedMask, RouterPolicy
from firstlm.routing import Routing
from firstlm.thresholds import Threshold

TEXTS = [PROMPTS[i][:40] for i in range(5)]


def opinionated(unit="block", **more):
    """A tiny model whose routers decide differently from prompt to prompt."""
    model = FirstModel.from_base(tiny_llama(**more), RouterConfig(unit=unit), make_byte_tokenizer())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in model.routers:
            router.weight.copy_(60 * torch.randn(router.weight.shape, generator=generator))
            router.bias.zero_()
    return model


@pytest.fixture
def model():
    return opinionated()


def prompts(model, texts=TEXTS):
    return [encode_prompt(text, model.tokenizer) for text in texts]


def report_of(model, **more):
    options = {"steps": 4, "batch_size": 5, "progress": False, **more}
    return diagnose(model, prompts(model), **options)


def level(report, name):
    """Return the worst level of the checks of that name."""
    found = [check["level"] for check in report["checks"] if check["name"] == name]
    assert found, f"no check is called {name}"
    return max(found, key=["n/a", "ok", "WARN", "FAIL"].index)


CORRECTNESS = ("no-skip identity", "KV consistency", "layer calls", "same mask alone")


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("prefill", ["skip", "full"])
def test_a_model_that_works_is_sound(unit, prefill):
    report = report_of(opinionated(unit), prefill=prefill)
    assert report["sound"]
    assert {name: level(report, name) for name in CORRECTNESS} == dict.fromkeys(CORRECTNESS, "ok")
    assert level(report, "stuck near 0.5") == level(report, "same mask for every input") == "ok"
    assert report["identity"]["max_abs_difference"] == 0
    assert report["kv"]["routers"]["padded"]
    assert all(run["layers_counted"] == 4 for run in report["kv"].values())
    assert verdicts.table(report).splitlines()[-1].startswith("sound; ")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_model_with_an_adapter_is_compared_with_its_base(model):
    add_adapter(model)
    assert report_of(model)["sound"]


def add_adapter(model):
    from peft import LoraConfig, get_peft_model

    model.base = get_peft_model(
        model.base, LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).eval()


def test_identity_fails_when_routing_changes_a_layer(model, monkeypatch):
    real = Routing._gated
    monkeypatch.setattr(Routing, "_gated", lambda self, layer, *a: real(self, layer, *a) * 1.0001)
    report = report_of(model)
    assert level(report, "no-skip identity") == "FAIL"
    assert not report["sound"]


def test_identity_fails_when_a_router_is_not_a_number(model):
    with torch.no_grad():
        model.routers[2].bias.fill_(float("nan"))
    found = probes.identity(model, prompt_batches(prompts(model), 5, 0, by_length=False))
    assert not found["all_kept"]
    assert verdicts._identity(found).level == "FAIL"


def test_routers_without_weights_are_stuck_near_one_half(model):
    with torch.no_grad():
        for router in model.routers:
            router.weight.zero_()
            router.bias.zero_()
    report = report_of(model)
    assert report["routers"]["near_half"] == 1
    assert level(report, "stuck near 0.5") == "WARN"
    assert report["sound"]


def test_constant_routers_give_the_same_mask_for_every_input(model):
    with torch.no_grad():
        for layer, router in enumerate(model.routers):
            router.weight.zero_()
            router.bias.fill_(3.0 if layer % 2 else -3.0)
    report = report_of(model)
    assert level(report, "same mask for every input") == "WARN"
    assert level(report, "stuck near 0.5") == "ok"
    assert report["routers"]["distinct_masks"] == 1
    assert report["routers"]["mask_entropy"] == 0
    assert report["routers"]["length_correlation"] is None


def test_routers_that_skip_nothing_are_named_so(model):
    with torch.no_grad():
        for router in model.routers:
            router.weight.zero_()
            router.bias.fill_(5.0)
    report = report_of(model)
    assert level(report, "skips that don't become time") == "n/a"
    assert "nothing is skipped" in verdicts.table(report)


def test_quality_is_compared_with_all_layers(model):
    answer = trained_answer(model)
    encoded = [Encoded(ids, answer) for ids in prompts(model)]
    report = diagnose(model, prompts(model), encoded, steps=2, progress=False)
    found = report["quality"]
    assert found["increase"] == pytest.approx(found["ce_routed"] / found["ce_run_all"] - 1)
    assert found["ce_routed"] > 1.5 * found["ce_run_all"]
    assert level(report, "quality below a floor") == "WARN"
    with model.run_all():
        same = mean_loss(model, encoded, RouterPolicy(model.routers), 5)[0]
    assert same == pytest.approx(found["ce_run_all"], rel=1e-5)


def trained_answer(model):
    """Teach the base model one answer, with all layers, and return its token ids."""
    answer = [70, 70, 80, 70, 90, 70, 70, 100, 2]  # what follows 70 takes more than a bigram
    encoded = [Encoded(ids, answer) for ids in prompts(model)]
    optimizer = torch.optim.Adam(model.base.parameters(), lr=0.02)
    inputs = Collator(0)(encoded)
    model.routing.detach()
    for _ in range(100):
        loss = model.base(**{k: v for k, v in inputs.items() if k != "prompt_mask"}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.routing.attach()
    with torch.no_grad():
        for router in model.routers:
            router.bias.fill_(-1e3)
    return answer


def times(routed, rate=0.5):
    steps = {"run_all": [10.0] * 32, "routed": [routed] * 32, "none": [2.0] * 32}
    return {"seconds": steps, "skip_rate": rate}


@pytest.mark.parametrize(("routed", "wanted"), [(6.0, "ok"), (9.0, "WARN"), (10.0, "WARN")])
def test_time_is_judged_against_the_skipped_layer_time(model, monkeypatch, routed, wanted):
    monkeypatch.setattr(probes, "decode_times", lambda *a: times(routed))
    report = report_of(model)
    # Layers take 8 of 10 s; half of them are skipped: 4 s could be saved.
    assert report["time"]["saved_of_ideal"] == pytest.approx((10 - routed) / 4)
    assert level(report, "skips that don't become time") == wanted


def test_skips_that_cost_as_much_as_running_are_seen(monkeypatch):
    model = opinionated(layers=8, hidden=256, heads=8)
    with torch.no_grad():
        for layer, router in enumerate(model.routers):
            router.weight.zero_()
            router.bias.fill_(3.0 if layer % 2 else -3.0)
    assert level(report_of(model), "skips that don't become time") != "WARN"
    real = Routing._gated

    def wasteful(self, layer, state, hidden, original, args, kwargs):
        if not state.in_prefill and isinstance(state.policy, RouterPolicy):
            for _ in range(1 + (not any(state.row_keep(layer)))):
                model.routing.stack.modules[1].mlp(hidden)
                model.routing.stack.modules[1].mlp(hidden)
        return real(self, layer, state, hidden, original, args, kwargs)

    monkeypatch.setattr(Routing, "_gated", wasteful)
    # On a machine that is busy with something else, one timing may be too noisy for a verdict.
    verdicts_seen = (level(report_of(model), "skips that don't become time") for _ in range(6))
    assert next((seen for seen in verdicts_seen if seen != "n/a"), None) == "WARN"


def stock(name):
    """Return what transformers' own cache does, which reads its first layer."""
    return lambda self, *args, **kwargs: getattr(DynamicCache, name)(self, *args, **kwargs)


@pytest.mark.parametrize("name", ["get_mask_sizes", "get_seq_length"])
def test_a_cache_without_the_length_fix_fails(model, monkeypatch, name):
    monkeypatch.setattr(SkipCache, name, stock(name))
    report = report_of(model)
    run = report["kv"]["first and last layer skipped"]
    assert run["relative_difference"] > 10 * verdicts.TOLERANCE["torch.float32"]
    assert level(report, "KV consistency") == "FAIL"
    assert not report["sound"]


def test_a_cache_that_gives_rows_to_the_wrong_prompt_fails(model, monkeypatch):
    real = RoutingState._set_rows

    def turned(self, layer, row_keep, device):
        real(self, layer, row_keep, device)
        if not self.traced and self._rows[layer] is not None:
            self._rows[layer] = self._rows[layer].flip(0)[: max(1, len(self._rows[layer]) - 1)]

    monkeypatch.setattr(RoutingState, "_set_rows", turned)
    report = report_of(model)
    assert level(report, "KV consistency") == "FAIL"
    assert level(report, "layer calls") == "FAIL"


def test_a_skipped_layer_that_runs_anyway_fails(model, monkeypatch):
    real = Routing._gated

    def busy(self, layer, state, hidden, original, args, kwargs):
        rows = state.rows(layer)
        if not state.in_prefill and rows is not None and not len(rows):
            kwargs = {k: v for k, v in kwargs.items() if not isinstance(v, SkipCache)}
            original(*args, **{**kwargs, "attention_mask": None})
            return hidden
        return real(self, layer, state, hidden, original, args, kwargs)

    monkeypatch.setattr(Routing, "_gated", busy)
    report = report_of(model)
    assert level(report, "KV consistency") == "ok"  # the answer is right, and yet
    assert level(report, "layer calls") == "FAIL"
    assert "though every prompt skips it" in verdicts.table(report)


def test_calls_that_are_not_counted_are_seen(model, monkeypatch):
    monkeypatch.setattr(RoutingState, "count_call", lambda self: None)
    report = report_of(model)
    assert level(report, "layer calls") == "FAIL"
    assert "layer_calls says 0" in verdicts.table(report)


def test_a_layer_that_is_fed_the_past_again_is_seen():
    keep = torch.tensor([[True, False]])
    steps = [[[(1, 5)], []], [[(1, 6)], []]]
    (problem,) = kv_probe._call_problems(steps, keep, "skip", 5, [0, 1])
    assert problem == "layer 0 was fed 6 tokens in decode step 1, expected 1"


def test_keys_of_prompts_that_skip_are_seen(model, monkeypatch):
    monkeypatch.setattr(SkipCache, "keep_rows", lambda self, layer: None)
    batch = prompt_batches(prompts(model), 5, 0, by_length=False)[0]
    policy = FixedMask([False, True, True, True])
    # With prefill="full" every layer stores the prompt first, and must then forget it.
    found = kv_probe.cached_against_whole(model, batch, policy, "full", 1)
    assert "layer 0 holds keys and values of 5 prompts, but 0 run it" in found["problems"]


def test_a_mask_that_depends_on_the_batch_fails(model, monkeypatch):
    real = RoutingState.__init__

    def padded_too(self, policy, prompt_mask, *args, **kwargs):
        real(self, policy, torch.ones_like(prompt_mask), *args, **kwargs)

    monkeypatch.setattr(RoutingState, "__init__", padded_too)
    with torch.no_grad():  # so that the length of the mean matters, not only its direction
        for layer, router in enumerate(model.routers):
            router.bias.fill_(1.0 if layer % 2 else -1.0)
    assert level(report_of(model), "same mask alone") == "FAIL"


def test_low_precision_is_judged_in_float32_and_comes_back(model):
    model.base.to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.base.named_parameters()}
    report = report_of(model)
    assert report["sound"]
    assert report["identity"]["max_abs_difference"] == 0
    dtypes = {name: run["dtype"] for name, run in report["kv"].items()}
    assert dtypes.pop("routers, as loaded") == "torch.bfloat16"
    assert set(dtypes.values()) == {"torch.float32"}
    assert report["kv"]["routers"]["relative_difference"] < 1e-4
    for name, parameter in model.base.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])


def test_what_is_said_about_routers_equals_a_count_by_hand():
    logits = torch.tensor([[2.0, -1.0], [2.0, 1.0], [2.0, 1.0], [2.0, -1.0]])
    found = describe_routers(logits, logits >= 0, 0.0, [1, 2, 3, 4])
    assert found["layer_skip_share"] == [0, 0.5]
    assert found["mask_entropy"] == pytest.approx(1)  # two masks, half of the prompts each
    assert found["skip_rate"]["mean"] == 0.25
    assert (found["skip_rate"]["p5"], found["skip_rate"]["p95"]) == (0, 0.5)
    assert found["commonest_mask_share"] == 0.5
    assert found["rho_mean"][0] == pytest.approx(0.8808, abs=1e-4)
    assert found["rho_histogram"][0] == [0] * 8 + [4, 0]
    assert found["rho_histogram"][1] == [0, 0, 2, 0, 0, 0, 0, 2, 0, 0]
    assert found["length_correlation"] == pytest.approx(
        np.corrcoef([0.5, 0, 0, 0.5], np.log([1, 2, 3, 4]))[0, 1]
    )
    shifted = describe_routers(logits - 1, logits - 1 >= 0, -1.0, [1, 2, 3, 4])
    assert shifted["rho_mean"] == pytest.approx(found["rho_mean"])
    assert shifted["threshold"] == pytest.approx(0.7311, abs=1e-4)


def test_a_rate_that_is_missed_is_named(model):
    model.thresholds.table = {"skip": [Threshold(0.1, 1e4, 0.1), Threshold(0.9, 9e3, 0.9)]}
    report = report_of(model, skip_rate=0.5)
    assert level(report, "skip rate") == "WARN"
    assert "missed by more than chance" in verdicts.table(report)


def test_bad_input_is_refused(model):
    with pytest.raises(ConfigError, match="skip_rate=0"):
        report_of(model, skip_rate=0.0)
    with pytest.raises(DataError, match="two prompts"):
        diagnose(model, prompts(model)[:1], progress=False)
    with pytest.raises(DataError, match="context of 512"):
        diagnose(model, [[5] * 500, [6]], progress=False)


def test_the_command_prints_writes_and_returns_its_verdict(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(FirstModel, "from_pretrained", lambda *args, **kwargs: model)
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "completion": " yes"} for text in TEXTS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "report.json"
    words = ["diagnose", "tiny", "--max-new-tokens", "2"]
    assert cli.main(words) == 0
    assert not output.exists()
    words += ["--data", str(data), "--output", str(output), "--limit", "4"]
    assert cli.main(words) == 0
    report = json.loads(output.read_text())
    assert report["sound"] is True
    assert report["quality"]["answers"] == report["routers"]["prompts"] == 4
    assert len(report["provenance"]["data_sha256"]) == 64
    monkeypatch.setattr(RoutingState, "count_call", lambda self: None)
    assert cli.main(words) == 1
    assert "not sound: 1 checks failed" in capsys.readouterr().out
    assert json.loads(output.read_text())["sound"] is False
    assert cli.main([*words, "--data", "/nowhere.jsonl"]) == 2
