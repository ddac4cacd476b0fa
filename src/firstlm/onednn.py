# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weights oneDNN has brought into its own order, in compiled graphs.

Given plain weights, oneDNN's bfloat16 product puts them in order at each call, which takes as long
as 6 rows of product. Inductor calls it with ordered ones, but only where they are constants of the
graph: then each layer would be compiled for itself. This operation takes them as an input.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

ROWS = 16  # oneDNN's order hardly depends on how many there are
# Inductor's cache knows the name, and not what becomes of it: another lowering needs another one.
NAME = "firstlm::ordered_linear_1"


@torch.library.custom_op(NAME, mutates_args=())
def ordered_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [rows, inputs] times the transpose of weight [outputs, inputs], from `ordered`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@ordered_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def ordered(weight: torch.Tensor) -> torch.Tensor:
    """Return a contiguous weight [outputs, inputs] in oneDNN's order; its strides say nothing."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)


def takes(weight: torch.Tensor) -> bool:
    """Return whether a weight can be ordered, and a product with it compiled.

    float32 is left alone: ordered it gains a tenth for some rows, and loses for one.
    """
    on = weight.device.type == "cpu" and torch.backends.mkldnn.enabled
    return on and weight.dtype == torch.bfloat16 and _usable()


@cache
def _usable() -> bool:
    """Teach inductor the operation; False where oneDNN or inductor is another than expected."""
    try:
        from torch._inductor import ir, mkldnn_ir
        from torch._inductor.lowering import register_lowering

        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        make: Any = mkldnn_ir.LinearUnary.create
    except (ImportError, AttributeError, RuntimeError):
        return False

    def lower(x: Any, weight: Any) -> Any:
        return ir.TensorBox.create(make(x, weight, None, "none", [], ""))

    register_lowering(ordered_linear._opoverload, type_promotion_kind=None)(lower)
    return True
