# SPDX-License-Identifier: Apache-2.0
"""Ranking layers by what their removal costs: shared computation must change nothing."""

from __future__ import annotations

import families
import pytest
import torch
from tqdm.auto import tqdm
from training import make_examples, make_model

from firstlm.config import RouterConfig
from firstlm.data import Collator, Encoded
from firstlm.importance import FORWARD_ROWS, _distances, removal_order
from firstlm.losses import FullDepth, answer_pass
from firstlm.model import FirstModel
from firstlm.policies import FixedMask

Batches = list[dict[str, torch.Tensor]]


@torch.no_grad()
def one_by_one(model: FirstModel, batches: Batches, removed, candidates, prefill):
    """Return the distance without each candidate, every mask in a pass of its own."""
    rows, distances = sum(len(b["input_ids"]) for b in batches), {}
    for layer in candidates:
        keep = torch.ones(model.layer_count, dtype=torch.bool)
        keep[[*removed, layer]] = False
        distances[layer] = 0.0
        for batch in batches:
            state = model.new_state(batch["prompt_mask"], FixedMask(keep), prefill=prefill)
            output, _ = answer_pass(model, batch, state, output_hidden_states=True)
            distance = FullDepth.of(model, batch).distance(
                output.hidden_states[-1], output.logits, batch["attention_mask"]
            )
            distances[layer] += float(distance) * len(batch["input_ids"]) / rows
    return distances


@torch.no_grad()
def together(model: FirstModel, batches: Batches, removed, candidates, prefill):
    """Return the same as computed for all candidates at once."""
    full = [FullDepth.of(model, batch) for batch in batches]
    return _distances(model, batches, full, removed, candidates, prefill, tqdm(disable=True))


def one_batch(rows) -> Batches:
    return [Collator(0)(rows)]


# Positions added to the states, states scaled before layer 0, parallel attention and mlp, experts.
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "gpt_neox", "bloom", "gpt_oss"])
@pytest.mark.parametrize("prefill", ["skip", "full"])
def test_what_candidates_share_is_computed_once_and_changes_nothing(name: str, prefill) -> None:
    model = FirstModel.from_base(families.make_model(name), RouterConfig())
    model.eval()
    rows = [
        Encoded([1 + i % 60 for i in range(n, 3 * n + 2)], [n + 60, n + 61]) for n in (2, 3, 5, 9)
    ]
    batches = [Collator(0)(rows[:2]), Collator(0)(rows[2:])]
    removed, candidates = [1], [i for i in range(model.layer_count) if i != 1]
    found = together(model, batches, removed, candidates, prefill)
    wanted = one_by_one(model, batches, removed, candidates, prefill)
    assert found == pytest.approx(wanted, abs=2e-5)
    assert len(set(found.values())) == len(candidates)


def test_more_candidates_than_share_a_pass() -> None:
    model, rows = make_model(layers=12), make_examples(6, 0)
    found = together(model, one_batch(rows), [], list(range(12)), "skip")
    wanted = one_by_one(model, one_batch(rows), [], range(12), "skip")
    assert found == pytest.approx(wanted, abs=2e-5)
    order = removal_order(model, rows, 0.25)
    assert order[0] == min(found, key=found.__getitem__)
    assert sorted(order) == list(range(12))


@pytest.mark.skipif("gemma4_shared" not in families.FAMILIES, reason="needs a newer transformers")
def test_layers_whose_keys_and_values_others_read_see_real_states() -> None:
    model = FirstModel.from_base(families.make_model("gemma4_shared"), RouterConfig())
    model.eval()
    rows = [Encoded([1, 2, 3, 4], [65, 66]), Encoded([5, 6, 7, 8, 9], [67])]
    free = [i for i in range(model.layer_count) if i not in model.routing.stack.locked]
    found = together(model, one_batch(rows), [], free, "skip")
    wanted = one_by_one(model, one_batch(rows), [], free, "skip")
    assert found == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("unit", ["attention", "mlp"])
def test_units_inside_layers_are_ranked_alike(unit: str) -> None:
    model = FirstModel.from_base(families.make_model("llama"), RouterConfig(unit=unit))
    model.eval()
    rows = make_examples(4, 0)
    rows = [Encoded([t % 100 for t in r.prompt_ids], [t % 100 for t in r.answer_ids]) for r in rows]
    found = together(model, one_batch(rows), [2], [0, 1, 3], "skip")
    wanted = one_by_one(model, one_batch(rows), [2], [0, 1, 3], "skip")
    assert found == pytest.approx(wanted, abs=2e-5)


def test_the_order_is_that_of_greedy_removal() -> None:
    model, examples = make_model(), make_examples(12, 0)
    wanted: list[int] = []
    for _ in range(4):
        left = [i for i in range(model.layer_count) if i not in wanted]
        distances = one_by_one(model, one_batch(examples), wanted, left, "skip")
        wanted.append(min(left, key=distances.__getitem__))
    assert removal_order(model, examples, 0.5)[:4] == wanted


def test_removed_layers_are_not_run_again_for_each_candidate(monkeypatch) -> None:
    """A candidate's rows pass only the layers behind it."""
    model, examples = make_model(), make_examples(4, 0)
    states = []
    forward = FirstModel.forward

    def noted(self, *args, **kwargs):
        states.append(kwargs["state"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FirstModel, "forward", noted)
    together(model, one_batch(examples), [], [0, 5, 7], "skip")
    shared = states[-1].keep.view(3, len(examples), -1)[:, 0]
    ran = [row.nonzero().flatten().tolist() for row in shared]
    assert ran == [[1, 2, 3, 4, 5, 6, 7], [6, 7], []]


def test_ranking_keeps_to_the_batch_size(monkeypatch) -> None:
    model, examples = make_model(), make_examples(12, 0)
    wanted = removal_order(model, examples, 0.5, batch_size=100)
    sizes = []
    forward = FirstModel.forward

    def noted(self, input_ids, *args, **kwargs):
        sizes.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(FirstModel, "forward", noted)
    assert removal_order(model, examples, 0.5, batch_size=1) == wanted
    assert max(sizes) <= FORWARD_ROWS


def test_ranking_runs_prompts_as_training_does() -> None:
    model, examples = make_model(), make_examples(12, 0)
    orders = [removal_order(model, examples, 0.9, 16, prefill) for prefill in ("skip", "full")]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
