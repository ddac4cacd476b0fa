# SPDX-License-Identifier: Apache-2.0
"""Experiment files: every arm and seed trained and scored once, in slices, and clear refusals."""

from __future__ import annotations

import base64
import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from training import write_run

from firstlm import FirstModel, cli, evaluate, experiment, summary
from firstlm.errors import ConfigError
from firstlm.figures import curves, swept
from firstlm.matrix import jobs_of
from firstlm.scoreboard import read

FILE = """
data: {data}
train: {{model: {model}, skip_rate: 0.34, batch_size: 8, lora_steps: 2, tensorboard: false}}
eval: {{max_new_tokens: 2, limit: 4, task: qa, skip_rates: [0.34], timed: 2}}
arms:
  first:
    seeds: [0, 1]
    train: {{router_steps: 2, warm_start: 4}}
    eval: {{policies: [base, run_all, router, majority]}}
  majority:
    train: {{policy: majority, majority_of: "arm:first"}}
    eval: {{policies: [majority]}}
"""
JOBS = ["tiny-first-0", "tiny-first-1", "tiny-majority-0"]


@pytest.fixture
def words(tmp_path: Path, byte_tokenizer, monkeypatch) -> list[str]:
    """Words of a command line for an experiment file over a tiny model and data set."""
    monkeypatch.setattr(summary, "LOWEST", {})  # a few steps teach this model nothing
    model, rows = write_run(tmp_path, byte_tokenizer)
    data = tmp_path / "set"
    data.mkdir()
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(rows.read_text())
    folder = tmp_path / "experiments"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(FILE.format(data=data, model=model))
    places = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return ["experiment", "run", str(folder), *places]


def results(words: list[str]) -> dict[str, list[str]]:
    folder = Path(words[words.index("--results") + 1])
    found = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    return {name: list(report["runs"]) for name, report in sorted(found.items())}


def test_every_arm_and_seed_is_trained_and_scored_once(words, capsys, monkeypatch, tmp_path):
    assert cli.main(words) == 0
    ours = ["base", "run_all", "router@0.34", "majority@0.34"]
    assert results(words) == dict(zip(JOBS, [ours, ours, ["majority@0.34"]], strict=True))
    made = FirstModel.from_pretrained(str(tmp_path / "runs" / "tiny-majority-0")).baseline
    known = FirstModel.from_pretrained(str(tmp_path / "runs" / "tiny-first-0")).thresholds
    assert made is not None
    assert list(made.orders[0][1]) == known.majority(0.34, "skip")
    seeds = [
        json.loads((tmp_path / "runs" / job / "first_config.json").read_text())["training"]["run"]
        for job in JOBS
    ]
    assert [run["seed"] for run in seeds] == [0, 1, 0]
    for work in ("make", "evaluate"):
        monkeypatch.setattr(experiment.Job, work, lambda self: pytest.fail(f"{self.name} again"))
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main([words[0], "list", *words[2:]]) == 0
    assert capsys.readouterr().out.split() == [part for job in JOBS for part in (job, "scored")]


def test_the_summary_has_a_row_per_policy_and_rate_over_all_seeds(words, capsys):
    file = Path(words[2]) / "tiny.yaml"
    plain = "  lora: {train: {stage: lora, skip_rate: 0.0}, eval: {policies: [run_all]}}\n"
    file.write_text(file.read_text() + plain)
    assert cli.main([*words, "--only", "tiny-first-0", "tiny-lora-0"]) == 0
    assert cli.main([words[0], "summary", *words[2:]]) == 0
    assert "2 of 4 are not (all) scored yet: tiny-first-1, tiny-majority" in capsys.readouterr().out
    assert cli.main(words) == 0
    assert cli.main([words[0], "summary", *words[2:]]) == 0
    assert "not (all) scored" not in capsys.readouterr().out
    folder = Path(words[words.index("--results") + 1])
    found = json.loads((folder / "summary.json").read_text())
    kinds = [(r["policy"], r["lora"], r["lora_of"], r["skip_rate_asked"]) for r in found[::3]]
    assert kinds == [
        ("base", False, None, 0.0),
        ("first", True, "first", 0.0),
        ("first", True, "first", 0.34),
        ("majority", True, "first", 0.34),
        ("majority", True, "majority", 0.34),
        ("base", True, "base", 0.0),
    ]
    assert [row["metric"] for row in found] == ["em", "f1", "perplexity"] * 6
    ratios = [row["tpot_ratio"] for row in found[1::3]]
    assert all(0 < ratio < 3 for ratio in ratios)
    assert ratios[2] + ratios[4] < ratios[1] + ratios[5]  # 2 of 6 layers are skipped
    assert {row["primary"] for row in found[1::3]} == {True}
    assert [row["seeds"] for row in found[1::3]] == [2, 2, 2, 2, 1, 1]
    reports = [json.loads((folder / f"{job}.json").read_text()) for job in JOBS[:2]]
    scores = [report["runs"]["router@0.34"]["f1"]["value"] for report in reports]
    assert found[7]["by_seed"] == pytest.approx(scores)
    assert found[7]["score"] == pytest.approx(sum(scores) / 2)
    assert found[7]["retention"] is None  # plain LoRA has an F1 under 20 here
    majority = json.loads((folder / f"{JOBS[2]}.json").read_text())
    gains = {(g["policy"], g["lora_of"]): g for g in found[7]["gains"]}
    assert set(gains) == {("majority", "first"), ("majority", "majority")}
    for at, key in ((10, ("majority", "first")), (13, ("majority", "majority"))):
        gain = gains[key]
        assert gain["value"] == pytest.approx(found[7]["score"] - found[at]["score"])
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert gain["mask_of"] == "first"
        seeds = range(gain["seeds"])  # majority was scored with one seed of the two
        ours, theirs = (
            [r["runs"][run]["skip_rate"]["mean"] for r in by_seed]
            for run, by_seed in (
                ("router@0.34", reports[: len(seeds)]),
                ("majority@0.34", reports if at == 10 else [majority]),
            )
        )
        above = sum(ours) / len(ours) - sum(theirs) / len(theirs)
        assert gain["skip_rate_above"] == pytest.approx(above)
        keeps = [
            [item["keep"] for report in by_seed for item in report["runs"][run]["items"]]
            for run, by_seed in (
                ("router@0.34", reports[: len(seeds)]),
                ("majority@0.34", reports if at == 10 else [majority]),
            )
        ]
        same = [one == two for one, two in zip(*keeps, strict=True)]
        assert gain["same_masks"] == pytest.approx(sum(same) / len(same))
    assert not any(row["gains"] for row in [*found[:7], *found[8:]])
    losses = [report["runs"]["router@0.34"]["perplexity"]["value"] for report in reports]
    assert found[8]["by_seed"] == pytest.approx(losses, rel=1e-3)
    assert found[8]["retention"] == pytest.approx(found[-1]["score"] / found[8]["score"])
    for report in reports:
        counts = report["runs"]["router@0.34"]["rho_histogram"]
        assert [sum(layer) for layer in counts] == [4] * 6
        assert "rho_histogram" not in report["runs"]["majority@0.34"]
        below = [sum(layer[:10]) / 4 for layer in counts]
        assert below == report["runs"]["router@0.34"]["layer_skip_share"]
        assert [step for step, _ in report["training"]["lora"]["curve"]["eval_loss"]] == [0, 2]
    see_the_report(folder, found, capsys)
    kept = (folder / f"{JOBS[0]}.json").read_text()
    (folder / f"{JOBS[0]}.json").write_text(
        kept.replace(reports[0]["runs"]["base"]["items"][0]["id"], "q9")
    )
    assert cli.main([words[0], "summary", *words[2:]]) == 2
    assert "was scored on other items" in capsys.readouterr().err
    (folder / f"{JOBS[0]}.json").write_text(kept)
    Path(json.loads((folder / f"{JOBS[0]}.json").read_text())["inputs"]["data"]).write_text(
        '{"prompt": "a", "completion": "b"}\n'
    )
    assert cli.main([words[0], "summary", *words[2:]]) == 2
    assert capsys.readouterr().err.count("than its file has now (data)") == 4  # all at once


