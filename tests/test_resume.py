# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs go on where they were, and take nothing that is not theirs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from training import config, make_examples, make_model, write_run

from firstlm import FirstModel, artifact_files, processes
from firstlm.errors import ArtifactError, ConfigError, DataError
from firstlm.interrupts import TOGETHER, Interrupts
from firstlm.phases import train_joint, train_lora, train_routers, work_folder
from firstlm.train import LOCK_FILE, run
from firstlm.trainer import DRIVER_FILE, FirstTrainer, last_checkpoint


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Let Ctrl-C be heard; jobs that a shell runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(step: int, sent: signal.Signals = signal.SIGINT) -> Callable[..., Any]:
    """Return a compute_loss that sends a signal amid the given step, its decisions taken."""
    original = FirstTrainer.compute_loss

    def compute_loss(self: FirstTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == step - 1:
            signal.raise_signal(sent)
        return loss

    return compute_loss


def test_a_phase_called_from_python_leaves_a_command_lines_run_alone(
    tmp_path: Path, byte_tokenizer
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(
        tmp_path, model=str(folder), data=str(data), router_steps=2, lora_steps=2, warm_start=4
    )
    assert run(settings) == 0
    work = work_folder(settings)
    before = {f: f.read_bytes() for f in work.rglob("*") if f.is_file()}
    examples, model = make_examples(8, 0), make_model()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    for train in (train_routers, train_lora):
        with pytest.raises(ConfigError, match="firstlm train"):
            train(model, examples, examples, settings)
    assert {f: f.read_bytes() for f in work.rglob("*") if f.is_file()} == before
    assert {name for name, _ in model.named_parameters()} == set(weights)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("step", [9, 12])
@pytest.mark.parametrize("phase", ["routers", "lora", "joint"])
def test_resume_continues_exactly(tmp_path: Path, phase: str, step: int, monkeypatch) -> None:
    """Stopping amid the steps, or in the last, and running again ends as an unbroken run does."""
    train, validation = make_examples(64, 0), make_examples(16, 1)

    log = tmp_path / "broken" / "artifact-run" / f"log_{phase}.jsonl"

    def train_with(folder: str, break_at: int | None) -> tuple[dict[str, torch.Tensor], dict]:
        model = make_model()
        settings = config(
            tmp_path / folder,
            router_steps=12,
            lora_steps=12,
            save_steps=6,
            eval_steps=6,
            skip_rates=[0.5],
            distill=2.0,
        )
        fit = {"routers": train_routers, "lora": train_lora, "joint": train_joint}[phase]
        if break_at:
            with monkeypatch.context() as patch:
                patch.setattr(FirstTrainer, "compute_loss", interrupted(break_at))
                with pytest.raises(KeyboardInterrupt):
                    fit(model, train, validation, settings)
            model = make_model()
            with log.open("a") as file:  # as if killed after the checkpoint
                file.write('{"step": 99}\n{"st')
        record = fit(model, train, validation, settings, resume=True)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, record

    (whole, record), (resumed, again) = train_with("whole", None), train_with("broken", step)
    for kept in (record, again):  # what a log averages begins anew when training goes on
        kept["curve"] = {k: v for k, v in kept["curve"].items() if k.startswith("eval_")}
        assert [step for step, _ in kept["curve"]["eval_loss"]] == [0, 6, 12]
    torch.testing.assert_close(again, record)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [5, 10]
    assert whole.keys() == resumed.keys()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], msg=name)


