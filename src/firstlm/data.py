# SPDX-License-Identifier: Apache-2.0
"""Token ids and batches out of examples, and the split into training and validation.

The same `encode_prompt` serves training and inference, so both see the same prompt tokens.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from firstlm.errors import ConfigError, DataError
from firstlm.examples import Example, load_examples
from firstlm.inputs import pad_left
from firstlm.results import to_json

T = TypeVar("T")
log = logging.getLogger(__name__)

IGNORE = -100  # label of positions without loss


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt (as in inference) and of its answer, which ends with EOS."""

    prompt_ids: list[int]
    answer_ids: list[int]


def encode_prompt(example: Example | str, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt, with the tokenizer's BOS once and no EOS."""
    return _prompt_ids(example, tokenizer, "")


def _prompt_ids(example: Example | str, tokenizer: Any, more: str) -> list[int]:
    text, chat = (example, False) if isinstance(example, str) else (example.prompt, example.chat)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token_id
    written = chat or (bool(bos) and text.startswith(bos))
    ids = list(tokenizer(text + more, add_special_tokens=not written)["input_ids"])
    if not written and ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers close every text
    return ids


def encode(example: Example, tokenizer: Any, max_length: int | None = None) -> Encoded:
    """Tokenise an example; the answer continues the prompt's own ids and ends with EOS.

    Raises:
        DataError: the two together are longer than `max_length`, or one has no tokens.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no eos_token, so answers cannot end; set one.")
    prompt_ids = encode_prompt(example, tokenizer)
    both = _prompt_ids(example, tokenizer, example.completion)
    if both[: len(prompt_ids)] == prompt_ids:
        answer_ids = both[len(prompt_ids) :]
    else:  # a token would reach across the border: keep the ids that inference sees
        answer_ids = list(tokenizer(example.completion, add_special_tokens=False)["input_ids"])
    label = f"{example.where or 'example'} (id {example.id})"
    if not prompt_ids or not answer_ids:
        raise DataError(f"{label}: {'answer' if prompt_ids else 'prompt'} without any token.")
    if answer_ids[-1] != tokenizer.eos_token_id:
        answer_ids.append(tokenizer.eos_token_id)
    total = len(prompt_ids) + len(answer_ids)
    if max_length is not None and total > max_length:
        raise DataError(
            f"{label}: prompt of {len(prompt_ids)} + answer of {len(answer_ids)} tokens make "
            f"{total}, more than max_length {max_length}; shorten the row, or, in training, raise "
            "--max-length as far as the model's context goes."
        )
    return Encoded(prompt_ids, answer_ids)


def encode_all(
    examples: Sequence[Example], tokenizer: Any, max_length: int, too_long: str = "error"
) -> tuple[list[Example], list[Encoded]]:
    """Encode examples; `too_long="drop"` leaves long ones out, counted in a warning.

    Returns the examples that were kept and their encodings, in step.
    """
    if too_long not in ("error", "drop"):
        raise ConfigError(f"too_long is {too_long!r}; expected 'error' or 'drop'.")
    kept: list[Example] = []
    encoded: list[Encoded] = []
    for example in examples:
        item = encode(example, tokenizer, None if too_long == "drop" else max_length)
        if len(item.prompt_ids) + len(item.answer_ids) <= max_length:
            kept.append(example)
            encoded.append(item)
    dropped = len(examples) - len(kept)
    if not kept:
        raise DataError(f"all {len(examples)} examples are longer than max_length {max_length}.")
    if dropped:
        log.warning(
            "dropped %d of %d examples: longer than %d tokens", dropped, len(examples), max_length
        )
    return kept, encoded


def check_room(ids: Sequence[int], new_tokens: int, context: int | None, where: str) -> None:
    """Refuse a prompt that leaves no room for an answer in the model's context (None: no bound).

    Raises:
        DataError: prompt and answer together are longer than the context.
    """
    if context is not None and len(ids) + new_tokens > context:
        raise DataError(
            f"{where}: a prompt of {len(ids)} tokens and an answer of up to {new_tokens} exceed "
            f"the model's context of {context}; shorten it, or ask for fewer new tokens."
        )


def draw(rows: list[T], count: int | None, seed: int = 0) -> list[T]:
    """Draw rows at random; the first ones of a file are often alike. None takes them all."""
    if count is None or count >= len(rows):
        return rows
    return random.Random(seed).sample(rows, count)


def scored_examples(
    source: str, template: str | None = None, tokenizer: Any = None, limit: int | None = None
) -> list[Example]:
    """Read what is scored: all examples, or `limit` of them, drawn at random, in their order.

    Always the same ones, whatever seed a run has. Arguments as for `load_examples`.
    """
    found = load_examples(source, template=template, tokenizer=tokenizer)
    return [found[i] for i in sorted(draw(list(range(len(found))), limit))]


def items_hash(examples: Sequence[Example]) -> str:
    """Return a hash of what is scored: prompts and references, by id."""
    rows = [[example.id, example.prompt, example.references] for example in examples]
    return hashlib.sha256(to_json(rows).encode()).hexdigest()


def spread_by_length(prompts: Sequence[Sequence[int]], count: int) -> list[Sequence[int]]:
    """Return up to `count` prompts, evenly drawn from short to long, the ends among them."""
    by_length = sorted(prompts, key=len)
    places = np.linspace(0, len(by_length) - 1, min(count, len(by_length))).round().astype(int)
    return [by_length[place] for place in places]


def prompt_batches(
    prompts: Sequence[Sequence[int]], batch_size: int, pad_id: int, by_length: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Return prompts in batches of similar length, or in their order, each as `pad_left` does."""
    rows = sorted(prompts, key=len) if by_length else prompts
    return [pad_left(rows[i : i + batch_size], pad_id) for i in range(0, len(rows), batch_size)]


@dataclass(frozen=True)
class Collator:
    """Batch encoded examples, padded left; loss on answers only, routers see prompts only."""

    pad_token_id: int
    device: torch.device | None = None

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, labels and prompt_mask, each [batch, longest]."""
        ids, mask = pad_left([e.prompt_ids + e.answer_ids for e in batch], self.pad_token_id)
        answer = torch.zeros_like(mask, dtype=torch.bool)
        for i, item in enumerate(batch):
            answer[i, answer.shape[1] - len(item.answer_ids) :] = True
        tensors = {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(~answer, IGNORE),
            "prompt_mask": mask.bool() & ~answer,
        }
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}


def split_validation(
    examples: Sequence[Example],
    share: float,
    seed: int = 0,
    group: Callable[[Example], str] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Hold out about `share` of the examples; returns (train, validation) in their order.

    Examples of one group (default: `Example.group`) stay together, and a
    group's place depends only on its text, the seed and the other groups, not on the order.
    """
    if not 0 < share < 1:
        raise ConfigError(f"the share to hold out is {share!r}; expected between 0 and 1.")
    group = group or (lambda example: example.group)
    keys = [hashlib.sha256(f"{seed}:{group(e)}".encode()).hexdigest() for e in examples]
    sizes = Counter(keys)
    if len(sizes) < 2:
        raise DataError(
            "cannot hold out validation examples: all share one prompt or context; "
            "name validation data of its own with --validation."
        )
    wanted = max(1, round(share * len(examples)))
    held: set[str] = set()
    count = 0
    for key in sorted(sizes)[:-1]:
        if count >= wanted:
            break
        held.add(key)
        count += sizes[key]
    train = [e for e, key in zip(examples, keys, strict=True) if key not in held]
    return train, [e for e, key in zip(examples, keys, strict=True) if key in held]