def see_the_report(folder: Path, rows: list[dict], capsys) -> None:
    """The page holds every score and its pictures, and asks no other machine for anything."""
    assert cli.main(["report", str(folder)]) == 0
    assert "with 6 pictures" in capsys.readouterr().out
    page = (folder / "report" / "index.html").read_text()
    pictures = {file.stem: file.read_bytes() for file in (folder / "report").glob("*.png")}
    assert set(pictures) == {
        "quality-tiny-set",
        "time-tiny-set",
        "layers-tiny-first-0-router-0.34",
        "outputs-tiny-first-0-router-0.34",
        "masks-tiny-set",
        "training-tiny-set",
    }
    inside = [base64.b64decode(code) for code in re.findall(r"base64,([^\"]+)", page)]
    assert sorted(inside) == sorted(pictures.values())
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in inside)
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    for row in rows:
        assert f"<td>{row['score']:.1f}</td>" in page
    for name in ("FiRST", "majority, LoRA of FiRST", "base + LoRA, all layers", "Beside the paper"):
        assert name in page


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "qa", "runs": {"router@0.25": {}}}'])
def test_a_file_that_holds_no_results_is_named(words, capsys, text):
    folder = Path(words[words.index("--results") + 1])
    folder.mkdir()
    (folder / "tiny-first-0.json").write_text(text)
    for action, code in (("list", 0), ("run", 1), ("summary", 2)):
        only = [] if action == "summary" else ["--only", "tiny-first-0"]
        assert cli.main(["experiment", action, *words[2:], *only]) == code
        said = capsys.readouterr()
        assert "tiny-first-0.json holds no results of `firstlm eval`" in (said.out or said.err)


def test_jobs_can_be_picked(words):
    assert cli.main([*words, "--only", "tiny-first-1"]) == 0
    assert list(results(words)) == ["tiny-first-1"]
    assert cli.main([*words, "--only", "tiny-fir"]) == 2


@pytest.mark.parametrize("ignored", [False, True])
def test_time_that_is_up_ends_it_and_the_same_command_goes_on(words, monkeypatch, capsys, ignored):
    """As in the background too, where shells let jobs ignore Ctrl-C."""
    real = evaluate._answer

    def slow(*arguments):
        time.sleep(3)
        return real(*arguments)

    before = signal.getsignal(signal.SIGINT)
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # hypothesis listens to it, and an interrupt within its callback is lost
    try:
        only = ["--only", "tiny-first-0"]
        assert cli.main([*words, *only, "--minutes", "0.0001"]) == 0
        assert "1 of 1 are left" in capsys.readouterr().out
        assert results(words) == {}
        assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) == ignored
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)
    assert cli.main([*words, *only]) == 0
    assert list(results(words)) == ["tiny-first-0"]
    Path(words[words.index("--results") + 1], "tiny-first-0.json").unlink()
    monkeypatch.setattr(evaluate, "_answer", slow)
    assert cli.main([*words, *only, "--minutes", "0.05"]) == 0
    assert "1 of 1 are left" in capsys.readouterr().out


