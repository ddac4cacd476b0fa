# SPDX-License-Identifier: Apache-2.0
"""Training in two processes (gloo, CPU): DDP as accelerate starts it, and FSDP2 by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training import write_run
from transformers import TrainerControl

from firstlm import processes
from firstlm.errors import ConfigError
from firstlm.interrupts import Interrupts

HERE = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0"),
)
ALONE = ("-m", "firstlm")
DDP = (*ACCELERATE, *ALONE)
FSDP = (*TORCHRUN, str(HERE / "sharded_train.py"))


def start(
    base: Path, data: Path, output: Path, way: tuple[str, ...] = DDP, **variables: str
) -> subprocess.Popen:
    """Start `firstlm train` with eight rows a step, split among the processes of a way."""
    options = f"""--model {base} --data {data} --output {output} --device cpu --dtype float32
        --batch-size {8 if way == ALONE else 4} --router-steps 10 --lora-steps 12 --warm-start 4
        --skip-rate 0.34 --skip-rates 0.17 --distill 0.5 --lora-lr 0.002 --eval-steps 4
        --save-steps 4 --logging-steps 1 --router-lr 0.05"""
    return subprocess.Popen(
        [sys.executable, *way, "train", *options.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        start_new_session=True,
    )


def finished(run: subprocess.Popen) -> str:
    """Wait for a run that has to end well, and return what it printed."""
    text, _ = run.communicate(timeout=600)
    assert run.returncode == 0, text[-4000:]
    return text


def losses(output: Path) -> list[list[float]]:
    """Return what a run logged at every step: loss, cross-entropy, skip rate, of both phases."""
    found = []
    for phase in ("routers", "lora"):
        lines = (Path(f"{output}-run") / f"log_{phase}.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            if "loss" in line:
                found.append(
                    [
                        v
                        for k, v in line.items()
                        if k.startswith(("loss", "ce", "skip_rate"))
                        and "by_layer" not in k
                        and isinstance(v, float)
                    ]
                )
    return found


def tensors(output: Path) -> dict[str, torch.Tensor]:
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    return {**load_file(output / "routers.safetensors"), **adapter}


@pytest.fixture(scope="module")
def setting(tmp_path_factory, byte_tokenizer) -> tuple[Path, Path, Path]:
    """A base model, data, and a folder with what two processes made of them."""
    folder = tmp_path_factory.mktemp("processes")
    base, data = write_run(folder, byte_tokenizer, rows=44)
    text = finished(start(base, data, folder / "two"))
    assert text.count("Saved the artifact") == text.count("Training in 2 processes.") == 1
    return base, data, folder


@pytest.mark.parametrize("way", [ALONE, FSDP], ids=["alone", "sharded"])
def test_two_processes_train_what_others_do(setting, way):
    base, data, folder = setting
    output = folder / ("alone" if way == ALONE else "sharded")
    more = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if way == FSDP else {}
    finished(start(base, data, output, way, **more))
    alone, two = losses(output), losses(folder / "two")
    assert len(two) == 22  # steps, each logged once
    pairs = list(zip(alone, two, strict=True))
    assert all(other[:2] == pytest.approx(one[:2], abs=0.05) for one, other in pairs)
    # In a step now and then, a logit that is all but 0 decides otherwise.
    assert sum(other == pytest.approx(one, abs=1e-3) for one, other in pairs) >= 17
    one, other = tensors(output), tensors(folder / "two")
    assert one.keys() == other.keys()
    for name, tensor in one.items() if way == ALONE else ():
        # Biases have a threshold in them, which lies between two prompts' logits.
        assert torch.allclose(tensor, other[name], atol=0.05 if "bias" in name else 5e-3), name


def test_two_processes_go_on_where_they_were_killed(setting):
    base, data, folder = setting
    output = folder / "killed"
    run = start(base, data, output)
    checkpoint = Path(f"{output}-run") / "checkpoints" / "lora" / "checkpoint-8"
    while not (checkpoint / "trainer_state.json").exists():
        assert run.poll() is None, run.communicate()[0][-4000:]
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    for orphan in workers(output):
        os.kill(orphan, signal.SIGKILL)
    assert not output.exists()
    text = finished(start(base, data, output))
    assert text.count("The phase 'routers' is done") == 1
    assert losses(output) == losses(folder / "two")
    one, other = tensors(folder / "two"), tensors(output)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def workers(output: Path) -> list[int]:
    """Return the processes that train to a folder; each has a session of its own."""
    found = subprocess.run(
        ["pgrep", "-f", str(output)], capture_output=True, text=True, check=False
    )
    return [int(number) for number in found.stdout.split()]


@pytest.mark.parametrize("trained", ["lora", "routers"])
def test_sharded_layers_train_what_whole_ones_do(trained):
    """FSDP2: each process skips other layers, or decides for itself."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = []
    for way in ((), TORCHRUN):
        command = [sys.executable, *way, str(HERE / "sharded.py"), trained]
        run = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=240, check=False
        )
        assert run.returncode == 0, run.stderr[-4000:]
        found.append(json.loads(run.stdout.splitlines()[-1]))
    alone, two = found
    assert two["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert two["held"]
    assert two["moved"] == alone["moved"] > 0
    assert two["saved"].keys() == alone["saved"].keys()
    assert list(two["saved"].values()) == pytest.approx(list(alone["saved"].values()), rel=1e-3)


def test_the_shipped_configuration_starts(setting):
    """On the CPU accelerate takes all of it but the splitting."""
    base, data, folder = setting
    config = str(HERE.parent / "deploy" / "fsdp2.yaml")
    launch = ("-m", "accelerate.commands.launch", "--config_file", config)
    way = (*launch, "--main_process_port", "0", *ALONE)
    text = finished(start(base, data, folder / "configured", way))
    assert text.count("Saved the artifact") == 1
    assert "gnored" not in text
    assert "nknown" not in text
    assert tensors(folder / "configured").keys() == tensors(folder / "two").keys()


def test_ctrl_c_while_processes_agree_is_not_lost(monkeypatch):
    interrupts, control = Interrupts(), TrainerControl()
    state = SimpleNamespace(device=torch.device("cpu"))

    def pressed_meanwhile(values):
        interrupts.asked = True
        return values

    monkeypatch.setattr(processes, "total", pressed_meanwhile)
    interrupts.on_step_end(state, None, control)
    interrupts.on_step_end(state, None, control)
    assert control.should_training_stop


@pytest.mark.parametrize("in_a_file", [False, True])
def test_deepspeed_that_would_hang_is_refused(monkeypatch, tmp_path, in_a_file):
    if in_a_file:
        (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    else:
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(ConfigError, match="wait for each other for ever"):
        processes.join(torch.device("cpu"))


@pytest.mark.parametrize(
    ("version", "more", "match"),
    [
        ("1", "", "fsdp_version: 2"),
        ("2", "--heal 16", "FSDP splits"),
        ("2", "--teach 1", "FSDP"),
    ],
)
def test_what_sharded_training_cannot_do_is_refused(setting, monkeypatch, version, more, match):
    base, data, folder = setting
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    words = f"train --model {base} --data {data} --output {folder / 'refused'} {more}".split()
    ran = subprocess.run(
        [sys.executable, "-m", "firstlm", *words], capture_output=True, text=True, check=False
    )
    assert ran.returncode != 0
    assert match in ran.stderr
