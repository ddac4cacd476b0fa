# SPDX-License-Identifier: Apache-2.0
"""What routing promises beyond caches: skipped units do nothing, all of generate works, undoing."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import (
    FAMILIES,
    LAYERS,
    batch,
    decode,
    discarding,
    family,
    make_model,
    masks,
    mixed,
)
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from firstlm import FirstModel, FixedMask, RouterConfig
from firstlm.errors import ConfigError, UnsupportedModelError

NEW = 6


@contextmanager
def routed(name: str, unit: str = "block") -> Iterator[FirstModel]:
    first = FirstModel.from_base(family(name), RouterConfig(unit=unit))
    try:
        yield first
    finally:
        first.detach()


def spread(first: FirstModel, seed: int = 3) -> FirstModel:
    """Give the routers random weights, so that prompts differ in their masks."""
    torch.manual_seed(seed)
    for router in first.routers:
        router.weight.data.normal_(0, 3)
        router.bias.data.zero_()
    return first


def close(found: torch.Tensor, wanted: torch.Tensor, limit: float = 1e-4) -> bool:
    assert wanted.isfinite().all()
    return bool((found - wanted).abs().max() < limit * wanted.abs().max())


# Deleting layers


@pytest.mark.parametrize("keep", [*masks().values(), [True, False, False, True]])
@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", "model.layers"), ("qwen2", "model.layers"), ("gpt2", "transformer.h")],
)
def test_a_fixed_mask_is_the_model_without_these_layers(
    name: str, path: str, keep: list[bool]
) -> None:
    small = copy.deepcopy(family(name))
    owner = small.get_submodule(path.rsplit(".", 1)[0])
    kept = [layer for layer, on in zip(small.get_submodule(path), keep, strict=True) if on]
    setattr(owner, path.rsplit(".", 1)[1], nn.ModuleList(kept))
    small.config.num_hidden_layers = len(kept)
    ids, mask = batch()
    wanted, _ = decode(small, ids, mask, NEW, use_cache=False)
    with routed(name) as first, torch.no_grad():
        tokens, _ = decode(first, ids, mask, NEW, policy=FixedMask(keep))
        logits = first(ids, policy=FixedMask(keep))[0].logits
    assert torch.equal(tokens, wanted)
    assert torch.equal(logits, small(input_ids=ids, use_cache=False).logits)


# Units inside a layer

# No such module in the layer, or (GPT-NeoX Japanese) one whose output is not all it contributes.
REFUSED = {
    "attention": {"ctrl", "dbrx", "gpt_neox_japanese"},
    "mlp": {"biogpt", "opt", "xglm"},
}


@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_skipped_unit_contributes_nothing(name: str, unit: str) -> None:
    if name in REFUSED[unit]:
        with pytest.raises(UnsupportedModelError, match=r"switched.* Use unit='block'"):
            FirstModel.from_base(family(name), RouterConfig(unit=unit))
        return
    with routed(name, unit) as first:
        stack = first.routing.stack
        ids, mask = batch()
        keep = mixed(4, len(stack))
        keep[:, sorted(stack.locked)] = True
        tokens, logits = decode(first, ids, mask, 3, policy=FixedMask(keep))
        whole = torch.cat([mask, torch.ones(4, 2, dtype=mask.dtype)], 1)
        with torch.no_grad():
            again = first(tokens[:, :-1], whole, policy=FixedMask(keep))[0].logits[:, -3:]
        assert close(logits, again)
        first.detach()
        with discarding(keep, stack.modules, stack.units):
            wanted_tokens, wanted_logits = decode(first.base, ids, mask, 3, use_cache=True)
    assert torch.equal(tokens, wanted_tokens)
    assert close(logits, wanted_logits)


@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize(
    "name", ["llama", "bloom", "mpt", "gpt_oss", "falcon", "gpt_neox", "gemma3"]
)
def test_units_over_whole_batches(name: str, unit: str) -> None:
    ids, mask = batch((4, 3, 1, 4))
    with routed(name, unit) as first:
        stack = first.routing.stack
        with first.run_all():
            tokens, logits = decode(first, ids, mask, NEW)
        first.detach()
        wanted = decode(first.base, ids, mask, NEW, use_cache=True)
        first.routing.attach()
        assert torch.equal(tokens, wanted[0])
        assert torch.equal(logits, wanted[1])
        for label in ("first+last", "none kept", "odd"):
            keep = torch.tensor(masks()[label])
            tokens, logits = decode(first, ids, mask, NEW, policy=FixedMask(keep))
            first.detach()
            with discarding(keep, stack.modules, stack.units):
                wanted = decode(first.base, ids, mask, NEW, use_cache=True)
            first.routing.attach()
            assert torch.equal(tokens, wanted[0]), label
            assert close(logits, wanted[1]), label
            if name in ("llama", "gemma3"):
                static = decode(
                    first, ids, mask, NEW, policy=FixedMask(keep), cache_implementation="static"
                )
                assert torch.equal(static[0], tokens), label
                assert close(static[1], logits), label
        keep = mixed(4)
        tokens, logits = decode(first, ids, mask, NEW, policy=FixedMask(keep))
        for row, length in enumerate(mask.sum(1).tolist()):
            part = ids[row : row + 1, -length:]
            alone = decode(first, part, torch.ones_like(part), NEW, policy=FixedMask(keep[row]))
            assert torch.equal(tokens[row, -NEW:], alone[0][0, -NEW:]), row
            assert close(logits[row], alone[1][0]), row


@pytest.mark.parametrize("unit", ["attention", "mlp"])
def test_units_decide_the_same_for_the_same_prompt(unit: str) -> None:
    with routed("llama", unit) as first:
        spread(first)
        ids, mask = batch()
        keep = first.generate(ids, mask, max_new_tokens=1).keep
        assert 0 < keep.float().mean() < 1
        assert torch.equal(first.decide(*batch(side="right")).keep, keep)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = first.generate(ids[row : row + 1, -length:], max_new_tokens=1)
            assert torch.equal(alone.keep[0], keep[row])


# What a skipped unit does


@contextmanager
def counting(modules: list[nn.Module]) -> Iterator[list[list[int]]]:
    """Record, per module, how many rows each of its real calls had."""
    seen: list[list[int]] = [[] for _ in modules]
    handles = [
        module.register_forward_pre_hook(lambda _m, args, i=i: seen[i].append(args[0].shape[0]))
        for i, module in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_skipped_units_do_not_run(unit: str) -> None:
    ids, mask = batch()
    keep = mixed(4)
    keep[:, 2] = True
    with routed("llama", unit) as first:
        layers = first.routing.stack.modules
        attention = [layer.self_attn.q_proj for layer in layers]
        mlp = [layer.mlp.down_proj for layer in layers]
        with counting(attention) as attended, counting(mlp) as fed:
            output = first.generate(ids, mask, policy=FixedMask(keep), max_new_tokens=NEW)
    rows = keep.sum(0).tolist()
    assert rows[1] == 0
    assert rows[2] == 4
    assert 0 < rows[0] < 4
    routed_calls = [[n] * NEW if n else [] for n in rows]
    every = [[4] * NEW] * LAYERS
    assert attended == (every if unit == "mlp" else routed_calls)
    assert fed == (every if unit == "attention" else routed_calls)
    running = sum(n > 0 for n in rows)
    assert output.layer_calls == {"prefill": running, "decode": running * (NEW - 1)}
    assert torch.equal(output.keep, keep)
    assert output.skip_rate == pytest.approx(1 - keep.float().mean().item())


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_prefill_full_runs_the_prompt_everywhere(unit: str) -> None:
    ids, mask = batch()
    with routed("llama", unit) as first:
        layers = first.routing.stack.modules
        inner = "mlp.down_proj" if unit == "mlp" else "self_attn.q_proj"
        with counting([layer.get_submodule(inner) for layer in layers]) as seen:
            output = first.generate(
                ids,
                mask,
                policy=FixedMask([False, True, False, False]),
                prefill="full",
                max_new_tokens=NEW,
            )
    assert seen == [[4], [4] * NEW, [4], [4]]
    assert output.layer_calls == {"prefill": LAYERS, "decode": NEW - 1}


# All of generate


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bloom"])
def test_beams_take_their_masks_along(name: str, unit: str, kind: str) -> None:
    ids, mask = batch((9, 5, 4))
    keep = mixed(3)
    more = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": NEW,
        "do_sample": False,
        "output_scores": True,
    }
    with routed(name, unit) as first:
        output = first.generate(
            ids, mask, policy=FixedMask(keep), cache_implementation=kind, **more
        )
        first.detach()
        stack = first.routing.stack
        units = None if unit == "block" else stack.units
        with discarding(keep, stack.modules, units), torch.no_grad():
            wanted = first.base.generate(
                input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **more
            )
    assert torch.equal(output.sequences, wanted.sequences)
    assert len({tuple(row) for row in output.sequences.tolist()}) > 3
    torch.testing.assert_close(
        output.hf.sequences_scores, wanted.sequences_scores, rtol=0, atol=1e-4
    )
    assert torch.equal(output.keep, keep)


def test_samples_share_their_prompts_mask() -> None:
    ids, mask = batch()
    keep = mixed(4)
    more = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": NEW}
    with routed("llama") as first:
        torch.manual_seed(5)
        output = first.generate(ids, mask, policy=FixedMask(keep), **more)
        spread(first)
        decided = first.generate(ids, mask, **more).keep
        assert torch.equal(decided, first.decide(ids, mask).keep)
        first.detach()
        torch.manual_seed(5)
        with discarding(keep, first.routing.stack.modules), torch.no_grad():
            wanted = first.base.generate(input_ids=ids, attention_mask=mask, **more)
    assert torch.equal(output.sequences, wanted)
    assert output.keep.shape == (4, LAYERS)


def test_stopping_criteria_and_streamers() -> None:
    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    ids, mask = batch((9,))
    streamer = Collect()
    with routed("llama") as first:
        output = first.generate(
            ids,
            mask,
            policy=FixedMask([False, True, False, True]),
            max_new_tokens=20,
            stopping_criteria=StoppingCriteriaList([AtLength()]),
            streamer=streamer,
        )
    assert output.sequences.shape == (1, 12)
    assert streamer.tokens == output.sequences[0].tolist()
    assert streamer.ended
    assert output.ttft_s > 0
    assert output.decode_s > 0


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon"])
def test_prefill_full_skips_in_decoding_only(name: str, kind: str) -> None:
    ids, mask = batch()
    keep = mixed(4)
    with routed(name) as first:
        more = {"policy": FixedMask(keep), "prefill": "full", "cache_implementation": kind}
        tokens, logits = decode(first, ids, mask, NEW, **more)
        whole = torch.cat([mask, torch.ones(4, NEW - 1, dtype=mask.dtype)], 1)
        prompt = whole.bool()
        prompt[:, ids.shape[1] :] = False
        state = first.new_state(prompt, FixedMask(keep), prefill="full")
        with torch.no_grad():
            traced = first(tokens[:, :-1], whole, state=state)[0].logits[:, -NEW:]
        first.detach()
        with discarding(keep, first.routing.stack.modules, decode_only=True):
            wanted = decode(first.base, ids, mask, NEW, use_cache=True)
    assert torch.equal(tokens, wanted[0])
    assert close(logits, wanted[1])
    assert close(traced, wanted[1])


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunked_prefill(name: str, unit: str) -> None:
    ids, mask = batch()
    with routed(name, unit) as first:
        spread(first)
        plain = first.generate(ids, mask, prefill="full", max_new_tokens=NEW)
        chunked = first.generate(
            ids, mask, prefill="full", max_new_tokens=NEW, prefill_chunk_size=4
        )
        assert 0 < plain.keep.float().mean() < 1
        assert torch.equal(chunked.keep, plain.keep)
        assert torch.equal(chunked.sequences, plain.sequences)
        assert chunked.kv_bytes <= plain.kv_bytes
        with pytest.raises(ConfigError, match="prefill_chunk_size"):
            first.generate(ids, mask, max_new_tokens=NEW, prefill_chunk_size=4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_continued_cache_keeps_its_mask(name: str, kind: str) -> None:
    ids, mask = batch((9, 5))
    with routed(name) as first:
        spread(first)
        turn = _four_tokens(first, ids, mask, kind)
        assert 0 < turn.keep.float().mean() < 1
        more = batch((5, 5), seed=7)[0]
        ids2 = torch.cat([turn.sequences, more], 1)
        mask2 = torch.cat([mask, torch.ones(2, ids2.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        tokens, logits = decode(first, ids2, mask2, NEW, past_key_values=turn.cache)
        assert torch.equal(turn.cache.state.keep, turn.keep)
        whole = torch.cat([mask2, torch.ones(2, NEW - 1, dtype=mask.dtype)], 1)
        with torch.no_grad():
            output, _ = first(tokens[:, :-1], whole, policy=FixedMask(turn.keep))
        assert close(logits, output.logits[:, -NEW:])
        with pytest.raises(ConfigError, match="keeps its mask"):
            first.generate(ids2, mask2, cache=turn.cache, skip_rate=0.0)


def _four_tokens(first: FirstModel, ids: torch.Tensor, mask: torch.Tensor, kind: str) -> Any:
    """Generate 4 tokens into a cache that has room for more."""

    class AfterFour(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= ids.shape[1] + 4)

    return first.generate(
        ids,
        mask,
        max_new_tokens=20,
        cache_implementation=kind,
        stopping_criteria=StoppingCriteriaList([AfterFour()]),
    )


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("why", "input_ids is str; expected a tensor"),
        ([[1, 2]], "input_ids is list; expected a tensor"),
        (torch.tensor([1, 2]), r"the shape \(2,\)"),
        (torch.zeros(1, 2), "dtype torch.float32; expected whole numbers"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
    ],
)
def test_what_is_no_batch_of_token_ids(prompts: Any, words: str) -> None:
    with routed("llama") as first, pytest.raises(ConfigError, match=words):
        first.generate(prompts)


def test_arguments_of_other_kinds_are_named() -> None:
    ids, mask = batch((4,))
    with routed("llama") as first:
        for more, words in (
            ({"attention_mask": mask.tolist()}, "attention_mask is list"),
            ({"policy": "router"}, "policy is 'router'; expected an object that decides"),
            ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds is not supported"),
        ):
            with pytest.raises(ConfigError, match=words):
                first.generate(ids, **more)
        first.detach()
        with pytest.raises(ConfigError, match="config is dict; expected a RouterConfig"):
            FirstModel.from_base(first.base, {"unit": "mlp"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="keep is no mask"):
        FixedMask([[True], [True, False]])


def test_a_generation_config_is_taken_without_a_warning(caplog, recwarn) -> None:
    ids, mask = batch((4,))
    with routed("llama") as first:
        given = GenerationConfig(max_new_tokens=3, do_sample=False, use_cache=False)
        out = first.generate(ids, attention_mask=mask, generation_config=given)
        assert out.sequences.shape == (1, 7)
        assert given.use_cache is False
    assert not [w for w in recwarn if "generation" in str(w.message)]
    assert "deprecated" not in caplog.text


def test_options_that_cannot_work() -> None:
    ids, mask = batch((4,))
    with routed("llama") as first:
        static = first.generate(ids, mask, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(ConfigError, match="room for 6 tokens"):
            first.generate(static.sequences, cache=static.cache, max_new_tokens=9)
        for more, words in (
            ({"assistant_model": first.base}, "rolls the cache back"),
            (
                {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
                "rolls the cache",
            ),
            ({"use_cache": False}, "ride in the cache"),
            ({"past_key_values": object()}, r"\.cache of an earlier output"),
            ({"prefill": "half"}, "expected 'skip' or 'full'"),
            ({"policy": FixedMask([True] * 4), "skip_rate": 0.5}, "give one of them"),
            ({"policy": FixedMask([True] * 3)}, "3 layers, but the model has 4"),
            ({"policy": FixedMask([[True] * 4] * 2)}, "2 rows for 1 prompts"),
            ({"skip_rate": 0.3}, "calibrate"),
        ):
            with pytest.raises(ConfigError, match=words):
                first.generate(ids, mask, max_new_tokens=2, **more)
    with pytest.raises(ConfigError, match="expected one of block, attention, mlp"):
        FirstModel.from_base(family("llama"), RouterConfig(unit="head"))
    with pytest.raises(ConfigError, match="dtype"):
        FixedMask([1, 0, 1, 1])


# Undoing


def test_detach_puts_everything_back() -> None:
    base = make_model("llama")
    names = [name for name, _ in base.named_modules()]
    keys = list(base.state_dict())
    parameters = {name: id(p) for name, p in base.named_parameters()}
    before = {name: dict(vars(module)) for name, module in base.named_modules()}
    for unit in ("block", "attention", "mlp"):
        first = FirstModel.from_base(base, RouterConfig(unit=unit))
        assert any("forward" in vars(module) for module in base.modules())
        assert list(base.state_dict()) == keys
        assert [name for name, _ in base.named_modules()] == names
        first.generate(*batch(), policy=FixedMask(mixed(4)), max_new_tokens=2)
        assert first.detach() is base
        assert {name: dict(vars(module)) for name, module in base.named_modules()} == before
    assert {name: id(p) for name, p in base.named_parameters()} == parameters


def test_a_forward_that_was_there_before_is_used_and_put_back() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        def __init__(self) -> None:
            self.calls = Counter[str]()

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls["pre"] += 1
            return args, kwargs

    base = make_model("llama")
    hook = Count()
    layer = base.model.layers[1]
    add_hook_to_module(layer, hook)
    own = vars(layer)["forward"]
    first = FirstModel.from_base(base)
    hook.calls.clear()
    ids, mask = batch()
    first.generate(ids, mask, policy=FixedMask([True] * 4), max_new_tokens=3)
    assert hook.calls["pre"] == 3
    first.generate(ids, mask, policy=FixedMask([True, False, True, True]), max_new_tokens=3)
    assert hook.calls["pre"] == 3
    first.detach()
    assert vars(layer)["forward"] is own


def test_attaching_twice_is_harmless() -> None:
    with routed("llama") as first:
        ids, mask = batch()
        first.routing.attach()
        once = first.generate(ids, mask, policy=FixedMask(mixed(4)), max_new_tokens=3)
        assert once.layer_calls == {"prefill": 3, "decode": 6}
        first.detach()
        first.detach()
        assert all("forward" not in vars(m) for m in first.base.modules())


def test_a_model_is_routed_once_at_a_time() -> None:
    with routed("llama") as first:
        ids, mask = batch()
        with pytest.raises(ConfigError, match=r"another FirstModel.*detach"):
            FirstModel.from_base(first.base)
        once = first.generate(ids, mask, policy=FixedMask(mixed(4)), max_new_tokens=3)
        assert once.layer_calls == {"prefill": 3, "decode": 6}
        base = first.detach()
        FirstModel.from_base(base).detach()


def test_without_firstlms_generate_the_base_is_as_before() -> None:
    ids, mask = batch()
    wanted = decode(family("gpt2"), ids, mask, NEW)
    with routed("gpt2") as first:
        for router in first.routers:
            router.bias.data.fill_(-5)
        found = decode(first.base, ids, mask, NEW)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


# peft


def lora(base: Any, seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("late", [False, True])
def test_lora(unit: str, late: bool) -> None:
    ids, mask = batch()
    keep = mixed(4)
    plain = decode(make_model("llama"), ids, mask, NEW)
    names = [name for name, _ in lora(make_model("llama")).named_parameters()]
    if late:  # as training does: routers first, then the adapter
        first = FirstModel.from_base(make_model("llama"), RouterConfig(unit=unit))
        first.base = lora(first.base)
    else:
        first = FirstModel.from_base(lora(make_model("llama")), RouterConfig(unit=unit))
    assert [name for name, _ in first.base.named_parameters()] == names
    stack = first.routing.stack
    tokens, logits = decode(first, ids, mask, NEW, policy=FixedMask(keep))
    units = None if unit == "block" else [*stack.units]
    if unit == "mlp":
        assert units == [layer.mlp for layer in stack.modules]
    first.detach()
    with discarding(keep, stack.modules, units):
        wanted = decode(first.base, ids, mask, NEW)
    first.routing.attach()
    assert torch.equal(tokens, wanted[0])
    assert close(logits, wanted[1])
    with first.run_all():
        adapted = decode(first, ids, mask, NEW)
        with first.disable_adapter():
            off = decode(first, ids, mask, NEW)
    assert torch.equal(off[0], plain[0])
    assert torch.equal(off[1], plain[1])
    assert not close(adapted[1], plain[1], 1e-2)
    assert first.merge_and_unload() is first
    assert not first.has_adapter
    merged = decode(first, ids, mask, NEW, policy=FixedMask(keep))
    assert torch.equal(merged[0], tokens)
    assert close(merged[1], logits)


# Training


def checkpoint(first: FirstModel, reentrant: bool = False) -> None:
    """Turn on gradient checkpointing, under its name in this transformers."""
    base = first.base
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})


def gradients(first: FirstModel, gate: str, checkpointing: bool, prefill: str = "skip") -> Any:
    """Return loss and gradients of routers and LoRA after one step through a policy that wavers."""
    first.zero_grad()
    first.base.train()
    if checkpointing:
        checkpoint(first)
    first.base.enable_input_require_grads()
    ids, mask = batch()
    prompt = mask.bool()
    prompt[:, -3:] = False
    prompt[2] = mask[2].bool()
    state = first.new_state(prompt, prefill=prefill, gate=gate)
    with first.routing.tracing(state):
        output, _ = first(ids, mask, state=state)
        keep = state.keep.clone()
        loss = output.logits[:, -3:].square().mean() + state.rho.sum()
        calls = dict(state.layer_calls)
        loss.backward()
    assert torch.equal(state.keep, keep)
    found = {name: p.grad.clone() for name, p in first.named_parameters() if p.grad is not None}
    return loss.detach(), found, keep, calls


@pytest.mark.parametrize("gate", ["hard", "straight_through", "soft"])
@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_gradient_checkpointing_changes_no_gradient(unit: str, gate: str) -> None:
    first = spread(FirstModel.from_base(lora(make_model("llama")), RouterConfig(unit=unit)))
    for router in first.routers:
        router.weight.data.mul_(0.02)
    first.routers[0].bias.data.fill_(-0.5)
    wanted = gradients(first, gate, checkpointing=False)
    found = gradients(first, gate, checkpointing=True)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])
    assert 0 < wanted[2].float().mean() < 1
    assert found[1].keys() == wanted[1].keys()
    assert any("lora_" in name for name in found[1])
    assert any("routers" in name for name in found[1])
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_decisions_are_written_once_under_checkpointing(unit: str) -> None:
    class Wavering:
        """Answers differently whenever asked again."""

        def __init__(self) -> None:
            self.asked = Counter[int]()

        def decide(self, layer: int, prompts: Any) -> torch.Tensor:
            self.asked[layer] += 1
            return torch.full((prompts.count,), (self.asked[layer] + layer) % 2 == 0)

    first = FirstModel.from_base(lora(make_model("llama")), RouterConfig(unit=unit))
    first.base.train()
    checkpoint(first)
    first.base.enable_input_require_grads()
    state = first.new_state(batch()[1], Wavering())
    inner = "self_attn.q_proj" if unit == "attention" else "mlp.down_proj"
    modules = [layer.get_submodule(inner) for layer in first.routing.stack.modules]
    with first.routing.tracing(state), counting(modules) as seen:
        output, _ = first(*batch(), state=state)
        keep = state.keep.clone()
        output.logits.square().mean().backward()
    assert torch.equal(state.keep, keep)
    assert keep[0].tolist() == [False, True, False, True]
    assert seen == [[], [4, 4], [], [4, 4]], "kept layers run twice, the others not at all"


def test_reentrant_checkpointing_is_right_or_refused() -> None:
    found = []
    for reentrant in (None, True):
        first = spread(FirstModel.from_base(lora(make_model("llama"))))
        first.base.train()
        first.base.enable_input_require_grads()
        if reentrant:
            checkpoint(first, reentrant)
        state = first.new_state(batch()[1], gate="soft")
        try:
            with first.routing.tracing(state):
                first(*batch(), state=state)[0].logits.square().mean().backward()
        except ConfigError as error:  # transformers before 5.23 checkpoints decisions too
            assert "use_reentrant" in str(error)  # noqa: PT017
            return
        found.append(first.routers[0].weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate", ["straight_through", "soft"])
@pytest.mark.parametrize("prefill", ["skip", "full"])
@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
def test_routers_learn_from_the_answer(unit: str, prefill: str, gate: str) -> None:
    first = spread(FirstModel.from_base(make_model("llama"), RouterConfig(unit=unit)))
    for router in first.routers:
        router.weight.data.mul_(0.02)
    ids, mask = batch()
    prompt = mask.bool()
    prompt[:, -3:] = False
    prompt[2] = mask[2].bool()
    state = first.new_state(prompt, prefill=prefill, gate=gate)
    output, _ = first(ids, mask, state=state)
    output.logits[:, -1].square().mean().backward()
    for router in first.routers:
        assert router.weight.grad.abs().max() > 0
    if gate == "straight_through":
        hard = first.new_state(prompt, prefill=prefill)
        with torch.no_grad():
            assert close(first(ids, mask, state=hard)[0].logits, output.logits, 1e-12)
        assert torch.equal(hard.keep, state.keep)
