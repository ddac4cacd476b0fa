# SPDX-License-Identifier: Apache-2.0
"""Causal language models that choose, from the prompt, which of their layers to run.

Names are imported when first used, so that `firstlm --help` doesn't wait for torch.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstlm.calibration import calibrate
    from firstlm.config import RouterConfig, TrainConfig
    from firstlm.errors import FirstError
    from firstlm.model import FirstModel
    from firstlm.phases import train_lora, train_routers
    from firstlm.policies import FixedMask, RouterPolicy, RunAll

    __version__: str

__all__ = [
    "FirstError",
    "FirstModel",
    "FixedMask",
    "RouterConfig",
    "RouterPolicy",
    "RunAll",
    "TrainConfig",
    "__version__",
    "calibrate",
    "train_lora",
    "train_routers",
]

_HOMES = {
    "FirstError": "errors",
    "FirstModel": "model",
    "FixedMask": "policies",
    "RouterConfig": "config",
    "RouterPolicy": "policies",
    "RunAll": "policies",
    "TrainConfig": "config",
    "calibrate": "calibration",
    "train_lora": "phases",
    "train_routers": "phases",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("firstlm")
        except metadata.PackageNotFoundError:  # run from a checkout that isn't installed
            return "0+unknown"
    if name not in _HOMES:
        raise AttributeError(f"module 'firstlm' has no attribute {name!r}")
    value = getattr(import_module(f"firstlm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
