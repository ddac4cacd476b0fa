# SPDX-License-Identifier: Apache-2.0
"""What is measured into an artifact, thresholds and scores: nothing else of it changed or lost."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import config, make_examples, make_model, write_run

from firstlm import FirstModel, cli, scoreboard
from firstlm.calibration import calibrate
from firstlm.choices import Choices
from firstlm.errors import ConfigError, FirstWarning
from firstlm.inputs import pad_left
from firstlm.policies import RouterPolicy
from firstlm.train import run


@pytest.fixture
def artifact(tmp_path: Path, byte_tokenizer) -> tuple[Path, Path]:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(
        tmp_path, model=str(folder), data=str(data), warm_start=4, router_steps=10, lora_steps=2
    )
    assert run(settings) == 0
    return Path(settings.output), data


def test_in_place_only_the_thresholds_change(artifact: tuple[Path, Path]) -> None:
    folder, data = artifact
    weights = {f: load_file(f) for f in folder.rglob("*.safetensors")}
    run_file = (folder / "run.yaml").read_bytes()
    (folder / ".git").mkdir()  # of an artifact that was cloned
    (folder / ".git" / "HEAD").write_text("ref")
    shutil.copytree(folder.parent / "base", folder.parent / "copy")
    before = json.loads((folder / "first_config.json").read_text())
    words = ["calibrate", str(folder), "--data", str(data), "--rates", "0.2", "0.5"]
    assert cli.main([*words, "--model", str(folder.parent / "copy")]) == 0
    assert (folder / ".git" / "HEAD").read_text() == "ref"
    after = json.loads((folder / "first_config.json").read_text())
    assert [row[0] for row in after["thresholds"]["skip"]] == [0.2, 0.5]
    assert before["thresholds"] != after["thresholds"]
    assert {k: v for k, v in after.items() if k != "thresholds"} == {
        k: v for k, v in before.items() if k != "thresholds"
    }
    for file, tensors in weights.items():
        found = load_file(file)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert (folder / "run.yaml").read_bytes() == run_file
    assert FirstModel.from_pretrained(str(folder)).thresholds.offset(0.4, "skip") < 5


def test_rates_far_above_what_was_trained_for_are_served_with_a_warning(
    artifact: tuple[Path, Path],
) -> None:
    model = FirstModel.from_pretrained(str(artifact[0]))
    known = Choices.read(artifact[0], model.base.config.hidden_size)
    for served in (model.policy_for, known.at):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            served(0.29)
        with pytest.warns(FirstWarning, match=r"up to 0\.25, .*--skip-rates"):
            served(0.40)
    with pytest.warns(FirstWarning, match=r"up to 0\.25"):
        known.named("unified", 0.40)


def test_scores_are_recorded_until_other_thresholds_make_them_stale(
    artifact: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    folder, data = artifact
    tensors = {f: f.read_bytes() for f in folder.rglob("*.safetensors")}
    words = ["eval", str(folder), "--data", str(data), "--limit", "4", "--max-new-tokens", "2"]
    assert cli.main([*words, "--skip-rates", "0.25", "--record"]) == 0
    recorded = json.loads((folder / "first_config.json").read_text())["results"]["qa"]
    assert recorded["data"] == f"{data.parent.name}/data.jsonl"
    assert recorded["count"] == 4
    assert (recorded["prefill"], recorded["weights"]) == ("skip", "float32")
    assert set(recorded["runs"]) == {"base", "run_all", "router@0.25"}
    for run_name, scores in recorded["runs"].items():
        assert set(scores) == {"skip_rate", "EM", "F1", "perplexity"}
        assert (scores["skip_rate"] == 0) == (run_name != "router@0.25")
    skipped = recorded["runs"]["router@0.25"]["skip_rate"]
    assert f"| router@0.25 | {skipped:.1%} |" in (folder / "README.md").read_text()
    assert {f: f.read_bytes() for f in tensors} == tensors
    assert (folder / "run.yaml").is_file()
    capsys.readouterr()
    assert cli.main(["inspect", str(folder)]) == 0
    assert "router@0.25" in capsys.readouterr().out
    assert FirstModel.from_pretrained(str(folder)).results["qa"] == recorded
    assert cli.main(["calibrate", str(folder), "--data", str(data), "--rates", "0.2"]) == 0
    assert json.loads((folder / "first_config.json").read_text())["results"] == {}
    assert "router@" not in (folder / "README.md").read_text()


def test_scores_are_not_recorded_into_what_is_no_folder(
    artifact: tuple[Path, Path], capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "smollm2-qa", "--data", str(artifact[1]), "--record"]) == 2
    assert "no local folder" in capsys.readouterr().err


def test_an_artifact_that_is_no_folder_needs_an_output(
    artifact: tuple[Path, Path], capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["calibrate", "smollm2-qa", "--data", str(artifact[1])]) == 2
    assert "--output" in capsys.readouterr().err
    assert not (tmp_path / "smollm2-qa").exists()


def test_routers_that_were_never_trained_are_not_calibrated(
    tmp_path: Path, byte_tokenizer, capsys
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(
        tmp_path, model=str(folder), data=str(data), stage="lora", skip_rate=0.0, lora_steps=2
    )
    assert run(settings) == 0
    capsys.readouterr()
    assert cli.main(["calibrate", settings.output, "--data", str(data), "--rates", "0.2"]) == 2
    assert "were never trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "shown"),
    [("$FIRSTLM_DATA/qa/qamr/test.jsonl.gz", "qamr/test.jsonl.gz"), ("rajpurkar/squad", None)],
)
def test_a_card_names_a_file_by_its_set(source: str, shown: str | None) -> None:
    report = {
        "inputs": {"data": source, "data_sha256": "", "weights": "torch.float32"},
        "options": {"prefill": "skip", "max_new_tokens": 4},
        "runs": {"base": {"count": 1, "skip_rate": {"mean": 0.0}}},
    }
    assert scoreboard.summary(report)["data"] == (shown or source)


def test_rates_between_two_numbers_of_layers_are_served() -> None:
    """Routers that look at no prompt skip whole layers for all: 0, 1/8, 2/8 ..."""
    model = make_model()
    with torch.no_grad():
        for i, router in enumerate(model.routers):
            router.weight.zero_()
            router.bias.fill_(1.0 + 0.1 * i)
    prompts = [example.prompt_ids for example in make_examples(16, 0)]
    calibrate(model, prompts, [0.10, 0.28])
    ids, mask = pad_left(prompts, model.pad_id)
    for prefill in ("skip", "full"):
        for rate in (0.10, 0.28):
            keep = model.decide(ids, mask, skip_rate=rate, prefill=prefill).keep
            assert float((~keep).float().mean()) == pytest.approx(rate, abs=0.125)


def disagreeing() -> tuple[FirstModel, list[list[int]]]:
    """Return a model whose routers say something else to each of some prompts, and those."""
    model = make_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in model.routers:
            router.weight.copy_(20 * torch.randn(router.weight.shape, generator=generator))
    return model, [example.prompt_ids for example in make_examples(24, 0)]


@pytest.mark.parametrize("prefill", ["skip", "full"])
def test_the_layers_most_prompts_skip_are_kept_in_mind(prefill: str) -> None:
    model, prompts = disagreeing()
    calibrate(model, prompts, [0.2, 0.4])
    ids, mask = pad_left(prompts, model.pad_id)
    for row in model.thresholds.table[prefill]:
        policy = RouterPolicy(model.routers, row.offset)
        share = (~model.decide(ids, mask, policy, prefill=prefill).keep).double().mean(0)
        assert row.skipped == pytest.approx(share.tolist(), abs=1e-4)
        assert sum(row.skipped) / len(row.skipped) == pytest.approx(row.rate, abs=1e-3)
        order = model.thresholds.majority(row.rate, prefill)
        assert sorted(order) == list(range(model.layer_count))
        assert share[order].tolist() == sorted(share.tolist(), reverse=True)
    with pytest.raises(ConfigError, match="firstlm calibrate"):
        make_model().thresholds.majority(0.2, prefill)


def test_no_prompt_is_run_twice_with_one_mask(monkeypatch) -> None:
    model, prompts = disagreeing()
    runs, decide = [], model.decide

    def noted(ids, mask, policy, **more):
        state = decide(ids, mask, policy, **more)
        for row, real, keep in zip(ids, mask, state.keep, strict=True):
            runs.append((tuple(row[real.bool()].tolist()), tuple(keep.tolist())))
        return state

    monkeypatch.setattr(model, "decide", noted)
    calibrate(model, prompts, [0.1, 0.2, 0.3, 0.4, 0.5], ["skip"], batch_size=5)
    assert len(set(runs)) > 2 * len(set(map(tuple, prompts)))  # of several masks each
    assert len(runs) <= len(set(runs)) + len(prompts) - len(set(map(tuple, prompts)))