MIXED = """
data: {data}
train: {{model: {model}, skip_rate: 0.34, batch_size: 8, lora_steps: 1}}
eval: {{max_new_tokens: 2, limit: 4, task: qa, skip_rates: [0.34], policies: [router]}}
arms:
  mix: {{data: [{data}, {other}], test: {data}, train: {{warm_start: 0, router_steps: 1}}}}
  mix_other: {{train: "arm:mix", test: {other}}}
  lora_other:
    data: {other}
    train: {{stage: lora, skip_rate: 0.0}}
    eval: {{policies: [run_all]}}
"""


BALANCED = """
data: {data}
train: {{model: {model}, skip_rate: 0.34, batch_size: 16, lora_steps: 30, lora_lr: 0.02}}
eval: {{max_new_tokens: 2, limit: 4, task: qa, skip_rates: [0.34], policies: [router]}}
arms:
  mix: {{data: [{data}, {other}], test: {data}, train: {{warm_start: 2, router_steps: 1}}}}
  balanced:
    test: {data}
    train: "arm:mix"
    balance: {{limit: 16, levels: [0.1, 0.4], max_new_tokens: 2}}
  balanced_other: {{train: "arm:balanced", test: {other}}}
"""


def test_an_arm_scores_what_balancing_makes_of_another(words, tmp_path, capsys):
    data, other = tmp_path / "set", tmp_path / "other"
    other.mkdir()
    base = tiny_llama(layers=6)
    base.lm_head.weight.data.mul_(20)  # logits that can be sure
    base.save_pretrained(tmp_path / "base")
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        for folder, turned in ((data, 1), (other, -1)):  # a constant answer is soon learnt
            lines = [{"prompt": row["prompt"][::turned], "completion": "n"} for row in rows]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file = Path(words[2]) / "tiny.yaml"
    file.write_text(BALANCED.format(data=data, other=other, model=tmp_path / "base"))
    assert cli.main([*words, "--only", "tiny-balanced_other"]) == 0  # makes what it needs
    runs, folder = tmp_path / "runs", tmp_path / "results"
    assert sorted(f.name for f in runs.glob("tiny-*-0")) == ["tiny-balanced-0", "tiny-mix-0"]
    assert cli.main(words) == 0
    reports = {f.stem: json.loads(f.read_text()) for f in folder.glob("tiny-*.json")}
    hashes = {name: report["inputs"]["artifact_sha256"] for name, report in reports.items()}
    assert hashes["tiny-balanced-0"] == hashes["tiny-balanced_other-0"] != hashes["tiny-mix-0"]
    said = reports["tiny-balanced_other-0"]["training"]["balance"]
    assert [one["data"] for one in said["sets"]] == [
        str(d / "validation.jsonl") for d in (data, other)
    ]
    capsys.readouterr()
    assert cli.main([words[0], "list", *words[2:]]) == 0
    assert capsys.readouterr().out.count(" scored\n") == 3
    file.write_text(file.read_text().replace("[0.1, 0.4]", "[0.2, 0.4]"))
    assert cli.main([words[0], "list", *words[2:]]) == 0
    assert capsys.readouterr().out.count("made with other options: levels") == 2
    text = file.read_text().replace("[0.2, 0.4]", "[0.1, 0.4]")
    file.write_text(re.sub(" +balance: .*\n", "", text).replace('"arm:balanced"', '"arm:mix"'))
    assert cli.main([words[0], "list", *words[2:]]) == 0
    assert capsys.readouterr().out.count("made with other options: balance") == 2
    file.write_text(text)
    mended = runs / "tiny-mix-0" / "first_config.json"
    config = json.loads(mended.read_text())
    config["thresholds"]["skip"] = config["thresholds"]["skip"][1:]
    mended.write_text(json.dumps(config))
    assert cli.main([words[0], "list", *words[2:]]) == 0
    assert capsys.readouterr().out.count("with another tiny-mix-0 than is there now") == 2


def test_an_arm_trains_on_several_sets_and_is_scored_on_each(words, tmp_path):
    data, other = tmp_path / "set", tmp_path / "other"
    other.mkdir()
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        text = "".join(
            json.dumps({"prompt": row["prompt"][::-1], "completion": "no"}) + "\n" for row in rows
        )
        (other / f"{split}.jsonl").write_text(text)
    file = Path(words[2]) / "tiny.yaml"
    model = tmp_path / "base"
    file.write_text(MIXED.format(data=data, other=other, model=model))
    assert cli.main(words) == 0
    runs, folder = tmp_path / "runs", tmp_path / "results"
    trained = [f.name for f in runs.glob("tiny-*") if not f.name.endswith("-run")]
    assert sorted(trained) == ["tiny-lora_other-0", "tiny-mix-0"]
    config = json.loads((runs / "tiny-mix-0" / "first_config.json").read_text())["training"]
    assert config["run"]["data"] == [f"{data}/train.jsonl", f"{other}/train.jsonl"]
    assert len(config["provenance"]["data"]["train"].split()) == 2
    results = [
        json.loads((folder / f"tiny-{arm}-0.json").read_text()) for arm in ("mix", "mix_other")
    ]
    hashes = [report["inputs"]["artifact_sha256"] for report in results]
    assert hashes[0] == hashes[1]
    assert results[0]["inputs"]["data_sha256"] != results[1]["inputs"]["data_sha256"]
    assert cli.main([words[0], "summary", *words[2:]]) == 0
    rows = [
        r for r in json.loads((folder / "summary.json").read_text()) if r["metric"] == "perplexity"
    ]
    assert [(r["dataset"], r["trained_on"]) for r in rows] == [
        ("set", "set+other"),
        ("other", "set+other"),
        ("other", "other"),
    ]
    assert [r["retention"] is None for r in rows] == [True, False, False]  # no plain LoRA on "set"
    drawn = curves({f.stem: read(f) for f in folder.glob("tiny-*.json")})
    arms = {str(section): list(found) for section, found in drawn.items()}
    assert arms == {"tiny-set": ["mix"], "tiny-other": ["lora_other"]}


