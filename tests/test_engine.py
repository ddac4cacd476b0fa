# SPDX-License-Identifier: Apache-2.0
"""The fast engine gives what the model gives: over families, masks, batches, LoRA, formats."""

from __future__ import annotations

import copy
import functools
import gc
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from conftest import tiny_llama
from families import FAMILIES, batch, mixed
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from firstlm import FirstModel, FixedMask
from firstlm.baselines import Baseline
from firstlm.capture import capture
from firstlm.config import RouterConfig
from firstlm.engine import DecodeEngine
from firstlm.errors import ConfigError, UnsupportedModelError
from firstlm.fast_batch import FastBatch
from firstlm.generate import decode_step, prefill, stream
from firstlm.packing import pack, pack_linears
from firstlm.policies import RunAll
from firstlm.replays import Calls

NEW = 6
# Falling back to transformers would make tests of the engine pass.
pytestmark = pytest.mark.filterwarnings("error:.*decodes with engine='hf'")
# Attention that is not one of transformers' exchangeable functions, or masks of their own (alibi,
# chunks), layers that need more than hidden states and positions, experts chosen by Python code.
REFUSED = {
    *("bloom", "mpt", "falcon", "falcon_new", "falcon_alibi", "gpt_neo", "gpt_neox_japanese"),
    *("diffllama", "doge", "xglm", "llama4", "gemma4_shared", "dbrx"),
    *("deepseek_v32", "gpt_bigcode"),
}


# One of each kind of layer; the others take minutes together.
QUICK = {
    *("llama", "gemma3", "gpt2", "gpt_neox", "qwen3_sliding", "mixtral", "gpt_oss", "deepseek_v2"),
    *("opt", "phi3", "cohere2", "bloom", "llama4", "doge", "phimoe", "gemma4_shared"),
}


