# SPDX-License-Identifier: Apache-2.0
"""Several rows of bfloat16 multiply weights that lie in oneDNN's order; nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from torch._inductor.utils import fresh_inductor_cache

from firstlm import FirstModel, onednn
from firstlm.engine import DecodeEngine, _compile
from firstlm.errors import UnsupportedModelError
from firstlm.generate import prefill
from firstlm.graphs import trace
from firstlm.packing import pack_linears
from firstlm.policies import FixedMask

needs_onednn = pytest.mark.skipif(
    not onednn.takes(torch.zeros(1, dtype=torch.bfloat16)),
    reason="no bfloat16 in oneDNN, or another inductor",
)


@pytest.fixture
def first() -> FirstModel:
    return FirstModel.from_base(tiny_llama(layers=4).to(torch.bfloat16))


@pytest.fixture
def anew() -> Iterator[None]:
    """Whether oneDNN can be used is asked again, in the test and after it."""
    onednn._usable.cache_clear()
    yield
    onednn._usable.cache_clear()


@pytest.fixture
def elsewhere(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose oneDNN has no bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def opaque(engine: DecodeEngine, rows: int) -> list[bool]:
    """Which of the layers' weights, and of what comes after them, are in oneDNN's order."""
    step = engine.step(rows)
    return [t.is_mkldnn for part in (*step.layers, step.tail) for t in part.weights]


class Whole(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(35, 101, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(x),)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_is_that_of_a_linear_layer_for_any_number_of_rows(bias: bool) -> None:
    whole = Whole(bias).to(torch.bfloat16)
    x = torch.randn(5, 1, 35, dtype=torch.bfloat16)
    with torch.no_grad(), fresh_inductor_cache():
        packed = pack_linears(trace(whole, (x,), ({0: torch.export.Dim.AUTO},)))
        assert packed.forms == ["ordered"]
        weights = packed.inputs_from(whole.layer)
        compiled = _compile(packed.traced, weights, hints=False)
        for rows in (2, 5, 33):
            x = torch.randn(rows, 1, 35, dtype=torch.bfloat16)
            for run in (packed.traced.graph, compiled):
                (found,) = run(*weights, x)
                assert torch.allclose(found, whole(x)[0], atol=0.02, rtol=0.02)


@needs_onednn
def test_compiled_steps_of_several_rows_use_it_and_stay_near_the_model(first: FirstModel) -> None:
    engine = DecodeEngine(first.plain_base, first.routing.stack)
    assert sum(opaque(engine, 5)) == 4 * 4 + 1  # four products a layer, and the vocabulary's
    assert not any(opaque(engine, 1))
    ids = torch.randint(1, 90, (5, 9))
    mask = torch.ones_like(ids)
    keep = torch.ones(5, 4, dtype=torch.bool)
    keep[range(1, 4), range(1, 4)] = False  # layers of four rows and of five
    decoding = prefill(first, ids, mask, FixedMask(keep))
    batch = engine.start(decoding.cache, mask, 4)
    found = batch.step(ids[:, 0])
    longer = torch.cat([ids, ids[:, :1]], 1)
    wanted = prefill(first, longer, torch.ones_like(longer), FixedMask(keep)).logits
    assert torch.allclose(found.float(), wanted.float(), atol=0.05)


@needs_onednn
def test_weights_that_lie_otherwise_are_ordered_and_multiplied_as_well(first: FirstModel) -> None:
    for layer in first.plain_base.model.layers[:2]:
        down = layer.mlp.down_proj
        down.weight = nn.Parameter(down.weight.t().contiguous().t())
        layer.input_layernorm.weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16)[::2])
    engine = DecodeEngine(first.plain_base, first.routing.stack)
    for rows in (1, 2):
        engine.step(rows)  # its trial step would find it


def test_both_steps_are_of_the_same_weights(first: FirstModel) -> None:
    engine = DecodeEngine(first.plain_base, first.routing.stack, compiled=False)
    engine.step(1)
    with torch.no_grad():
        first.plain_base.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(UnsupportedModelError, match="have changed"):
        engine.step(2)


@needs_onednn
def test_a_batch_can_be_copied(first: FirstModel) -> None:
    engine = DecodeEngine(first.plain_base, first.routing.stack, compiled=False)
    ids = torch.randint(1, 90, (2, 5))
    mask = torch.ones_like(ids)
    policy = FixedMask(torch.ones(4, dtype=torch.bool))
    batch = engine.start(prefill(first, ids, mask, policy).cache, mask, 4)
    other = copy.deepcopy(batch)
    first_time = batch.step(ids[:, 0])
    assert torch.equal(other.step(ids[:, 0]), first_time)


def test_mkldnn_that_is_turned_off_is_not_used(first: FirstModel) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        engine = DecodeEngine(first.plain_base, first.routing.stack, compiled=False)
        assert not any(opaque(engine, 2))


@needs_onednn
def test_packed_weights_are_still_shared_by_both_steps(first: FirstModel) -> None:
    engine = DecodeEngine(first.plain_base, first.routing.stack, "int8", compiled=False)
    for one, several in zip(engine.step(1).layers, engine.step(2).layers, strict=True):
        assert all(a is b for a, b in zip(one.weights, several.weights, strict=True))
    assert not any(opaque(engine, 2))


def test_float32_is_left_alone() -> None:
    first = FirstModel.from_base(tiny_llama())
    engine = DecodeEngine(first.plain_base, first.routing.stack, compiled=False)
    assert not any(opaque(engine, 2))


@pytest.mark.usefixtures("elsewhere")
def test_without_it_rows_take_the_plain_product(first: FirstModel) -> None:
    engine = DecodeEngine(first.plain_base, first.routing.stack, compiled=False)
    assert not any(opaque(engine, 2))  # and its trial step was near the model


@needs_onednn
@pytest.mark.usefixtures("anew")
def test_another_inductor_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._inductor.mkldnn_ir.LinearUnary")
    assert not onednn.takes(torch.zeros(2, 2, dtype=torch.bfloat16))