def test_shares_are_of_the_same_items_only(words):
    """Plain LoRA on another number of them is no reference, and no mistake either."""
    file = Path(words[2]) / "tiny.yaml"
    plain = "train: {stage: lora, skip_rate: 0.0}, eval: {policies: [run_all], limit: 3}"
    file.write_text(file.read_text() + f"  lora: {{{plain}}}\n")
    assert cli.main([*words, "--only", "tiny-first-0", "tiny-lora"]) == 0
    assert cli.main([words[0], "summary", *words[2:]]) == 0
    folder = Path(words[words.index("--results") + 1])
    rows = json.loads((folder / "summary.json").read_text())
    kept = {(r["arm"], r["n_test"]): r["retention"] for r in rows if r["metric"] == "perplexity"}
    assert kept == {("first", 4): None, ("lora", 3): pytest.approx(1)}


def test_a_file_like_another_differs_where_it_says_so(words):
    folder = Path(words[2])
    (folder / "more.yaml").write_text(
        "like: tiny.yaml\ntrain: {lora_steps: 9}\neval: {limit: 2}\narms: [first]\n"
    )
    before, after = (
        {job.name: job for job in jobs_of(folder / f"{name}.yaml", "runs", "results")}
        for name in ("tiny", "more")
    )
    assert list(after) == ["more-first-0", "more-first-1"]
    one, other = before["tiny-first-1"], after["more-first-1"]
    assert (other.train.lora_steps, other.score.limit) == (9, 2)
    changed = {"lora_steps": 9, "output": "runs/more-first-1"}
    assert other.train == replace(one.train, **changed)
    assert other.score == replace(
        one.score, limit=2, artifact="runs/more-first-1", output="results/more-first-1.json"
    )
    own = f"own: {{test: {folder}, eval: {{policies: [base]}}}}"
    (folder / "more.yaml").write_text(f"like: tiny.yaml\narms: [first, {own}]\n")
    jobs = jobs_of(folder / "more.yaml", "runs", "results")
    assert [job.name for job in jobs] == ["more-first-0", "more-first-1", "more-own-0"]
    assert [Path(job.score.data).parent for job in jobs[1:]] == [folder.parent / "set", folder]
    (folder / "more.yaml").write_text("like: tiny.yaml\narms: [second]\n")
    for wrong, says in (
        ("[second]", "takes the arm 'second', but"),
        ("[first, {first: {seeds: [4]}}]", "lists the arm 'first' twice"),
        ("[[first]]", r"lists \['first'\] among its arms; expected the name of an arm of"),
        ("[{a: {}, b: {}}]", "expected the name of an arm"),
    ):
        (folder / "more.yaml").write_text(f"like: tiny.yaml\narms: {wrong}\n")
        with pytest.raises(ConfigError, match=says):
            jobs_of(folder / "more.yaml", "runs", "results")
    (folder / "base.yaml").write_text(
        (folder / "tiny.yaml").read_text().split("arms:")[0] + "arms: [first]\n"
    )
    (folder / "more.yaml").write_text("like: base.yaml\narms: [first]\n")
    with pytest.raises(ConfigError, match=r"base\.yaml: arms is .'first'.; expected names with"):
        jobs_of(folder / "more.yaml", "runs", "results")


def test_a_sweep_has_a_picture(words, tmp_path, capsys):
    file = Path(words[2]) / "tiny.yaml"
    head = file.read_text().split("arms:")[0].replace("lora_steps: 2", "router_steps: 1")
    arms = [
        f"  a{i}: {{train: {{stage: routers, skip_rate: null, warm_start: 0, alpha: {alpha}, "
        f"l2: {l2}}}, eval: {{policies: [router], skip_rates: null}}}}\n"
        for i, (alpha, l2) in enumerate([(0.0, 0.01), (0.1, 0.01), (1.0, 0.01), (0.1, 0.5)])
    ]
    file.write_text(head + "arms:\n" + "".join(arms))
    assert cli.main(words) == 0
    assert cli.main([words[0], "summary", *words[2:]]) == 0
    folder = tmp_path / "results"
    rows = [r for r in json.loads((folder / "summary.json").read_text()) if r["primary"]]
    assert [(r["alpha"], r["l2"]) for r in rows] == [(0, 0.01), (0.1, 0.01), (1, 0.01), (0.1, 0.5)]
    assert {r["skip_rate_asked"] for r in rows} == {None}
    assert [r["alpha"] for r in swept(rows, "alpha")] == [0, 0.1, 1]
    assert swept(rows, "l2") == []
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report" / "alpha-tiny-set.png").is_file()
    assert not (folder / "report" / "l2-tiny-set.png").exists()


