# SPDX-License-Identifier: Apache-2.0
"""Files for deployment say what they are meant to; where nginx is installed, it reads its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_kubernetes_sends_requests_to_the_replicas_that_it_starts() -> None:
    parts = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    found = {part["kind"]: part for part in parts}
    pod = found["Deployment"]["spec"]["template"]
    service = found["Service"]["spec"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= ports.keys()
    asked = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert int(asked["--port"]) in ports.values()
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
    artifact = container["command"][-1]
    assert any(artifact.startswith(mount["mountPath"]) for mount in container["volumeMounts"])
    grace = pod["spec"]["terminationGracePeriodSeconds"]
    ending = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert ending + int(asked["--shutdown-timeout"]) < grace  # vLLM's own would be 0


def test_ray_has_a_gpu_for_each_rank_and_a_service_for_its_head() -> None:
    parts = list(yaml.safe_load_all((DEPLOY / "ray.yaml").read_text(encoding="utf-8")))
    job, service = (part["spec"] for part in parts)
    words = job["entrypoint"].split()
    asked = dict(zip(words[3::2], words[4::2], strict=True))
    assert asked["--distributed-executor-backend"] == "ray"
    head, workers = (
        job["rayClusterSpec"]["headGroupSpec"],
        job["rayClusterSpec"]["workerGroupSpecs"],
    )
    pods = [head["template"], *(w["template"] for w in workers for _ in range(w["replicas"]))]
    limits = [pod["spec"]["containers"][0]["resources"]["limits"] for pod in pods]
    gpus = sum(int(limit["nvidia.com/gpu"]) for limit in limits)
    assert int(asked["--tensor-parallel-size"]) == gpus
    for pod in pods:  # each rank reads the weights itself
        (container,) = pod["spec"]["containers"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}
        assert any(words[2].startswith(mount["mountPath"]) for mount in container["volumeMounts"])
        assert int(asked["--shutdown-timeout"]) < pod["spec"]["terminationGracePeriodSeconds"]
    assert service["selector"] == head["template"]["metadata"]["labels"]
    ports = {p["name"]: p["containerPort"] for p in pods[0]["spec"]["containers"][0]["ports"]}
    assert ports[service["ports"][0]["targetPort"]] == int(asked["--port"])


def test_a_launch_on_several_gpus_is_of_the_second_fsdp() -> None:
    config = yaml.safe_load((DEPLOY / "fsdp2.yaml").read_text(encoding="utf-8"))
    assert config["distributed_type"] == "FSDP"
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert config["mixed_precision"] == "no"  # not False, as YAML reads a bare no


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_reads_its_file(tmp_path: Path) -> None:
    command = ["nginx", "-t", "-p", str(tmp_path), "-c", str(DEPLOY / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "syntax is ok" in done.stderr
