# SPDX-License-Identifier: Apache-2.0
"""Several processes that train together, as `accelerate launch` or `torchrun` start them.

Everything here is a no-op in a process that is alone. All of them compute the same ranking, offsets
and thresholds, rows of a step are split between them, and the first writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from firstlm.errors import ConfigError


def join(device: torch.device) -> None:
    """Meet the other processes of a launch before anything is written."""
    if shards() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP of version 1 would save a part of what is trained; expected version 2, as in "
            "deploy/fsdp2.yaml (fsdp_version: 2)."
        )
    if _zero_stage() == 3:
        raise ConfigError(
            "DeepSpeed's ZeRO-3 gathers a layer as it runs, and processes that skip other layers "
            "would wait for each other for ever; use FSDP2 (deploy/fsdp2.yaml), or a lower stage."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=device.type == "cpu")


def _zero_stage() -> int:
    """Return the stage of DeepSpeed's ZeRO that a launch asks for; 0 without it."""
    config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not config:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 0)
    found = json.loads(Path(config).read_text(encoding="utf-8")).get("zero_optimization", {})
    return found.get("stage", 0)


def shards() -> bool:
    """Whether `accelerate launch` was told to split models among processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def launched() -> bool:
    """Whether `accelerate launch` or torchrun started this process, be it the only one."""
    return bool({"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys())


def count() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return count() == 1 or distributed.get_rank() == 0


def say(text: str) -> None:
    """Print a line once, not from every process."""
    if is_first():
        print(text)


@contextmanager
def first_alone() -> Iterator[bool]:
    """Let the others wait until the first process leaves this scope; tells whether it is this."""
    first = is_first()
    yield first
    if count() > 1:
        distributed.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes."""
    if count() == 1:
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values


def weight(mask: torch.Tensor) -> torch.Tensor | float:
    """Return what a mean over this process's true positions counts in a mean over processes.

    So weighted, the mean of the processes' means is the mean over all of their positions.
    """
    if count() == 1:
        return 1.0
    here = mask.sum()
    return count() * here / total(here)


def same(value: Any) -> Any:
    """Return what the first process has, such as offsets that a device may round otherwise."""
    if count() == 1:
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Let parts of a model that is split among processes (FSDP2) be called by themselves."""
    if isinstance(module, FSDPModule):
        module.unshard()
    yield
    scatter(module)


def scatter(module: nn.Module) -> None:
    """Let go of what a forward pass gathered (FSDP2), so that parameters are the shards again."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose shards lie in several processes (FSDP2) as one; all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_cpu(parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return parameters by name, whole, as they are saved; all processes must ask for it."""
    return {name: whole(p.detach()).cpu().contiguous() for name, p in parameters}


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor into a parameter, or each process's shard of it."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
