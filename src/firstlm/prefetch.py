# SPDX-License-Identifier: Apache-2.0
"""Compiled CPU code that asks for weights before it needs them.

A decode step of one row reads each weight once, and does next to nothing with it. Left alone, the
short loops over a matrix' rows read at about 60% of the memory's speed (docs/LOG.md). Inductor has
no option for that: its kernels get hints by way of what writes their loads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

AHEAD = 4096  # bytes between what is read and what is asked for
LARGE = 1 << 18  # bytes; smaller weights are not worth a hint
LOCK = threading.Lock()  # inductor is one for all models


@contextmanager
def prefetching(wanted: bool = True) -> Iterator[None]:
    """Let inductor's vector kernels ask for what they will read of large inputs.

    That goes for what this thread compiles within. Hints change no result. Where inductor is
    another than the one this was written for, or the compiler is not gcc or clang, kernels come
    without them.

    Args:
        wanted: False changes nothing.
    """
    try:
        from torch._inductor import config
        from torch._inductor.codegen.cpp import CppVecKernel
        from torch._inductor.custom_graph_pass import CustomGraphPass

        plain: Any = CppVecKernel.load
        wanted = wanted and sys.platform != "win32"
    except (ImportError, AttributeError):
        wanted = False
    if not wanted:
        yield
        return
    ours = threading.get_ident()

    def load(kernel: Any, name: str, index: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == ours:
            _hint(kernel, name, index)
        return plain(kernel, name, index, *args, **kwargs)

    class Marked(CustomGraphPass):
        """Changes nothing but the key of the compiler's cache, in which hints are not."""

        def __call__(self, graph: Any) -> None:
            pass

        def uuid(self) -> Any:
            return ("firstlm.prefetch", AHEAD, LARGE)

    own = config.post_grad_custom_post_pass
    marked = nullcontext() if own else config.patch(post_grad_custom_post_pass=Marked())
    with LOCK, patch.object(CppVecKernel, "load", load), marked:
        yield


def _hint(kernel: Any, name: str, index: Any) -> None:
    """Write a line of C++ that asks for what lies ahead of a load, where that pays."""
    try:
        from torch._inductor.codegen.cpp_utils import cexpr_index
        from torch._inductor.virtualized import V

        real = V.graph.scheduler.mutation_real_name.get(name, name)
        given: Any = V.graph.graph_inputs.get(real)
        if given is None:
            return
        count = given.get_numel()
        size = V.graph.get_dtype(name).itemsize
        # What grows with the text are keys and values, and vectors, which are short.
        large = count * size >= LARGE if count.is_number else len(given.get_size()) > 1
        index = kernel.rename_indexing(index)
        along = kernel.itervars[kernel.tiling_idx]
        if not large or kernel._try_get_const_stride(index, along) != 1:
            return
        place = f"{kernel.args.input(name)} + {cexpr_index(index)}"
        line = f"__builtin_prefetch(reinterpret_cast<const char*>({place}) + {AHEAD})"
        kernel.cse.generate(kernel.loads, line, assignment=False)
    except (ImportError, AttributeError, KeyError, TypeError):
        return
