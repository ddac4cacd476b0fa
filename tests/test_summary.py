# SPDX-License-Identifier: Apache-2.0
"""What rows of a summary say, and how a report words them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from firstlm import cli
from firstlm.command_config import EvalConfig
from firstlm.config import TrainConfig
from firstlm.data import items_hash, scored_examples
from firstlm.errors import DataError
from firstlm.masks import length_correlation
from firstlm.metrics import Estimate
from firstlm.scored import Arm
from firstlm.sections import gain_text, labelled, metric_text, recomputed
from firstlm.summary import _within, adaptivity, rows, strayed_masks


def test_arms_with_one_policy_are_told_apart():
    def row(arm, policy="first", file="qamr", **more):
        found = {"file": file, "arm": arm, "policy": policy, "lora_of": policy}
        found |= {"unit": "block", "prefill": "skip"}
        return {**found, "model": "m", "dataset": "qamr", "routers_of": "qamr", **more}

    rows = [row("first"), row("full"), row("unified", "unified")]
    names = [name for name, _ in labelled(rows)]
    assert names == ["FiRST (first)", "FiRST (full)", "unified"]
    rows.append(row("first", file="debian"))
    names = [name for name, _ in labelled(rows)]
    assert names == [
        "FiRST (qamr-first)",
        "FiRST (qamr-full)",
        "unified",
        "FiRST (debian-first)",
    ]
    both = row("mixed", routers_of="qamr+news")
    other = row("news", routers_of="news", lora_of=None)
    reused = row("reused", routers_of="news")
    assert [name for name, _ in labelled([both, other, reused])] == [
        "FiRST",
        "FiRST, routers of news, no LoRA",
        "FiRST, routers of news",
    ]
    parts = [row("mlp", unit="mlp"), row("full", prefill="full"), row("first")]
    parts.append(row("skip_decode", "skip_decode", prefill="full"))  # as it always is
    names = [name for name, _ in labelled(parts)]
    assert names == ["FiRST, mlp alone", "FiRST, prompts whole", "FiRST", "skip decode"]


def test_a_layers_correlation_with_length_is_over_seeds():
    """What one seed's layer does by chance, another's does not."""
    short, long = [1, 1, 1], [1, 0, 1]

    def run(masks):
        return {
            "items": [
                {"keep": "".join(map(str, mask)), "prompt_tokens": tokens}
                for mask, tokens in zip(masks, (10, 20), strict=True)
            ]
        }

    up, down = run([short, long]), run([long, short])
    assert adaptivity([up])["layer_length_correlation"] == pytest.approx(1)
    assert adaptivity([down])["layer_length_correlation"] == pytest.approx(-1)
    assert adaptivity([up, down])["layer_length_correlation"] == pytest.approx(0)
    assert adaptivity([up, run([short, short])])["layer_length_correlation"] == pytest.approx(0.5)
    assert adaptivity([run([short, short])])["layer_length_correlation"] is None


def test_rates_that_differ_by_rounding_alone_are_constant():
    lengths = [10, 20, 30]
    rates = [1 - 22 / 30, 8 / 30, 1 - 22 / 30]
    assert rates[0] != rates[1]
    assert length_correlation(rates, lengths) is None
    assert length_correlation([0.1, 0.2, 0.3], lengths) > 0.9


def test_what_token_level_routing_computes_again_is_said():
    row = {"primary": True, "skip_rate": 0.25, "kv_recomputed": None}
    assert recomputed([row]) == ""
    said = recomputed([row, {**row, "kv_recomputed": 0.875}, {**row, "primary": False}])
    assert "88% at 25% skipped" in said


def test_a_report_needs_a_summary(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "firstlm experiment summary" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text('[{"score": 1}]')
    assert cli.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no summary of experiments" in said
    assert "retention_of" in said
    assert not (tmp_path / "report").exists()


def arm(folder, name, right, template=None, tokenizer=None, **train):
    """Return what makes an arm of which so many of four answers are right, by seed."""
    file = folder / "qa" / "test.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True)
        lines = [json.dumps({"prompt": f"{i}?", "completion": f"word{i}"}) for i in range(4)]
        file.write_text("\n".join(lines))
    score = EvalConfig(artifact=name, data=str(file), output="scores.json", template=template)
    known = scored_examples(score.data, score.template, tokenizer)
    reports = {}
    for seed, count in right.items():
        said = [one.references[0] if i < count else "no" for i, one in enumerate(known)]
        items = [
            {"id": one.id, "prediction": text, "keep": "11"}
            for one, text in zip(known, said, strict=True)
        ]
        rate = {"mean": 0.0, "p5": 0.0, "p95": 0.0}
        run = {"policy": "run_all", "count": 4, "items": items, "skip_rate": rate}
        run |= {"prefill": "skip", "asked_skip_rate": None}
        inputs = {"data": str(file), "items_sha256": items_hash(known)}
        reports[seed] = {"inputs": inputs, "runs": {"run_all": run}}
    config = TrainConfig(data=[str(folder / "qa" / "train.jsonl")], output=name, **train)
    return lambda: Arm("file", name, config, score, reports)


def test_what_is_kept_is_against_the_base_of_the_same_seeds(tmp_path):
    plain = arm(tmp_path, "lora", {0: 4, 1: 2}, stage="lora", skip_rate=0.0)()

    def kept(seeds):
        found = rows([plain, arm(tmp_path, "first", seeds, skip_rate=0.25)()])
        return {(r["arm"], r["metric"]): r["retention"] for r in found}["first", "f1"]

    assert kept({0: 2}) == 0.5
    assert kept({1: 2}) == 1.0
    assert kept({0: 2, 1: 2}) == pytest.approx(2 / 3)
    assert kept({0: 2, 2: 2}) == pytest.approx(2 / 3)  # the base has no seed 2: all of its seeds


def test_a_row_is_of_the_seeds_that_have_its_metric(tmp_path):
    found = arm(tmp_path, "first", {0: 2, 1: 2})()
    for rate, report in zip((0.1, 0.3), found.reports.values(), strict=True):
        report["runs"]["run_all"]["skip_rate"] = dict.fromkeys(("mean", "p5", "p95"), rate)
        report["inputs"]["weights"] = f"torch.{'bfloat16' if rate == 0.1 else 'float32'}"
    for item in found.reports[1]["runs"]["run_all"]["items"]:
        item |= {"answer_tokens": 2, "perplexity": 3.0}
    by_metric = {row["metric"]: row for row in rows([found])}
    for metric, rate, formats in (
        ("f1", 0.2, ["bfloat16", "float32"]),
        ("perplexity", 0.3, ["float32"]),
    ):
        row = by_metric[metric]
        assert row["skip_rate"] == pytest.approx(rate)
        assert (row["weights"], row["seeds"]) == (formats, len(formats))
    assert metric_text(by_metric["perplexity"], by_metric["f1"]) == "3.0 (1 seed)"
    assert metric_text(by_metric["em"], by_metric["f1"]) == "50.0"


def test_another_set_of_the_same_name_is_no_reference(tmp_path):
    plain = arm(tmp_path / "a", "lora", {0: 4}, stage="lora", skip_rate=0.0)()
    for folder, kept in (("b", 0.5), ("c", None)):
        file = tmp_path / folder / "qa" / "test.jsonl"
        file.parent.mkdir(parents=True)
        text = (tmp_path / "a" / "qa" / "test.jsonl").read_text()
        file.write_text(text if kept else text.replace("word", "wort"))
        first = arm(tmp_path / folder, "first", {0: 2}, skip_rate=0.25)()
        assert [row["retention"] for row in rows([plain, first]) if row["arm"] == "first"] == [
            kept, kept
        ]  # fmt: skip


def test_two_trainings_of_one_artifact_are_not_compared(tmp_path):
    first = arm(tmp_path, "first", {0: 2}, skip_rate=0.25)()
    tokens = arm(tmp_path, "tokens", {0: 3}, skip_rate=0.25)()
    for one, policy in ((first, "router"), (tokens, "majority_here")):
        one.score = replace(one.score, artifact="runs/file-first-0")
        one.reports[0]["runs"] = {f"{policy}@0.25": one.reports[0]["runs"]["run_all"]}
        one.reports[0]["inputs"]["artifact_sha256"] = "a"
        one.reports[0]["runs"][f"{policy}@0.25"] |= {"policy": policy, "asked_skip_rate": 0.25}
    (gain,) = next(row["gains"] for row in rows([first, tokens]) if row["primary"])
    assert (gain["policy"], gain["mask_of"], gain["same_masks"]) == ("majority_here", "first", 1.0)
    tokens.reports[0]["inputs"]["artifact_sha256"] = "b"
    assert next(row["gains"] for row in rows([first, tokens]) if row["primary"]) == []


def test_what_is_kept_is_against_the_base_of_the_same_model(tmp_path):
    arms = [
        arm(tmp_path, f"lora-{model}", {0: right}, model=model, stage="lora", skip_rate=0.0)()
        for model, right in (("smollm2", 4), ("other", 2))
    ]
    arms.append(arm(tmp_path, "first", {0: 1}, model="other", skip_rate=0.25)())
    assert [r["retention"] for r in rows(arms) if r["metric"] == "f1"] == [1.0, 1.0, 0.5]


def test_answers_are_not_scored_on_data_that_changed(tmp_path):
    make = arm(tmp_path, "lora", {0: 4}, stage="lora", skip_rate=0.0)
    assert make().scores("run_all")["f1"]
    file = tmp_path / "qa" / "test.jsonl"
    file.write_text(file.read_text().replace("word1", "other"))
    with pytest.raises(DataError, match="has changed since"):
        make()


def test_a_template_says_what_the_task_is(tmp_path):
    file = tmp_path / "qa" / "test.jsonl"
    file.parent.mkdir()
    lines = [json.dumps({"source": f"{i}", "target": f"word{i}"}) for i in range(4)]
    file.write_text("\n".join(lines))
    made = arm(tmp_path, "lora", {0: 4}, "summarization", stage="lora", skip_rate=0.0)()
    assert made.task.name == "summarization"


def test_chats_are_summed_up_too(tmp_path, byte_tokenizer):
    file = tmp_path / "qa" / "test.jsonl"
    file.parent.mkdir()
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    byte_tokenizer.save_pretrained(tmp_path / "model")
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": r, "content": c} for r, c in (("user", f"{i}?"), ("assistant", "a"))
                ]
            }
        )
        for i in range(4)
    ]
    file.write_text("\n".join(lines))
    model = str(tmp_path / "model")
    chats = {"tokenizer": byte_tokenizer, "model": model}
    make = arm(tmp_path, "lora", {0: 4}, **chats, stage="lora", skip_rate=0.0)
    assert make().scores("run_all")["f1"][0].items == (1.0,) * 4


def test_a_perplexity_that_is_no_number_leaves_the_other_metrics(tmp_path):
    def metrics(**more):
        made = arm(tmp_path, "lora", {0: 4}, stage="lora", skip_rate=0.0)()
        for item in made.reports[0]["runs"]["run_all"]["items"]:
            item |= {"answer_tokens": 2, **more}
        return [row["metric"] for row in rows([made])]

    assert metrics(perplexity=1.5) == ["em", "f1", "perplexity"]
    assert metrics(perplexity=None) == ["em", "f1"]
    assert metrics() == ["em", "f1"]


def test_below_its_floor_a_base_is_no_measure_in_any_metric(tmp_path):
    plain = arm(tmp_path, "lora", {0: 0}, stage="lora", skip_rate=0.0)()
    for item in plain.reports[0]["runs"]["run_all"]["items"]:
        item |= {"answer_tokens": 2, "perplexity": 3.0}
    assert {row["metric"]: row["retention"] for row in rows([plain])} == {
        "em": None,
        "f1": None,
        "perplexity": None,
    }


def test_a_base_that_is_not_scored_yet_is_no_measure(tmp_path):
    plain = arm(tmp_path, "lora", {0: 4}, stage="lora", skip_rate=0.0)()
    runs = plain.reports[0]["runs"]
    runs["base"] = runs.pop("run_all")
    assert [row["retention"] for row in rows([plain])] == [None, None]


def test_a_model_is_named_as_its_artifact_has_it(tmp_path):
    told, older = arm(tmp_path, "a", {0: 4})(), arm(tmp_path, "b", {0: 4}, model="other")()
    (report,) = told.reports.values()
    report |= {"base_model": "mine", "lora": False}
    assert [row["model"] for row in rows([told, older]) if row["primary"]] == ["mine", "other"]
    assert arm(tmp_path, "c", {0: 4})().model == "smollm2"
    assert [one.lora for one in (told, older)] == [False, True]


def test_the_best_plain_lora_is_what_others_are_held_against(tmp_path):
    """In whatever order arms stand; it is named with what was kept."""
    plain = {"stage": "lora", "skip_rate": 0.0}
    arms = [
        arm(tmp_path, "short", {0: 2}, **plain)(),
        arm(tmp_path, "long", {0: 4}, **plain)(),
        arm(tmp_path, "first", {0: 2}, skip_rate=0.25)(),
    ]
    for order in (arms, arms[::-1]):
        found = {r["arm"]: r for r in rows(order) if r["primary"]}
        assert {r["retention_of"] for r in found.values()} == {"long"}
        assert found["first"]["retention"] == found["short"]["retention"] == 0.5


def routed(made, weights, run, policy, masks):
    """Return an arm whose seeds ran one policy with a mask for each of its four prompts."""
    found = made()
    for report, one in zip(found.reports.values(), weights, strict=True):
        report["inputs"]["weights"] = one
        whole = report["runs"].pop("run_all")
        items = [{**item, "keep": keep} for item, keep in zip(whole["items"], masks, strict=True)]
        changed = {"policy": policy, "asked_skip_rate": 0.5, "items": items}
        report["runs"][run] = {**whole, **changed}
    return found


def test_number_formats_that_differ_are_said(tmp_path):
    plain = arm(tmp_path, "lora", {0: 4, 1: 4}, stage="lora", skip_rate=0.0)()
    for report, weights in zip(plain.reports.values(), ("float32", "bfloat16"), strict=True):
        report["inputs"]["weights"] = f"torch.{weights}"
    masks = ["10"] * 4
    first = routed(
        arm(tmp_path, "file-first-0", {0: 2}), ["float32"], "router@0.5", "router", masks
    )
    other = arm(tmp_path, "file-majority-1", {0: 1}, policy="majority", majority_of="file-first-0")
    other = routed(other, ["bfloat16"], "majority@0.5", "majority", masks)
    plain.name, first.name, other.name = "lora", "first", "majority"
    (row,) = (
        one for one in rows([plain, first, other]) if one["arm"] == "first" and one["primary"]
    )
    assert not row["formats_differ"]  # seed 0 of both is in float32
    assert row["reference_score"] == 100
    (gain,) = row["gains"]
    assert gain["formats_differ"]
    assert gain_text(gain).endswith("number formats differ")
    first.reports[0]["inputs"]["weights"] = "bfloat16"
    (row,) = (
        one for one in rows([plain, first, other]) if one["arm"] == "first" and one["primary"]
    )
    assert row["formats_differ"]
    assert not row["gains"][0]["formats_differ"]


def test_a_majority_mask_that_its_routers_have_no_more_is_named(tmp_path):
    masks = ["10", "10", "01", "10"]
    first = routed(
        arm(tmp_path, "file-first-0", {0: 2}), ["float32"], "majority@0.5", "majority", masks
    )
    other = arm(tmp_path, "file-majority-0", {0: 1}, policy="majority", majority_of="file-first-0")
    other = routed(other, ["float32"], "majority@0.5", "majority", ["01", "10", "10", "10"])
    first.name, other.name = "first", "majority"
    assert strayed_masks([first, other]) == []  # the same two, dealt out otherwise
    for item in other.reports[0]["runs"]["majority@0.5"]["items"]:
        item["keep"] = "01"
    assert strayed_masks([first, other]) == ["majority@0.5 of file-majority-0"]


def test_an_interval_ends_where_its_metric_does():
    wide = Estimate(90.0, -10.0, 120.0, 4)
    assert _within("f1", wide) == [0.0, 100.0]
    assert _within("perplexity", wide) == [0.0, 120.0]
    assert _within("f1", Estimate(50.0, 40.0, 60.0, 4)) == [40.0, 60.0]