def test_processes_share_a_matrix(words, monkeypatch, capsys):
    """What another process holds is left to it, and what needs that waits."""
    monkeypatch.setattr(experiment, "WAIT_S", 0.05)
    command = [sys.executable, "-m", "firstlm", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = [other.stdout.readline()]
        assert theirs == ["tiny-first-0: training\n"]
        assert cli.main(words) == 0
        theirs += other.stdout.readlines()
    assert other.returncode == 0
    ours = capsys.readouterr().out
    assert ours.startswith("tiny-first-1: training\n")
    said = [line.strip() for line in [*theirs, *ours.splitlines()]]
    for what in ("training", "scoring"):
        assert sorted(said.count(f"{job}: {what}") for job in JOBS) == [1, 1, 1]
    assert any(line.startswith("Waiting for other processes: tiny-") for line in said)
    assert list(results(words)) == JOBS


def test_results_alone_do_not_stand_in_the_way_of_what_takes_an_artifact(words, capsys):
    """Other options of scoring leave the artifact as good as it was."""
    assert cli.main([*words, "--only", "tiny-first-0"]) == 0
    file = Path(words[2]) / "tiny.yaml"
    again = '  again: {train: "arm:first", eval: {policies: [run_all]}}\n'
    file.write_text(file.read_text().replace("router, majority]}", "router], limit: 3}") + again)
    capsys.readouterr()
    assert cli.main([*words, "--only", "tiny-first-0", "tiny-majority", "tiny-again"]) == 1
    said = capsys.readouterr().out
    assert "tiny-first-0: its results were made with other options" in said
    (removed,) = re.findall(r"rm -rf (.*?)\)", said)
    assert [Path(path).name for path in removed.split()] == ["tiny-first-0.json"]
    assert list(results(words)) == ["tiny-again-0", "tiny-first-0", "tiny-majority-0"]
    file.write_text(file.read_text().replace("router_steps: 2", "router_steps: 3"))
    assert cli.main([*words, "--only", "tiny-again"]) == 1
    said = capsys.readouterr().out
    assert re.search("tiny-again-0: .*/tiny-first-0, which it scores, was made with other", said)
    assert "rm -rf" not in said


def test_what_fails_in_scoring_is_there_for_others(words, monkeypatch, capsys):
    real = experiment.Job.evaluate

    def fails(self):
        if self.arm == "first":
            raise ConfigError("no")
        real(self)

    monkeypatch.setattr(experiment.Job, "evaluate", fails)
    assert cli.main([*words, "--only", "tiny-first-0", "tiny-majority"]) == 1
    assert list(results(words)) == ["tiny-majority-0"]
    assert "tiny-first-0: ConfigError: no" in capsys.readouterr().out


def test_what_a_job_needs_is_trained_for_it(words):
    assert cli.main([*words, "--only", "tiny-majority"]) == 0
    assert list(results(words)) == ["tiny-majority-0"]
    runs = Path(words[words.index("--runs") + 1])
    assert sorted(f.name for f in runs.glob("tiny-*") if not f.name.endswith("-run")) == [
        "tiny-first-0",
        "tiny-majority-0",
    ]


def test_what_was_made_with_other_options_is_not_taken_for_done(words, capsys):
    assert cli.main([*words, "--only", "tiny-first-0"]) == 0
    file = Path(words[2]) / "tiny.yaml"
    before = file.read_text()
    for old, new, named in (
        ("router_steps: 2", "router_steps: 3", "router_steps"),
        ("max_new_tokens: 2", "max_new_tokens: 3", "max_new_tokens"),
    ):
        file.write_text(before.replace(old, new))
        capsys.readouterr()
        assert cli.main([*words, "--only", "tiny-first-0", "tiny-majority"]) == 1
        said = capsys.readouterr()
        made = named == "router_steps"
        what = "its artifact was" if made else "its results were"
        wrong = rf"made with other options .*\({named}\)\. Remove .*\(rm -rf .*tiny-first-0.json"
        assert re.search(rf"^tiny-first-0 failed: {what} {wrong}", said.err, re.M)
        needs = "  tiny-majority-0: needs tiny-first-0, but that was made with other options"
        assert (needs in said.out) == made
        assert list(results(words)) == ["tiny-first-0", "tiny-majority-0"][: 1 + (not made)]
        assert cli.main([words[0], "summary", *words[2:]]) == 2
        assert "These cannot be summed up:\n  tiny-first-0: its " in capsys.readouterr().err
        assert cli.main([words[0], "list", *words[2:]]) == 0
        assert f"made with other options: {named}" in capsys.readouterr().out
    other = file.parent / "other"
    shutil.copytree(file.parent.parent / "set", other)
    file.write_text(before.replace("  first:\n", f"  first:\n    test: {other}\n"))
    assert cli.main([words[0], "list", *words[2:]]) == 0
    assert re.search("^tiny-first-0 +made with other options: data$", capsys.readouterr().out, re.M)
    file.write_text(before.replace("tensorboard: false", "tensorboard: false, logging_steps: 7"))
    assert cli.main([*words, "--only", "tiny-first"]) == 0


def test_a_matrix_whose_number_format_is_up_to_the_machine_goes_on_elsewhere(words, capsys):
    file = Path(words[2]) / "tiny.yaml"
    before = file.read_text()

    def in_format(dtype: str) -> None:
        both = before.replace("{model:", f"{{dtype: {dtype}, model:")
        file.write_text(both.replace("eval: {max", f"eval: {{dtype: {dtype}, max"))

    in_format("bfloat16")
    assert cli.main([*words, "--only", "tiny-first-0"]) == 0
    in_format("auto")
    assert cli.main([*words, "--only", "tiny-first-0"]) == 0
    in_format("float32")
    assert cli.main([*words, "--only", "tiny-first-0"]) == 1
    assert "(dtype)" in capsys.readouterr().err
    both = before.replace("run_all, router", "run_all, random, router")
    before = both  # more is asked of a file than it has, which is not added in another format
    in_format("auto")
    assert cli.main([*words, "--only", "tiny-first-0"]) == 1
    assert "(dtype)" in capsys.readouterr().err
    assert cli.main([words[0], "summary", *words[2:]]) == 0


def test_an_artifact_made_anew_is_noticed_by_what_took_it(words, capsys, tmp_path):
    assert cli.main([*words, "--only", "tiny-majority"]) == 0
    file = Path(words[2]) / "tiny.yaml"
    for warm_start, last in ((4, "scored"), (0, "with another tiny-first-0 than is there")):
        if last != "scored":
            for folder in (tmp_path / "runs").glob("tiny-first-0*"):
                shutil.rmtree(folder)
            file.write_text(file.read_text().replace("warm_start: 4", f"warm_start: {warm_start}"))
            assert cli.main([*words, "--only", "tiny-first-0"]) == 0
        capsys.readouterr()
        assert cli.main([words[0], "list", *words[2:], "--only", "tiny-majority"]) == 0
        said = capsys.readouterr().out
        assert last in said
        assert ("another" in said) == ("another" in last)


def test_a_damaged_artifact_or_place_for_results_is_said_before_anything_is_trained(words, capsys):
    folder = Path(words[4], "tiny-first-0")
    folder.mkdir(parents=True)
    (folder / "first_config.json").write_text("{")
    assert cli.main([words[0], "list", *words[2:]]) == 0
    said = capsys.readouterr().out
    assert "cannot be read: " in said
    assert "tiny-first-1 " in said
    assert cli.main([*words, "--only", "tiny-first"]) == 1
    assert list(results(words)) == ["tiny-first-1"]
    assert "tiny-first-0: " in capsys.readouterr().out
    file = Path(words[4], "file")
    file.write_text("")
    assert cli.main([*words[:4], str(file.parent / "empty"), "--results", str(file)]) == 2
    said = capsys.readouterr()
    assert "training" not in said.out
    assert "Not a directory" in said.err


def test_gradients_are_on_again_after_an_interrupt(words, monkeypatch):
    def stuck(self):
        torch.set_grad_enabled(False)
        time.sleep(30)

    monkeypatch.setattr(experiment.Job, "make", stuck)
    assert cli.main([*words, "--minutes", "0.01"]) == 0
    assert torch.is_grad_enabled()


def test_ctrl_c_is_no_end_of_time(words, monkeypatch):
    monkeypatch.setattr(experiment.Job, "make", lambda self: signal.raise_signal(signal.SIGINT))
    assert cli.main(words) == 130
    assert cli.main([*words, "--minutes", "5"]) == 130


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lora_steps", "lora_stpes", "unknown option 'lora_stpes' in .*tiny.yaml: arm first"),
        (
            "eval: {max",
            "evals: {max",
            "tiny.yaml has 'evals', which means nothing there; did you mean eval",
        ),
        ("arm:first", "arm:frist", "names the arm 'frist'"),
        ("{policies: [majority]}", "{}", "arm majority does not say which policies"),
        ("policies: [majority]", "policies: [best]", "expected one of base, run_all"),
        ("[0, 1]", "[1]", "tiny-majority-0 needs tiny-first-0, but that arm has no such seed"),
        ("[0, 1]", "3", r"arm first: seeds is 3; expected a list"),
        ("first:\n", "first: text\n  other:\n", "arm first is 'text'; expected names with values"),
        ("[0, 1]", "null", r"arm first: seeds is None; expected a list"),
        ("seeds: [0, 1]", "seeds: []", r"seeds is \[\]; expected a list"),
        ("seeds", "seed", "arm first has 'seed', which means nothing there; did you mean seeds"),
        ("eval: {max", "# eval: {max", "tiny.yaml lacks 'eval'"),
        ("  majority:\n", "  first:\n", "'first' stands twice"),
        ("  majority:\n", "  1:\n", "1 is no name for a file or an arm"),
        ("  majority:\n", "  ../up:\n", "'../up' is no name for a file or an arm"),
        ("{router_steps: 2", "{seed: 4, router_steps: 2", "sets seed, which follows from"),
        ("{policies: [majority]}", "{policies: [majority], output: a}", "sets output, which"),
        ("skip_rate: 0.34", "skip_rate: 1.5", "tiny.yaml: arm first.*skip_rate is 1.5"),
        ("policies: [majority]", "policies: [router]", "is trained for 'majority', so that it has"),
        *(
            (
                "policies: [base,",
                f"policies: [{policy}, base,",
                f"scores '{policy}', whose order of",
            )
            for policy in ("static_importance", "skip_decode")
        ),
        (
            'majority_of: "arm:first"}',
            'majority_of: "arm:first"}\n    test: other/set',
            "test sets in folders of one name",
        ),
        (
            "{router_steps: 2, warm_start: 4}\n    eval: {policies: [base, run_all, router, ",
            "{stage: lora, skip_rate: 0.0}\n    eval: {policies: [run_all, ",
            "trains LoRA with all layers alone, so that it has no 'majority'",
        ),
        (
            "{router_steps: 2, warm_start: 4}",
            "{stage: lora, skip_rate: 0.0}",
            "trains LoRA with all layers alone, so that it has no 'router'",
        ),
        (
            'majority_of: "arm:first"}\n    eval: {policies: [majority]}',
            'majority_of: "arm:other"}\n    eval: {policies: [majority]}\n'
            "  other: {train: {policy: unified}, eval: {policies: [unified]}}",
            "arm majority takes the majority mask of other, which has no routers",
        ),
        (
            'policy: majority, majority_of: "arm:first"',
            'artifact: "arm:first", reads: length',
            "arm majority has reads 'length', and goes on from first, whose routers have reads",
        ),
        (
            'policy: majority, majority_of: "arm:first"}\n    eval: {policies: [majority]}',
            'stage: lora, artifact: "arm:plain"}\n    eval: {policies: [run_all]}\n'
            "  plain: {train: {stage: lora, skip_rate: 0.0}, eval: {policies: [run_all]}}",
            "arm majority trains LoRA for routers that exist, but plain, .* has none that were",
        ),
        ("arms:", "arms: [", "is not YAML"),
        ("  first:", "  my-first:", "'my-first' is no name .* '-' parts file, arm"),
        ("{router_steps: 2, warm_start: 4}", '{artifact: "arm:first"}', "first-0 needs itself"),
        ("train: {", "like: tiny.yaml\ntrain: {", "is like itself"),
        ("data: ", "data: [a, b] #", r"names the data \['a', 'b'\]; expected one data set"),
        (
            '{policy: majority, majority_of: "arm:first"}',
            "arm:majority",
            "'majority', which trains",
        ),
        ("{router_steps: 2, warm_start: 4}", "{}\n    balance: {}", 'no train: "arm:NAME" to bal'),
        ("{router_steps: 2, warm_start: 4}", '"arm:first"\n    balance: {}', "first needs itself"),
        (
            '{policy: majority, majority_of: "arm:first"}',
            '"arm:first"\n    balance: {level: [0.1]}',
            "unknown option 'level' in .*arm majority",
        ),
    ],
)
def test_wrong_files_say_what_is_wrong(words, old, new, says, monkeypatch):
    monkeypatch.setenv("FIRSTLM_DATA", "data")
    file = Path(words[2]) / "tiny.yaml"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=says):
        jobs_of(file, "runs", "results")


