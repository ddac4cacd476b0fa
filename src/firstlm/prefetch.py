# SPDX-License-Identifier: Apache-2.0
"""Compiled CPU code that asks for weights before it needs them.

A decode step of one row reads each weight once, and does next to nothing with it. Rows of a matrix
are shorter than a page, and the processor's own prefetching begins anew in each page, so that it
reads at some 60% of the memory's speed. Inductor has no option for that: its kernels get
the hints by way of what writes their loads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

AHEAD = 4096  # bytes between what is read and what is asked for
LARGE = 1 << 18  # bytes; what is smaller stays in the cache
LOCK = threading.Lock()  # inductor is one for all models


@contextmanager
def prefetching() -> Iterator[None]:
    """Let inductor's vector kernels, compiled within, ask for what they will read of large inputs.

    Hints change no result. Where inductor is another than the one this was written for, or the
    compiler is not gcc or clang, kernels come without them.
    """
    from torch._inductor.codegen.cpp import CppVecKernel

    plain = CppVecKernel.load

    def load(kernel: Any, name: str, index: Any) -> Any:
        hint = None if sys.platform == "win32" else _hint(kernel, name, index)
        if hint:
            kernel.loads.writeline(hint)
        return plain(kernel, name, index)

    with LOCK, patch.object(CppVecKernel, "load", load):
        yield


def _hint(kernel: Any, name: str, index: Any) -> str | None:
    """Return a line of C++ that asks for what lies ahead of a load, or None where none pays."""
    try:
        from torch._inductor.codegen.cpp_utils import cexpr_index
        from torch._inductor.sizevars import stride_at_vec_range
        from torch._inductor.virtualized import V

        count: Any = V.graph.get_numel(name)
        if count.is_number and count * V.graph.get_dtype(name).itemsize < LARGE:
            return None
        index = kernel.rename_indexing(index)
        along = kernel.itervars[kernel.tiling_idx]
        if stride_at_vec_range(index, along, kernel.tiling_factor) != 1:
            return None
        place = f"{kernel.args.input(name)} + {cexpr_index(index)}"
        return f"__builtin_prefetch(reinterpret_cast<const char*>({place}) + {AHEAD});"
    except (ImportError, AttributeError, KeyError, TypeError):
        return None
