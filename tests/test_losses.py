# SPDX-License-Identifier: Apache-2.0
"""What a pass computes for answers: their tokens' logits, and nothing of the vocabulary else."""

from __future__ import annotations

import families
import pytest
import torch
from torch.nn import functional as F

from firstlm.config import RouterConfig
from firstlm.data import Collator, Encoded
from firstlm.losses import answer_pass, layers_pass, row_losses
from firstlm.model import FirstModel
from firstlm.policies import FixedMask

ROWS = [Encoded([5, 6, 7, 8], [9, 10, 11]), Encoded([5, 6], [9]), Encoded([4], [9, 8, 7, 6, 5, 4])]


@torch.no_grad()
@pytest.mark.parametrize("name", families.FAMILIES)
def test_answers_alone_get_logits_and_those_are_the_ones_of_a_whole_pass(name: str) -> None:
    model = FirstModel.from_base(families.make_model(name), RouterConfig())
    inputs = Collator(0)(ROWS)
    keep = torch.ones(len(ROWS), model.layer_count, dtype=torch.bool)
    keep[0, 1] = False
    states = [model.new_state(inputs["prompt_mask"], FixedMask(keep)) for _ in range(2)]
    whole, _ = model(inputs["input_ids"], inputs["attention_mask"], state=states[0])
    output, labels = answer_pass(model, inputs, states[1])
    ends = whole.logits.shape[1]
    wanted = [whole.logits[i, ends - len(row.answer_ids) - 1 : -1] for i, row in enumerate(ROWS)]
    assert labels.tolist() == [token for row in ROWS for token in row.answer_ids]
    torch.testing.assert_close(output.logits, torch.cat(wanted))
    sums, tokens = row_losses(output.logits, labels, inputs)
    losses = [
        F.cross_entropy(part.float(), torch.tensor(row.answer_ids), reduction="sum")
        for part, row in zip(wanted, ROWS, strict=True)
    ]
    torch.testing.assert_close(sums, torch.stack(losses))
    assert tokens.tolist() == [3, 1, 6]


@torch.no_grad()
def test_the_head_computes_no_more_than_is_asked() -> None:
    model = FirstModel.from_base(families.make_model("gemma2"), RouterConfig())
    inputs, seen = Collator(0)(ROWS), list[torch.Size]()
    head = model.plain_base.get_output_embeddings()
    head.register_forward_hook(lambda _head, _args, output: seen.append(output.shape[:-1]))
    for run in (answer_pass, layers_pass):
        run(model, inputs, model.new_state(inputs["prompt_mask"]))
    state = model.new_state(inputs["prompt_mask"])
    model(inputs["input_ids"], inputs["attention_mask"], state=state)
    assert seen == [(10,), (0,), inputs["input_ids"].shape]


@torch.no_grad()
def test_a_model_that_does_not_say_what_its_head_is_gives_the_same(monkeypatch) -> None:
    model = FirstModel.from_base(families.make_model("llama"), RouterConfig())
    inputs = Collator(0)(ROWS)
    found = answer_pass(model, inputs, model.new_state(inputs["prompt_mask"]))[0].logits
    monkeypatch.setattr(model.plain_base, "get_output_embeddings", lambda: None)
    again = answer_pass(model, inputs, model.new_state(inputs["prompt_mask"]))[0].logits
    torch.testing.assert_close(found, again)