def test_plain_lora_binds_no_routers_however_often_it_goes_on(words):
    file = Path(words[2]) / "tiny.yaml"
    plain = "stage: lora, skip_rate: 0.0"
    file.write_text(
        file.read_text() + f"  plain: {{train: {{{plain}}}, eval: {{policies: [run_all]}}}}\n"
        f'  more: {{train: {{{plain}, artifact: "arm:plain"}}, eval: {{policies: [run_all]}}}}\n'
        '  length: {train: {artifact: "arm:more", reads: length}, eval: {policies: [router]}}\n'
        '  lora: {train: {stage: lora, artifact: "arm:length", reads: length}, '
        "eval: {policies: [router]}}\n"
    )
    assert {"tiny-length-0", "tiny-lora-0"} < {job.name for job in jobs_of(file, "r", "s")}


def test_routers_are_of_the_arm_that_trained_them(words):
    """Maybe one that is not scored."""
    file = Path(words[2]) / "tiny.yaml"
    other = Path(words[2]).parent / "other"
    other.mkdir()
    file.write_text(
        file.read_text()
        + f"  news: {{data: {other}, train: {{stage: routers}}, eval: {{policies: [router]}}}}\n"
        '  reused: {train: {stage: lora, artifact: "arm:news"}, eval: {policies: [router]}}\n'
        '  more: {train: {stage: lora, artifact: "arm:reused"}, eval: {policies: [router]}}\n'
        '  anew: {train: {artifact: "arm:news"}, eval: {policies: [router]}}\n'
    )
    jobs = {job.name: job for job in jobs_of(file, "runs", "results")}
    sets = {name: Path(job.routers_of(jobs)[0]).parent.name for name, job in jobs.items()}
    assert {name for name, data in sets.items() if data == "other"} == {
        "tiny-news-0",
        "tiny-reused-0",
        "tiny-more-0",
    }


