# SPDX-License-Identifier: Apache-2.0
"""Several tasks in one artifact: each skips what its metric bears, the asked rate on average."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from training import config, write_run

from firstlm import FirstModel, cli
from firstlm.balance import Curve, TaskSet, _halves, balance, share
from firstlm.calibration import calibrate
from firstlm.config import RouterConfig
from firstlm.data import Encoded, encode_prompt
from firstlm.errors import ConfigError
from firstlm.evaluate import evaluate
from firstlm.examples import Example
from firstlm.importance import start_from_order
from firstlm.metrics import means
from firstlm.policies import RouterPolicy
from firstlm.probes import decide_all
from firstlm.tasks import Task
from firstlm.train import run

LAYERS = 8
LEVELS = [0.125, 0.25, 0.375, 0.5]


def curve(*kept: float) -> Curve:
    return Curve([3.0, 2.0, 1.0, 0.0], [0.1, 0.2, 0.3, 0.4], list(kept))


def test_all_tasks_keep_alike_at_the_asked_rate_on_average():
    hard, easy = curve(0.9, 0.7, 0.4, 0.1), curve(1.0, 0.98, 0.9, 0.85)
    rates = share([hard, easy], 0.25)
    assert sum(rates) / 2 == pytest.approx(0.25, abs=1e-3)
    kept = [_at(rate, part) for rate, part in zip(rates, (hard, easy), strict=True)]
    assert kept[0] == pytest.approx(kept[1], abs=0.01)
    assert rates[0] < 0.15 < 0.35 < rates[1]
    assert share([hard, hard], 0.25) == pytest.approx([0.25, 0.25], abs=1e-3)


def _at(rate: float, found: Curve) -> float:
    """Return what is kept at a rate, on the line between measured ones."""
    i = next(i for i in range(1, 4) if rate <= found.rates[i])
    part = (rate - found.rates[i - 1]) / (found.rates[i] - found.rates[i - 1])
    return found.kept[i - 1] + part * (found.kept[i] - found.kept[i - 1])


def test_a_score_that_rises_by_chance_or_stays_flat_does_no_harm():
    noisy, falling = curve(0.9, 1.2, 0.9, 0.9), curve(0.8, 0.7, 0.6, 0.5)
    rates = share([noisy, falling], 0.25)
    assert rates == pytest.approx([0.4, 0.1], abs=1e-3)
    assert sum(share([noisy, noisy], 0.3)) == pytest.approx(0.6, abs=1e-3)


def test_rates_that_were_not_measured_are_refused():
    with pytest.raises(ConfigError, match=r"0\.10 to 0\.40"):
        share([curve(0.9, 0.8, 0.7, 0.6)] * 2, 0.5)


def prompts(kind: int, count: int, seed: int) -> list[str]:
    """Return prompts in capitals (kind 0) or in small letters (kind 1)."""
    rng = random.Random(seed)
    return [
        "".join(chr(rng.randrange(65 + 32 * kind, 91 + 32 * kind)) for _ in range(12))
        for _ in range(count)
    ]


def example(i: int, prompt: str, reference: str) -> Example:
    return Example(id=str(i), prompt=prompt, completion="x", references=(reference,))


def strict(predictions, references):
    return {"em": means([float(p == r[0]) for p, r in zip(predictions, references, strict=True)])}


def lenient(predictions, references):
    return {"em": means([1.0 for _ in predictions])}


@pytest.mark.parametrize("few", [64, 24])
def test_a_task_that_bears_more_skips_more_and_its_unseen_prompts_too(byte_tokenizer, few):
    base = tiny_llama(layers=LAYERS)
    model = FirstModel.from_base(base, RouterConfig(init_bias=1.0), byte_tokenizer)
    model.eval()
    start_from_order(model, list(range(LAYERS)), 0.25)
    sets = []
    for kind, score, count in ((0, strict, 64), (1, lenient, few)):
        task = Task("qa", "em", True, score)
        asked = [example(i, prompt, "x") for i, prompt in enumerate(prompts(kind, count, kind))]
        full = evaluate(model, asked, "run_all", task=task, max_new_tokens=4, batch_size=64)
        examples = [
            example(i, one.prompt, item["prediction"])  # the full depth is always right
            for i, (one, item) in enumerate(zip(asked, full["items"], strict=True))
        ]
        sets.append(TaskSet(score.__name__, examples, task))
    everything = [encode_prompt(e, byte_tokenizer) for one in sets for e in one.examples]
    calibrate(model, everything, LEVELS, progress=False)
    found = balance(model, sets, 0.25, LEVELS, LEVELS, batch_size=64, max_new_tokens=4)
    assert found[0]["kept"][-1] < 0.5
    assert found[0]["chosen"] < 0.15 < 0.35 < found[1]["chosen"]
    skipped = []
    for i, part in enumerate(found):
        unseen = [encode_prompt(example(0, p, "x"), byte_tokenizer) for p in prompts(i, 64, 10 + i)]
        keep = decide_all(model, unseen, RouterPolicy(model.routers))
        skipped.append(1 - float(keep.float().mean()))
        # Few prompts do not show well what a task looks like; but the average is kept.
        assert skipped[-1] == pytest.approx(part["chosen"], abs=0.04 if few == 64 else 0.08)
        assert part["met"] == pytest.approx(skipped[-1], abs=0.06)
    assert sum(skipped) / 2 == pytest.approx(0.25, abs=0.04)
    assert model.thresholds.offset(0.25, "skip") == pytest.approx(0, abs=1e-6)


def test_prompts_on_one_text_show_the_task_or_are_calibrated_on():
    rows = [Encoded([i], [0]) for i in range(12)]
    texts = [0, 0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 4]
    examples = [
        replace(example(i, "p", "x"), row={"context": str(text)}) for i, text in enumerate(texts)
    ]
    halves = _halves(TaskSet("set", examples, Task("qa", "f1", True, strict)), rows)
    found = [{texts[ids[0]] for ids in half} for half in halves]
    assert not found[0] & found[1]
    assert [len(half) for half in halves] == [6, 6]
    alone = [replace(one, row={"context": "one"}) for one in examples]
    halves = _halves(TaskSet("set", alone, Task("qa", "f1", True, strict)), rows)
    assert [len(half) for half in halves] == [6, 6]


@pytest.fixture
def artifact(tmp_path: Path, byte_tokenizer) -> Path:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(
        tmp_path, model=str(folder), data=str(data), warm_start=4, router_steps=10, lora_steps=2
    )
    assert run(settings) == 0
    return Path(settings.output)


@pytest.fixture
def sets(artifact: Path, tmp_path: Path) -> list[str]:
    """Two files of questions, answered as the artifact does with all layers."""
    model = FirstModel.from_pretrained(str(artifact))
    files = []
    for kind, name in enumerate(("capitals", "letters")):
        asked = [example(i, prompt, "x") for i, prompt in enumerate(prompts(kind, 24, kind))]
        found = evaluate(model, asked, "run_all", max_new_tokens=3, progress=False)["items"]
        rows = [
            {
                "id": one.id,
                "task": "qa",
                "prompt": one.prompt,
                "completion": f" {item['prediction'] or 'x'}",
            }
            for one, item in zip(asked, found, strict=True)
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(map(json.dumps, rows)))
    return [str(file) for file in files]


def test_the_command_writes_another_artifact_that_says_what_was_measured(
    artifact: Path, sets: list[str], tmp_path: Path, capsys
):
    before = {f: f.read_bytes() for f in artifact.rglob("*") if f.is_file()}
    words = ["balance", str(artifact), "--data", *sets, "--skip-rate", "0.2"]
    words += ["--levels", "0.1", "0.3", "--max-new-tokens", "3", "--output", f"{tmp_path}/new/"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "on average (20.0% asked)" in out
    assert {f: f.read_bytes() for f in artifact.rglob("*") if f.is_file()} == before
    model = FirstModel.from_pretrained(str(tmp_path / "new"))
    said = model.training_record["balance"]
    assert [Path(one["data"]).name for one in said["sets"]] == ["capitals.jsonl", "letters.jsonl"]
    assert said["skip_rate"] == 0.2
    assert not list(tmp_path.glob("*.partial"))
    old = FirstModel.from_pretrained(str(artifact))
    assert not torch.equal(model.routers[3].weight, old.routers[3].weight)


def test_what_was_answered_is_not_answered_again(
    artifact: Path, sets: list[str], tmp_path: Path, monkeypatch
):
    words = ["balance", str(artifact), "--data", *sets, "--skip-rate", "0.2"]
    words += ["--levels", "0.1", "0.3", "--max-new-tokens", "3", "--output", str(tmp_path / "new")]

    def full_disk(*_args, **_more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("firstlm.artifact.save", full_disk)
        assert cli.main(words) == 2
    assert len(list(tmp_path.glob("new.?.*.partial"))) == 6
    with monkeypatch.context() as patch:
        patch.setattr(FirstModel, "generate", full_disk)
        assert cli.main(words) == 0


def test_one_set_or_few_rows_are_refused(artifact: Path, sets: list[str], tmp_path: Path, capsys):
    rest = ["--output", str(tmp_path / "new")]
    assert cli.main(["balance", str(artifact), "--data", sets[0], *rest]) == 2
    assert "two or more" in capsys.readouterr().err
    assert cli.main(["balance", str(artifact), "--data", *sets, "--limit", "5", *rest]) == 2
    assert "5 examples; expected 16" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_set_that_scores_nothing_is_refused(
    artifact: Path, sets: list[str], tmp_path: Path, capsys
):
    rows = [
        json.loads(line) | {"completion": "never"} for line in Path(sets[1]).read_text().split("\n")
    ]
    Path(sets[1]).write_text("\n".join(map(json.dumps, rows)))
    words = ["balance", str(artifact), "--data", *sets, "--max-new-tokens", "3"]
    assert cli.main([*words, "--output", str(tmp_path / "new")]) == 2
    assert f"{sets[1]} has f1 0 with all layers" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_levels_that_were_never_calibrated_are_measured_first(
    artifact: Path, sets: list[str], tmp_path: Path
):
    old = FirstModel.from_pretrained(str(artifact)).thresholds
    assert not old.serve([0.7], "skip")
    words = ["balance", str(artifact), "--data", *sets, "--skip-rate", "0.45"]
    words += ["--levels", "0.3", "0.7", "--max-new-tokens", "3", "--output", str(tmp_path / "new")]
    assert cli.main(words) == 0
    new = FirstModel.from_pretrained(str(tmp_path / "new"))
    assert new.training_record["balance"]["sets"][0]["rates"][1] > 0.5
    assert new.thresholds.serve([0.45], "skip")


def test_rates_outside_the_levels_are_refused_before_anything_is_answered(
    artifact: Path, sets: list[str], tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setattr(FirstModel, "generate", lambda *a, **k: pytest.fail("answered"))
    words = ["balance", str(artifact), "--data", *sets, "--output", str(tmp_path / "new")]
    assert cli.main([*words, "--skip-rate", "0.6"]) == 2
    assert "outside the levels 0.1 to 0.4" in capsys.readouterr().err
    assert cli.main([*words, "--task", "translate"]) == 2
    assert "expected one of qa" in capsys.readouterr().err


def test_plain_lora_has_nothing_to_balance(tmp_path: Path, byte_tokenizer, sets: list[str], capsys):
    settings = config(
        tmp_path,
        model=str(tmp_path / "base"),
        data=str(tmp_path / "data.jsonl"),
        output=str(tmp_path / "plain"),
        stage="lora",
        skip_rate=0.0,
        lora_steps=1,
    )
    assert run(settings) == 0
    words = ["balance", settings.output, "--data", *sets, "--output", str(tmp_path / "new")]
    assert cli.main([*words, "--skip-rate", "0.2"]) == 2
    assert "LoRA alone" in capsys.readouterr().err