@pytest.fixture(
    params=[f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def routed(request: pytest.FixtureRequest) -> Iterator[FirstModel]:
    first = FirstModel.from_base(families.family(request.param))
    first.family = request.param
    yield first
    first.detach()


@pytest.fixture(scope="module")
def llama() -> FirstModel:
    """A tiny Llama whose engine stays compiled for all tests here."""
    return FirstModel.from_base(tiny_llama())


def by_operation(
    first: FirstModel, weights: str = "same", calls: Calls | None = None
) -> DecodeEngine:
    """Return an engine that needs no compiler."""
    return DecodeEngine(first.plain_base, first.routing.stack, weights, False, calls)


def logits_of(
    first: FirstModel, engine: DecodeEngine, ids: Any, mask: Any, keep: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [steps, rows, vocab] of the engine and of the model itself, same tokens."""
    theirs = prefill(first, ids, mask, policy=FixedMask(keep))
    ours = engine.start(theirs.cache, mask, NEW)
    found, wanted = [], []
    for _ in range(NEW):
        token = theirs.logits.argmax(-1)
        found.append(ours.step(token))
        wanted.append(decode_step(first, theirs, token))
    return torch.stack(found), torch.stack(wanted)


def answers(first: FirstModel, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> list[Any]:
    return [t.ids.tolist() for t in stream(first, ids, mask, max_new_tokens=NEW, **options)]


def test_every_family_decodes_as_it_always_did_or_is_refused(routed: FirstModel) -> None:
    ids, mask = batch()
    keep = mixed(len(ids), routed.layer_count)
    keep[:, 2] = torch.tensor([True, True, False, False])
    keep[:, sorted(routed.routing.stack.locked)] = True
    engine = by_operation(routed)
    if routed.family not in REFUSED:
        engine.step(1)  # both steps share packed weights
    if routed.family in REFUSED:
        with pytest.raises(UnsupportedModelError):
            engine.step(2)
        return
    found, wanted = logits_of(routed, engine, ids, mask, keep)
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5  # attention is in float32


@pytest.mark.parametrize("rows", [1, 4])
def test_compiled_steps_give_the_same_tokens(llama: FirstModel, rows: int) -> None:
    ids, mask = batch((9, 5, 1, 7)[:rows])
    for keep in (torch.ones(rows, 4).bool(), mixed(rows), torch.eye(4).bool()[:rows]):
        options = {"policy": FixedMask(keep)}
        wanted = answers(llama, ids, mask, **options)
        assert answers(llama, ids, mask, engine="fast", **options) == wanted
        hf = llama.generate(ids, mask, max_new_tokens=NEW, **options)
        fast = llama.generate(ids, mask, max_new_tokens=NEW, engine="fast", **options)
        assert torch.equal(fast.sequences, hf.sequences)
        assert fast.cache.batch is not None  # the engine, and not transformers
        assert fast.layer_calls == hf.layer_calls
        assert torch.equal(fast.keep, hf.keep)


def test_prompts_that_run_all_layers_and_answers_of_one_token(llama: FirstModel) -> None:
    ids, mask = batch((9, 5, 1, 7))
    options = {"policy": FixedMask(mixed(4)), "max_new_tokens": NEW}
    for more in ({"prefill": "full"}, {"prefill": "full", "prefill_chunk_size": 3}):
        wanted = llama.generate(ids, mask, **options, **more)
        found = llama.generate(ids, mask, engine="fast", **options, **more)
        assert torch.equal(found.sequences, wanted.sequences)
        assert found.layer_calls == wanted.layer_calls
    options = {"policy": FixedMask([False] * 4), "max_new_tokens": 1}
    wanted = llama.generate(ids, mask, **options)
    assert torch.equal(
        llama.generate(ids, mask, engine="fast", **options).sequences, wanted.sequences
    )


def test_a_cache_of_transformers_is_continued_by_the_engine(llama: FirstModel) -> None:
    ids, mask = batch((9, 5))
    policy = FixedMask(mixed(2))
    first = llama.generate(ids, mask, policy=policy, max_new_tokens=4)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
    mask[1, -3:-1] = 0  # a hole, as fillers after the end of an answer are
    found = []
    for engine in ("hf", "fast"):
        cache = copy.deepcopy(first.cache)
        options = {"cache": cache, "engine": engine, "max_new_tokens": NEW}
        found.append(llama.generate(first.sequences, mask, **options).sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["qwen2_moe", "gemma3"])
def test_windows_shorter_than_the_prompt_hold(family: str) -> None:
    first = FirstModel.from_base(families.make_model(family, use_sliding_window=True))
    ids, mask = batch((30, 22))
    found, wanted = logits_of(first, by_operation(first), ids, mask, torch.ones(2, 4).bool())
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


class Embedded(LlamaModel):
    """Its layers see the embeddings, too."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        first = self.embed_tokens(input_ids)
        return super().forward(**{**kwargs, "inputs_embeds": first, "first": first})


class EmbeddedLayer(LlamaDecoderLayer):
    @functools.wraps(LlamaDecoderLayer.forward)
    def forward(self, hidden_states: Any, *args: Any, first: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states + first, *args, **kwargs)


@pytest.mark.parametrize("rows", [1, 4])
def test_layers_that_see_what_the_first_of_them_saw(rows: int) -> None:
    base = tiny_llama()
    base.model.__class__ = Embedded
    for layer in base.model.layers:
        layer.__class__ = EmbeddedLayer
    first = FirstModel.from_base(base)
    ids, mask = batch((9, 5, 1, 7)[:rows])
    found, wanted = logits_of(first, by_operation(first), ids, mask, mixed(rows))
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-5


def test_sampling_and_several_answers_go_through_transformers(llama: FirstModel) -> None:
    ids, mask = batch((9, 5))
    options = {"policy": FixedMask(mixed(2)), "do_sample": True, "top_k": 20, "max_new_tokens": NEW}
    found = []
    for engine in ("hf", "fast"):
        torch.manual_seed(5)
        output = llama.generate(ids, mask, engine=engine, num_return_sequences=2, **options)
        found.append(output.sequences)
    assert torch.equal(*found)


def count_programs() -> int:
    """Return how many graphs inductor has made programs of."""
    from torch._dynamo.utils import counters

    found = counters["inductor"]
    return found["fxgraph_cache_hit"] + found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"]


def test_routers_decide_and_a_new_mask_compiles_nothing(
    llama: FirstModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = batch((9, 5, 1, 7))
    llama.generate(ids, mask, max_new_tokens=2, engine="fast")
    engine = llama.engines.get(llama.plain_base, "same", 4)
    assert engine is not None
    monkeypatch.setattr(torch._inductor, "standalone_compile", None)
    programs = count_programs()
    for seed in range(3):
        torch.manual_seed(seed)
        for router in llama.routers:
            router.weight.data.normal_(0, 3)
        wanted = llama.generate(ids, mask, max_new_tokens=NEW)
        found = llama.generate(ids, mask, max_new_tokens=NEW, engine="fast")
        assert torch.equal(found.sequences, wanted.sequences)
    assert count_programs() == programs
    assert llama.engines.get(llama.plain_base, "same", 4) is engine


def with_lora() -> FirstModel:
    """A tiny Llama with LoRA that changes what it says."""
    base = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return FirstModel.from_base(base)


def test_lora_is_merged_into_what_is_decoded_with() -> None:
    first = with_lora()
    ids, mask = batch((9, 5))
    wants_gradient = [n for n, p in first.named_parameters() if p.requires_grad]
    found, wanted = logits_of(first, by_operation(first), ids, mask, mixed(2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with first.disable_adapter():
        found, plain = logits_of(first, by_operation(first), ids, mask, mixed(2))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, wanted, atol=0.01)
    assert wants_gradient == [n for n, p in first.named_parameters() if p.requires_grad]


def test_merged_lora_stays_merged_and_other_kinds_are_refused() -> None:
    first = with_lora()
    first.base.merge_adapter()
    found, wanted = logits_of(first, by_operation(first), *batch((9, 5)), mixed(2))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert first.plain_base.model.layers[0].self_attn.q_proj.merged
    config = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    first = FirstModel.from_base(get_peft_model(tiny_llama(), config))
    with pytest.raises(UnsupportedModelError, match="DoRA"):
        by_operation(first).step(1)


def test_an_engine_is_made_anew_when_weights_change_or_lora_is_turned_off() -> None:
    first = with_lora()
    engines, base = first.engines, first.plain_base
    made = engines.get(base, "same", 1)
    assert engines.get(base, "same", 1) is made
    with first.disable_adapter():
        assert engines.get(base, "same", 1) is not made
    assert engines.get(base, "same", 1) is made
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.mul_(3.0)
    assert engines.get(base, "same", 1) is not made
    ids, mask = batch((9,))
    assert answers(first, ids, mask, engine="fast") == answers(first, ids, mask)


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's own kernels")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.01), ("int4", 0.12)])
def test_packed_weights_are_near_and_products_follow_them(
    weights: str, bound: float, device: str
) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    weight, x = (torch.randn(rows, 64, device=device, dtype=dtype) for rows in (40, 3))
    whole, scale = pack(weight, weights)

    def product(x: torch.Tensor) -> torch.Tensor:
        if weights == "int8":
            return torch.ops.aten._weight_int8pack_mm(x, whole, scale)
        end = "_for_cpu" if device == "cpu" else ""
        kernel = getattr(torch.ops.aten, f"_weight_int4pack_mm{end}")
        return kernel(x, whole, 32, scale)[:, :40]

    near = product(torch.eye(64, device=device, dtype=dtype)).T
    assert 0 < (near - weight).norm() / weight.norm() < bound
    torch.testing.assert_close(product(x), x @ near.T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 2])
def test_int4_takes_the_kernel_of_its_device(rows: int) -> None:
    """Shapes alone, without a GPU."""
    first = FirstModel.from_base(tiny_llama(hidden=64).to(torch.bfloat16))
    graphs = capture(first.plain_base.to("meta"), first.routing.stack, rows)
    packed = pack_linears(graphs.kinds[0], "int4")
    nodes = {n.name: n for n in packed.traced.graph.graph.nodes}
    used = {str(n.target) for n in nodes.values() if "int4" in str(n.target)}
    assert used == {"aten._weight_int4pack_mm.default"}
    whole, pairs = (nodes[name].meta["val"] for name in packed.joined[0].placeholders)
    outputs = 64 + 2 * 32  # queries, keys and values
    assert list(whole.shape) == [outputs // 8, 64 // 64, 32, 4 // 2]  # 4 tiles of 16 inputs
    assert list(pairs.shape) == [64 // 32, outputs, 2]
    single = FirstModel.from_base(tiny_llama(hidden=64))
    graphs = capture(single.plain_base.to("meta"), single.routing.stack, rows)
    with pytest.raises(UnsupportedModelError, match="not in bfloat16"):
        pack_linears(graphs.kinds[0], "int4")


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_packed_models_decode_near_the_model(weights: str, rows: int) -> None:
    first = FirstModel.from_base(tiny_llama(hidden=64))
    ids, mask = batch((9, 5, 7)[:rows])
    found, wanted = logits_of(first, by_operation(first, weights), ids, mask, mixed(rows))
    alike = torch.cosine_similarity(found, wanted, dim=-1).min()
    assert (0.999 if weights == "int8" else 0.9) < alike < 1 - 1e-7


def test_memory_falls_by_the_share_of_layers_skipped(llama: FirstModel) -> None:
    ids, mask = batch((9, 5))
    bytes_by_kept = {}
    for kept in range(1, 5):
        keep = torch.arange(4) < kept
        output = llama.generate(
            ids, mask, policy=FixedMask(keep), max_new_tokens=NEW, engine="fast"
        )
        bytes_by_kept[kept] = output.kv_bytes
        held = [s for s in output.cache.layers if getattr(s, "keys", None) is not None]
        assert not held  # the prompt's own copies are gone
    assert all(found == kept * bytes_by_kept[1] for kept, found in bytes_by_kept.items())
    # Two rows, two heads, keys and values, 32 tokens, 8 numbers of 4 bytes.
    assert bytes_by_kept[1] == 2 * 2 * 2 * 32 * 8 * 4


def test_models_that_cannot_be_captured_decode_as_before_with_one_warning() -> None:
    first = FirstModel.from_base(families.make_model("bloom"))
    ids, mask = batch((9, 5))
    wanted = answers(first, ids, mask)
    with pytest.warns(UserWarning, match="Bloom.* decodes with engine='hf'.* position_ids"):
        assert answers(first, ids, mask, engine="fast") == wanted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answers(first, ids, mask, engine="fast") == wanted


def test_formats_that_pack_little_or_nothing_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be packed"):
        by_operation(FirstModel.from_base(families.make_model("gpt2").float()), "int8").step(1)
    first = FirstModel.from_base(families.make_model("llama"))  # in float64
    for rows in (1, 2):
        with pytest.raises(UnsupportedModelError, match="float64"):
            by_operation(first, "int8").step(rows)


def test_a_step_that_computes_something_else_is_not_kept() -> None:
    engine = by_operation(FirstModel.from_base(families.make_model("doge")))
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="other logits"):
            engine.step(2)


def test_rows_that_are_put_back_in_other_places_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_their_order(hidden: torch.Tensor, _: int, index: Any, source: torch.Tensor) -> Any:
        return hidden[: len(index)].copy_(source)

    first = FirstModel.from_base(tiny_llama())
    monkeypatch.setattr(torch.Tensor, "index_copy_", in_their_order)
    with pytest.raises(UnsupportedModelError, match="gives other logits"):
        by_operation(first).step(2)


def test_a_failing_compiler_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("gcc: not found")

    monkeypatch.setattr(torch._inductor, "standalone_compile", broken)
    first = FirstModel.from_base(tiny_llama())
    ids, mask = batch((9, 5))
    with pytest.warns(UserWarning, match="gcc: not found"):
        found = first.generate(ids, mask, max_new_tokens=NEW, engine="fast")
    assert torch.equal(found.sequences, first.generate(ids, mask, max_new_tokens=NEW).sequences)


def test_units_inside_layers_decode_as_before() -> None:
    first = FirstModel.from_base(tiny_llama(), RouterConfig(unit="mlp"))
    ids, mask = batch((9, 5))
    with pytest.warns(UserWarning, match="mlp units"):
        assert answers(first, ids, mask, engine="fast") == answers(first, ids, mask)


def test_detach_takes_the_engine_off_the_model() -> None:
    base = tiny_llama()
    first = FirstModel.from_base(base)
    for _ in range(2):
        first.generate(*batch((9, 5)), max_new_tokens=3, engine="fast")
    overridden = base.forward
    first.generate(*batch((9, 5)), max_new_tokens=3, engine="fast")
    assert base.forward is overridden
    assert first.detach() is base
    assert "forward" not in vars(base)


def test_what_the_engine_cannot_do_is_refused(llama: FirstModel) -> None:
    ids, mask = batch((9, 5))
    with pytest.raises(ConfigError, match="hf, fast"):
        llama.generate(ids, mask, engine="slow")
    with pytest.raises(ConfigError, match="needs engine='fast'"):
        llama.generate(ids, mask, weights="int8")
    with pytest.raises(ConfigError, match="int4"):
        llama.generate(ids, mask, engine="fast", weights="int3")
    with pytest.raises(ConfigError, match="allocates its own memory"):
        llama.generate(ids, mask, engine="fast", cache_implementation="static")
    with pytest.raises(ConfigError, match="allocates its own memory"):
        answers(llama, ids, mask, engine="fast", cache="static")
    with pytest.raises(ConfigError, match="output_hidden_states"):
        llama.generate(ids, mask, engine="fast", output_hidden_states=True)
    with pytest.raises(ConfigError, match="Beam search"):
        llama.generate(ids, mask, engine="fast", num_beams=2, max_new_tokens=3)
    policy = Baseline("skip_decode", 4, (0, 1, 2, 3), 0.25, answers=(0, 1, 2)).at(0.25)
    with pytest.raises(ConfigError, match="engine='hf'"):
        llama.generate(ids, mask, engine="fast", policy=policy)
    output = llama.generate(ids, mask, engine="fast", max_new_tokens=3)
    with pytest.raises(ConfigError, match="cannot be continued"):
        llama.generate(output.sequences, cache=output.cache, max_new_tokens=3)
    with pytest.raises(ConfigError, match="engine='hf'"):
        output.cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(ConfigError, match="engine='hf'"):
        output.cache.crop(-1)


def test_a_full_batch_says_so(llama: FirstModel) -> None:
    ids, mask = batch((9, 5))
    theirs = prefill(llama, ids, mask)
    ours: FastBatch = by_operation(llama).start(theirs.cache, mask, 1)
    for _ in range(ours.room - 9):
        ours.step(torch.ones(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="full with 32 tokens"):
        ours.step(torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("call", range(8))
def test_a_join_that_fails_leaves_the_rows_that_are_there(
    llama: FirstModel, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    engine = by_operation(llama)

    def start(length: int, room: int) -> FastBatch:
        ids, mask = batch((length,))
        return engine.start(prefill(llama, ids, mask, policy=RunAll()).cache, mask, room)

    calls = iter(range(100))
    cat = torch.cat

    def failing(*args: Any, **options: Any) -> torch.Tensor:
        if next(calls) == call:
            raise RuntimeError("out of memory")
        return cat(*args, **options)

    ours, untouched, other = start(9, 20), start(9, 20), start(5, 60)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            ours.join([other])
    assert (ours.kv_bytes, ours.room, ours.count) == (untouched.kv_bytes, untouched.room, 1)
    for token in range(5, 15):
        ids = torch.tensor([token])
        assert torch.equal(ours.step(ids), untouched.step(ids))


def test_a_long_row_that_leaves_takes_its_room_along(llama: FirstModel) -> None:
    engine = by_operation(llama)

    def start(length: int, room: int) -> FastBatch:
        ids, mask = batch((length,))
        return engine.start(prefill(llama, ids, mask, policy=RunAll()).cache, mask, room)

    ours, untouched = start(5, 20), start(5, 20)
    ours.join([start(100, 200)])
    assert ours.room == 320
    for token in range(5, 9):
        ids = torch.tensor([token, token])
        assert torch.allclose(ours.step(ids)[:1], untouched.step(ids[:1]), atol=1e-5)
    ours.select([0])
    assert (ours.room, ours.kv_bytes) == (32, untouched.kv_bytes)
    ours.join([start(5, 20) for _ in range(3)])
    assert ours.kv_bytes == 4 * untouched.kv_bytes
    for token in range(9, 20):
        ids = torch.tensor([token] * 4)
        assert torch.allclose(ours.step(ids)[:1], untouched.step(ids[:1]), atol=1e-5)


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_over_a_thousand_generations(llama: FirstModel) -> None:
    torch.manual_seed(0)
    ids = torch.arange(3, 15).view(2, 6)

    def generations(count: int) -> None:
        for _ in range(count):
            keep = torch.rand(2, llama.layer_count) > 0.4
            llama.generate(
                ids, policy=FixedMask(keep), max_new_tokens=3, engine="fast", eos_token_id=None
            )

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    generations(200)  # what is allocated once
    known, before, programs = tensors(), resident(), count_programs()
    generations(1000)
    assert tensors() <= known
    assert count_programs() == programs
    # Keys and values of one generation are 16 KiB, so that a leak of them would be 16 MiB.
    assert resident() - before < 8 * 2**20
