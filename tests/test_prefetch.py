# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels ask for weights ahead of time, and compute nothing anew for each output."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch._inductor import config
from torch._inductor.codegen.cpp import CppVecKernel
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code, run_and_get_cpp_code

from firstlm import FirstModel
from firstlm.engine import DecodeEngine
from firstlm.graphs import stored, trace
from firstlm.packing import pack_linears
from firstlm.prefetch import prefetching

HINT = "__builtin_prefetch"


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() * weight.float()).sum(-1)


def code_of(call: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Any, str]:
    with config.patch(force_disable_caches=True):
        return run_and_get_cpp_code(torch.compile(call), *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_large_weights_are_asked_for_ahead_and_small_ones_are_not(dtype: torch.dtype) -> None:
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    weight = torch.randint(-100, 100, (1024, 512)).to(dtype)
    with prefetching():
        found, code = code_of(product, x, weight)
        _, small = code_of(product, x, weight[:64].contiguous())
    wanted, plain = code_of(product, x, weight)
    assert HINT in code
    assert HINT not in small
    assert HINT not in plain
    assert torch.equal(found, wanted)


def test_what_is_picked_or_computed_has_no_hint() -> None:
    weight, places = torch.randn(512, 1024), torch.randint(0, 512, (512, 1024))

    def call(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        picked = stored(weight.gather(0, places) + 1)  # a large buffer, but no input
        return (picked * 2).sum(-1)

    with prefetching():
        found, code = code_of(call, weight, places)
    hinted = [line for line in code.splitlines() if HINT in line]
    assert len(hinted) == 1  # the places are read one after another
    assert torch.allclose(found, call(weight, places), rtol=1e-4)


def test_the_compilers_cache_knows_kernels_with_hints() -> None:
    x, weight = torch.randn(1, 512), torch.randn(1024, 512)
    codes = []
    with fresh_inductor_cache():
        for how in (prefetching(False), prefetching(), prefetching(False)):
            with how, config.patch(fx_graph_cache=True):
                codes += [run_and_get_cpp_code(torch.compile(product), x, weight)[1]]
    assert [HINT in code for code in codes] == [False, True, False]


def test_what_other_threads_compile_has_no_hints() -> None:
    x, weight = torch.randn(1, 512), torch.randn(1024, 512)
    with prefetching(), ThreadPoolExecutor(1) as other:
        _, code = other.submit(code_of, product, x, weight).result()
    assert HINT not in code


def test_inductor_is_as_before_afterwards() -> None:
    plain = CppVecKernel.load
    with prefetching():
        assert CppVecKernel.load is not plain
    assert CppVecKernel.load is plain


def test_kernels_of_another_inductor_come_without_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._inductor.codegen.cpp_utils.cexpr_index")
    x, weight = torch.randn(1, 512), torch.randn(1024, 512)
    with prefetching():
        found, code = code_of(product, x, weight)
    assert HINT not in code
    assert torch.allclose(found, product(x, weight), atol=1e-4)


@pytest.mark.parametrize("weights", ["same", "int8"])
def test_a_norm_is_computed_once_and_not_for_each_output(weights: str) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.RMSNorm(512), nn.Linear(512, 1024, bias=False))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.layer(x),)

    whole = Whole().to(torch.bfloat16)
    x = torch.randn(1, 1, 512, dtype=torch.bfloat16)
    with torch.no_grad():
        packed = pack_linears(trace(whole, (x,), ({},)), weights)
        inputs = [*packed.inputs_from(whole.layer), x]
        with prefetching():
            (found,), code = code_of(packed.traced.graph, *inputs)
        (wanted,) = whole(x)
    loop = next(part for part in code.split("for(") if HINT in part)
    assert "sqrt" in code
    assert "sqrt" not in loop
    assert torch.allclose(found.float(), wanted.float(), atol=0.05)


def test_the_engine_asks_for_its_weights() -> None:
    first = FirstModel.from_base(tiny_llama(layers=1, hidden=512).to(torch.bfloat16))
    engine = DecodeEngine(first.plain_base, first.routing.stack)
    with config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(engine.step, 1)
    layer = max(codes, key=len)
    assert layer.count(HINT) == 6  # four products, keys and values