def test_an_interrupted_command_resumes(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    words = f"train --model {folder} --data {data} --output {tmp_path / 'out'} --batch-size 4"
    words += " --router-steps 400 --lora-steps 2 --warm-start 0 --no-tensorboard --save-steps 100"
    command = [sys.executable, "-m", "firstlm", *words.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = tmp_path / "out-run" / "log_routers.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and log.read_text()) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Run the same command again" in stdout
    assert not (tmp_path / "out").exists()
    saved = list((tmp_path / "out-run" / "checkpoints" / "routers").glob(f"*/{DRIVER_FILE}"))
    assert saved
    step = max(int(f.parent.name.split("-")[1]) for f in saved)
    assert 0 < step < 400


def test_an_artifact_that_changed_is_not_gone_on_from(
    tmp_path: Path, byte_tokenizer, capsys
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    given = {"model": str(folder), "data": str(data), "router_steps": 1, "lora_steps": 1}
    first = config(tmp_path, **given)
    assert run(first) == 0
    second = replace(first, output=str(tmp_path / "second"), artifact=first.output)
    assert run(second) == 0
    assert run(second) == 0
    model = FirstModel.from_pretrained(first.output)
    model.routers[0].bias.data.add_(1)
    model.save_pretrained(first.output)
    with pytest.raises(ConfigError, match="data that has changed since: artifact"):
        run(second)


def test_short_runs_log_too(tmp_path: Path) -> None:
    settings = config(tmp_path, router_steps=3, logging_steps=10)
    train_routers(make_model(), make_examples(16, 0), make_examples(8, 1), settings)
    log = (work_folder(settings) / "log_routers.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [3]


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = FirstModel.from_pretrained(str(path))
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n or "routers." in n}


@pytest.mark.parametrize("phase", ["routers", "lora"])
def test_a_run_that_goes_on_from_an_artifact_with_lora_can_resume_in_any_phase(
    tmp_path: Path, byte_tokenizer, monkeypatch, phase: str
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    steps = {"router_steps": 3, "lora_steps": 3, "eval_steps": 3, "distill": 2.0}
    settings = config(tmp_path, model=str(folder), data=str(data), **steps)
    assert run(settings) == 0
    first = settings.output
    more = replace(settings, model=None, artifact=first, output=str(tmp_path / "whole"))
    assert run(more) == 0
    broken = replace(more, output=str(tmp_path / "broken"))
    press, begun = interrupted(2), FirstTrainer.compute_loss

    def in_phase(self, *args, **kwargs):
        here = Path(str(self.args.output_dir)).name == phase
        return (press if here else begun)(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FirstTrainer, "compute_loss", in_phase)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    assert not Path(broken.output).exists()
    assert run(broken) == 0
    whole, resumed = weights(Path(more.output)), weights(Path(broken.output))
    assert whole.keys() == resumed.keys()
    assert any("lora_" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], msg=name)


def test_plain_lora_goes_on_with_any_routers_and_trained_routers_stay_what_they_are(
    tmp_path: Path, byte_tokenizer
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    steps = {"router_steps": 2, "lora_steps": 2, "warm_start": 4}
    plain = config(
        tmp_path, model=str(folder), data=str(data), stage="lora", skip_rate=0.0, **steps
    )
    assert run(plain) == 0
    lora = {name: p for name, p in weights(Path(plain.output)).items() if "lora_" in name}
    with pytest.raises(ConfigError, match=r"none were trained in .*; expected stage both"):
        run(replace(plain, artifact=plain.output, output=str(tmp_path / "no"), skip_rate=0.25))
    on = replace(plain, artifact=plain.output, output=str(tmp_path / "on"), skip_rate=0.25)
    for stage, other in (("routers", {"reads": "length"}), ("both", {"unit": "mlp"})):
        settings = replace(on, stage=stage, output=str(tmp_path / stage), **other)
        assert run(settings) == 0
        model = FirstModel.from_pretrained(settings.output)
        assert model.training_record["trainings"] == 2
        for name, value in other.items():
            assert getattr(model.router_config, name) == value
            with pytest.raises(ConfigError, match=rf"--{name} {value}"):
                run(replace(on, artifact=settings.output, output=str(tmp_path / "no")))
    kept = weights(tmp_path / "routers")
    assert all(torch.equal(kept[name], value) for name, value in lora.items())


@pytest.mark.parametrize("ignored", [False, True])
def test_who_manages_jobs_ends_training_with_a_checkpoint(
    tmp_path: Path, ignored: bool, monkeypatch
) -> None:
    """SIGTERM is heard, by a background job too, which ignores Ctrl-C; then all is as before."""
    train, validation = make_examples(32, 0), make_examples(8, 1)
    settings = config(tmp_path, lora_steps=6, save_steps=6)
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(FirstTrainer, "compute_loss", interrupted(3, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train_lora(make_model(), train, validation, settings)
    folder = work_folder(settings) / "checkpoints" / "lora"
    assert last_checkpoint(folder) == folder / "checkpoint-3"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_signals_that_come_together_are_one_and_a_later_ctrl_c_ends_all() -> None:
    """A launcher passes on what a job manager has sent to its processes, too."""
    interrupts = Interrupts()
    with interrupts.caught():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert interrupts.asked
        interrupts._since -= 2 * TOGETHER
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_starting_over_takes_a_link_away_and_not_what_it_leads_to(
    tmp_path: Path, byte_tokenizer
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    assert run(settings) == 0
    checkpoints, elsewhere = work_folder(settings) / "checkpoints", tmp_path / "large"
    checkpoints.rename(elsewhere)
    checkpoints.symlink_to(elsewhere)
    assert run(replace(settings, resume=False)) == 0
    assert not checkpoints.is_symlink()
    assert any(elsewhere.iterdir())


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    settings = config(tmp_path, router_steps=6, save_steps=3)
    train_routers(make_model(), make_examples(32, 0), make_examples(8, 1), settings)
    folder = work_folder(settings) / "checkpoints" / "routers"
    assert last_checkpoint(folder) == folder / "checkpoint-6"
    state = folder / "checkpoint-6" / "trainer_state.json"
    text = state.read_text()
    state.write_text("{")
    assert last_checkpoint(folder) == folder / "checkpoint-3"
    state.write_text(text)
    assert last_checkpoint(folder) == folder / "checkpoint-6"
    (folder / "checkpoint-6" / "rng_state.pth").unlink()  # another process was not done
    assert last_checkpoint(folder) == folder / "checkpoint-3"
    shutil.rmtree(folder / "checkpoint-3")
    assert last_checkpoint(folder) is None


def test_calls_from_python_start_afresh_unless_told_otherwise(tmp_path: Path) -> None:
    train, validation = make_examples(32, 0), make_examples(8, 1)
    settings = config(tmp_path, lora_steps=4, eval_steps=2)
    found = []
    for _ in range(2):
        model = make_model()
        assert train_lora(model, train, validation, settings)["ce_after"] > 0
        found.append({n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
    other = make_model(seed=5)
    train_lora(other, train, validation, settings)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            assert torch.equal(found[0][name], found[1][name])
            assert not torch.equal(parameter, found[0][name])


def test_a_run_that_started_without_resume_can_be_resumed(
    tmp_path: Path, byte_tokenizer, monkeypatch, capsys
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), resume=False, router_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(FirstTrainer, "compute_loss", interrupted(2))
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    assert "without --no-resume" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"other options \(lora_steps"):
        run(replace(settings, resume=True, lora_steps=2))
    assert run(replace(settings, resume=True)) == 0


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_which_another_training_is_at_work_is_left_alone(
    tmp_path: Path, byte_tokenizer, resume: bool
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    assert run(settings) == 0
    shutil.rmtree(settings.output)
    work, more = work_folder(settings), replace(settings, resume=resume)
    before = {f: f.read_bytes() for f in work.rglob("*") if f.is_file()}
    with (
        FileLock(work / LOCK_FILE),
        pytest.raises(ConfigError, match="Another training is at work in"),
    ):
        run(more)
    assert {f: f.read_bytes() for f in work.rglob("*") if f.is_file()} == before
    assert run(more) == 0


def test_folders_with_other_files_are_left_alone(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    letters = Path(settings.output)
    letters.mkdir()
    (letters / "letter.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="holds other files"):
        run(settings)
    with pytest.raises(ArtifactError, match="holds other files"):
        make_model().save_pretrained(str(letters))
    letters.rename(work_folder(settings))
    for resume in (True, False):
        with pytest.raises(ConfigError, match="holds other files"):
            run(replace(settings, resume=resume))
    assert (work_folder(settings) / "letter.txt").read_text() == "dear"


def test_another_number_of_processes_does_not_go_on(
    tmp_path: Path, byte_tokenizer, monkeypatch
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    assert run(settings) == 0
    assert run(settings) == 0
    shutil.rmtree(settings.output)  # else there would be nothing to do
    monkeypatch.setattr(processes, "count", lambda: 4)
    monkeypatch.setattr(processes, "is_first", lambda: True)
    with pytest.raises(
        ConfigError, match=r"begun by 1 process\(es\), which take other rows than 4"
    ):
        run(settings)


def test_a_finished_run_leaves_its_artifact_as_it_is(
    tmp_path: Path, byte_tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    assert run(settings) == 0
    results = {"data": "d", "count": 1, "prefill": "skip", "weights": "float32"}
    results["runs"] = {"router@0.25": {"skip_rate": 0.25, "em": 50.0}}
    artifact_files.record(Path(settings.output), "qa", results)
    before = (Path(settings.output) / "first_config.json").read_bytes()
    assert run(settings) == 0
    assert (Path(settings.output) / "first_config.json").read_bytes() == before
    assert "stays as it is" in capsys.readouterr().out
    assert run(replace(settings, resume=False)) == 0
    assert (Path(settings.output) / "first_config.json").read_bytes() != before


def test_a_damaged_checkpoint_is_named_with_a_way_out(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    assert run(settings) == 0
    shutil.rmtree(settings.output)
    done = next(Path(f"{settings.output}-run").glob("checkpoints/routers/done"))
    (done / "trainable.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"trainable.safetensors is damaged .*--no-resume"):
        run(settings)
    shutil.rmtree(done)
    assert run(settings) == 0


def test_data_that_changed_is_not_resumed(tmp_path: Path, byte_tokenizer) -> None:
    folder, data = write_run(tmp_path, byte_tokenizer)
    settings = config(tmp_path, model=str(folder), data=str(data), router_steps=1, lora_steps=1)
    assert run(settings) == 0
    assert run(replace(settings, output=settings.output + "/")) == 0  # the same folder
    data.write_text(data.read_text().replace("say 3:", "say three:"))
    with pytest.raises(ConfigError, match="data that has changed"):
        run(settings)