def test_the_file_in_the_docs_is_one(tmp_path, monkeypatch):
    page = Path(__file__).parent.parent / "docs" / "experiments.md"
    text = page.read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setenv("FIRSTLM_DATA", str(tmp_path))
    jobs = jobs_of(tmp_path / "mine.yaml", "runs", "results")
    arms = dict.fromkeys(job.arm for job in jobs)
    assert list(arms) == ["lora", "first", "unified", "majority", "elsewhere"]
    assert len(jobs) == 3 + 3 + 3
    assert jobs[-1].score.data == f"{tmp_path}/data/other/test.jsonl.gz"


def test_a_file_without_arms_is_refused(words):
    file = Path(words[2]) / "tiny.yaml"
    file.write_text(file.read_text().partition("arms:")[0] + "arms: {}\n")
    with pytest.raises(ConfigError, match=r"tiny.yaml has no arms; expected one or more"):
        jobs_of(file, "runs", "results")


def test_data_that_cannot_be_found_is_not_taken_for_other_options(words, monkeypatch):
    file = Path(words[2]) / "tiny.yaml"
    file.write_text(file.read_text().replace("data: ", "data: qa/none #", 1))
    monkeypatch.delenv("FIRSTLM_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"no folder here, and FIRSTLM_DATA is not set\. Set"):
        jobs_of(file, "runs", "results")


def test_the_experiments_of_this_repository_are_sound(monkeypatch):
    monkeypatch.setenv("FIRSTLM_DATA", "data")
    files = sorted((Path(__file__).resolve().parent.parent / "experiments").glob("*.yaml"))
    assert files
    for file in files:
        assert jobs_of(file, "runs", "results")


def test_what_fails_does_not_end_the_rest(words, capsys, monkeypatch):
    file = Path(words[2]) / "tiny.yaml"
    more = """
  broken: {train: {model: there-is-none}, eval: {policies: [run_all]}}
  of_broken: {train: {policy: majority, majority_of: "arm:broken"}, eval: {policies: [majority]}}
"""
    file.write_text(file.read_text().replace("arms:\n", "arms:" + more))
    real = experiment.Job.evaluate

    def score(self):
        if self.name == "tiny-first-1":
            raise RuntimeError("out of memory")
        real(self)

    monkeypatch.setattr(experiment.Job, "evaluate", score)
    assert cli.main(words) == 1
    assert list(results(words)) == ["tiny-first-0", "tiny-majority-0"]
    said = capsys.readouterr()
    assert said.out.count("tiny-broken-0: training") == 1
    told = said.out[said.out.index("These failed") :].splitlines()[1:]
    assert told[0].startswith("  tiny-broken-0: ConfigError: ")
    assert told[1:] == [
        "  tiny-of_broken-0: needs tiny-broken-0",
        "  tiny-first-1: RuntimeError: out of memory",
    ]
    assert 'raise RuntimeError("out of memory")' in said.err  # where, for what no one foresaw
    monkeypatch.setattr(experiment.Job, "evaluate", lambda self: signal.raise_signal(signal.SIGINT))
    assert cli.main(words) == 130
    assert "tiny-broken-0: ConfigError: " in capsys.readouterr().out
    monkeypatch.setattr(experiment.Job, "evaluate", real)
    assert cli.main([*words, "--only", "tiny-first"]) == 0
    assert list(results(words)) == JOBS


def test_missing_data_is_named_before_anything_is_trained(words, capsys):
    file, folder = Path(words[2]) / "tiny.yaml", Path(words[2]).parent
    (folder / "none").mkdir()
    other = "  other: {test: OTHER, train: 'arm:first', eval: {policies: [run_all]}}\n"
    file.write_text(file.read_text() + other.replace("OTHER", str(folder / "none")))
    assert cli.main([*words, "--only", "tiny-first-0", "tiny-other"]) == 1
    said = capsys.readouterr()
    assert f"tiny-other-0: there is no {folder}/none/test.jsonl.gz" in said.out
    assert list(results(words)) == ["tiny-first-0"]
    (folder / "set" / "test.jsonl").unlink()
    assert cli.main(words) == 1
    said = capsys.readouterr()
    for name in JOBS[1:]:
        assert re.search(rf"{name}: there is no \S*/set/test.jsonl", said.out)
    assert "training" not in said.out


def test_two_files_of_one_name_are_refused(words, capsys):
    other = Path(words[2]).parent / "others" / "tiny.yaml"
    other.parent.mkdir()
    other.write_text((Path(words[2]) / "tiny.yaml").read_text())
    assert cli.main([*words[:3], str(other.parent), *words[3:]]) == 2
    assert "tiny.yaml have one name" in capsys.readouterr().err
    file = str(Path(words[2]) / "tiny.yaml")  # named twice, it is one file
    assert cli.main(["experiment", "list", words[2], file, *words[3:]]) == 0


def test_a_summary_of_one_file_keeps_the_rows_of_others(words, capsys):
    folder = Path(words[2])
    text = (folder / "tiny.yaml").read_text()
    (folder / "small.yaml").write_text(text.replace("[0, 1]", "[0]"))
    only = ["--only", "tiny-majority", "small-majority"]
    assert cli.main([*words, *only]) == 0

    def summed(*files):
        assert cli.main(["experiment", "summary", *map(str, files), *words[3:]]) == 0
        file = Path(words[words.index("--results") + 1]) / "summary.json"
        return [f"{row['file']}-{row['arm']}" for row in json.loads(file.read_text())]

    both = summed(folder)
    assert sorted(set(both)) == ["small-majority", "tiny-majority"]
    assert summed(folder / "small.yaml") == summed(folder / "tiny.yaml") == both
    (folder / "small.yaml").unlink()
    assert set(summed(folder)) == {"tiny-majority"}  # a folder is all there is
    (folder / "small.yaml").write_text(
        text.replace("  first:", "  second:")
        .replace("arm:first", "arm:second")
        .replace("  majority:", "  other:")
    )
    words_of = ["experiment", "summary", str(folder / "small.yaml"), *words[3:]]
    before = Path(words[-1], "summary.json").read_text()
    assert cli.main(words_of) == 2  # nothing of it is scored, and what there was stays
    assert "no rows to sum up" in capsys.readouterr().err
    assert Path(words[-1], "summary.json").read_text() == before
    (folder / "small.yaml").unlink()
    capsys.readouterr()
    assert cli.main(["experiment", "summary", *words[2:], *only]) == 2
    assert "Leave --only out" in capsys.readouterr().err
    file = Path(words[words.index("--results") + 1]) / "summary.json"
    for broken in ("[{", "null", '[{"score": 1}]'):
        file.write_text(broken)
        assert cli.main(["experiment", "summary", str(folder / "tiny.yaml"), *words[3:]]) == 2
        assert "is no summary of experiments" in capsys.readouterr().err
        assert file.read_text() == broken


def test_a_folder_without_files_is_refused(tmp_path, capsys):
    assert cli.main(["experiment", "run", str(tmp_path)]) == 2
    assert "no experiment file" in capsys.readouterr().err


def test_a_test_set_that_changed_is_noticed_before_it_is_summed_up(words, capsys, tmp_path):
    assert cli.main(words) == 0
    before, test = results(words), tmp_path / "set" / "test.jsonl"
    rows = test.read_text()
    test.write_text(rows.replace('": "', '":  "'))  # another file, with the same items
    assert cli.main(words) == 0
    test.write_text(rows.replace("say", "tell"))
    capsys.readouterr()
    assert cli.main([words[0], "list", *words[2:]]) == 0
    assert capsys.readouterr().out.count("made with other options: data") == len(JOBS)
    assert cli.main(words) == 1
    said = capsys.readouterr().out
    assert "These failed:" in said  # not: the same command tries them again
    assert said.count("than its file has now (data)") == len(JOBS)
    assert cli.main([words[0], "summary", *words[2:]]) == 2
    assert capsys.readouterr().err.count("(data)") == len(JOBS)
    assert results(words) == before


def test_a_seed_that_stands_twice_is_refused(words):
    file = Path(words[2]) / "tiny.yaml"
    file.write_text(file.read_text().replace("seeds: [0, 1]", "seeds: [0, 0]"))
    with pytest.raises(ConfigError, match="each once"):
        jobs_of(file, "runs", "results")
