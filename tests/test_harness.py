# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on a routed model: its numbers are those of the layers that run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_llama

from firstlm import FirstModel, FixedMask, RouterConfig
from firstlm.baselines import SkipDecode
from firstlm.errors import ConfigError

pytest.importorskip("lm_eval", reason="the extra firstlm[harness] is not installed")
from firstlm.harness import FirstHarness

KEEP = [True, False, False, True]
TEXTS = ["The kettle", "Ada keeps bees in the garden, and", "x"]


@pytest.fixture(scope="module")
def model(byte_tokenizer: Any) -> FirstModel:
    return FirstModel.from_base(tiny_llama(), RouterConfig(), tokenizer=byte_tokenizer)


@pytest.fixture
def lm(model: FirstModel) -> FirstHarness:
    return FirstHarness(model, policy=FixedMask(KEEP), batch_size=2, max_new_tokens=6)


def ask(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def wanted(model: FirstModel, prompt: list[int], answer: list[int]) -> float:
    """Log-likelihood of an answer, row by row and token by token, under KEEP."""
    ids = torch.tensor([prompt + answer])
    mask = torch.ones_like(ids)
    mask[:, len(prompt) :] = 0
    state = model.new_state(mask, FixedMask(KEEP))
    with torch.no_grad(), model.routing.tracing(state):
        shares = model.base(ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(shares[len(prompt) + i - 1, t]) for i, t in enumerate(answer))


def test_likelihoods_are_those_of_the_layers_that_run(model, lm):
    pairs = [(text, ending) for text in TEXTS for ending in (" is blue", " no")]
    found = lm.loglikelihood([ask(*pair) for pair in pairs], disable_tqdm=True)
    for (text, ending), (value, greedy) in zip(pairs, found, strict=True):
        ids = lm.tok_encode(text)
        assert ids[0] == 1
        assert value == pytest.approx(wanted(model, ids, lm.tok_encode(ending, False)), abs=1e-4)
        assert greedy is False
    assert lm.skip_rates == [0.5] * len(pairs)
    assert lm.loglikelihood([ask("Why", "")], disable_tqdm=True) == [(0.0, True)]
    assert lm.layer_calls == {"prefill": 2 * 3, "decode": 0}  # 2 layers of 4, 3 batches of 2


def test_a_greedy_continuation_is_found_to_be_greedy(model, lm):
    text = TEXTS[0]
    ids = torch.tensor([lm.tok_encode(text)])
    best = model.generate(ids, policy=FixedMask(KEEP), max_new_tokens=1, do_sample=False)
    token = int(best.sequences[0, -1])
    scored = lm._loglikelihood_tokens(
        [(None, ids[0].tolist(), [token]), (None, ids[0].tolist(), [(token + 1) % 259])], True
    )
    assert [greedy for _, greedy in scored] == [True, False]


def test_an_empty_context_is_bos(model, lm):
    ((value, _),) = lm.loglikelihood([ask("", "abc")], disable_tqdm=True)
    assert value == pytest.approx(wanted(model, [1], lm.tok_encode("abc", False)), abs=1e-4)


def test_texts_longer_than_the_context_are_scored_in_windows(model, lm):
    short, long = "abcdefgh" * 5, "abcdefgh" * 100
    values = lm.loglikelihood_rolling([ask(short), ask(long)], disable_tqdm=True)
    assert values[0] == pytest.approx(wanted(model, [1], lm.tok_encode(short, False)), rel=1e-4)
    assert values[1] == pytest.approx(-800 * math.log(259), rel=0.2)
    assert len(lm.skip_rates) == 1 + 2


def test_answers_are_those_of_generate_and_end_before_a_stop(model, lm):
    found = lm.generate_until([ask(text, {"until": []}) for text in TEXTS], disable_tqdm=True)
    for text, answer in zip(TEXTS, found, strict=True):
        ids = torch.tensor([lm.tok_encode(text)])
        output = model.generate(ids, policy=FixedMask(KEEP), max_new_tokens=6, do_sample=False)
        assert answer == lm._tokenizer.decode(
            output.sequences[0, ids.shape[1] :], skip_special_tokens=True
        )
    assert lm.layer_calls["decode"] > 0
    stop = found[1][2:4]
    (cut,) = lm.generate_until([ask(TEXTS[1], {"until": [stop]})], disable_tqdm=True)
    assert cut == found[1][: found[1].index(stop)]


def test_a_rate_and_a_policy_together_are_refused(model):
    with pytest.raises(ConfigError, match="give one of them"):
        FirstHarness(model, skip_rate=0.25, policy=FixedMask(KEEP))


def test_a_suite_runs_on_a_routed_model(model, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"{a} and {a}?", "choices": ["no", "yes", "so"], "answer": a % 3}
        for a in range(6)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    scores = {}
    for keep in (KEEP, [True] * 4):
        lm = FirstHarness(model, policy=FixedMask(keep))
        result = lm_eval.simple_evaluate(
            lm, tasks=[task], task_manager=TaskManager(), bootstrap_iters=0, log_samples=True
        )
        assert result is not None
        sample = result["samples"]["local_choices"][0]
        scores[sum(keep)] = [response[0][0] for response in sample["resps"]]
        assert lm.skip_rates == [1 - sum(keep) / 4] * 18
    first = rows[0]
    lm = FirstHarness(model, policy=FixedMask(KEEP))
    for choice, value in zip(first["choices"], scores[2], strict=True):
        ids = lm.tok_encode(f" {choice}", False)
        exact = wanted(model, lm.tok_encode(first["question"]), ids)
        assert float(value) == pytest.approx(exact, abs=1e-3)
    assert scores[2] != scores[4]


def test_layers_that_go_as_an_answer_grows_count_by_its_steps(model):
    policy = SkipDecode(4, 0.25, [0] * 5 + [1])  # answers of five decode steps
    lives = [policy.lifetime(layer) for layer in range(4)]
    lm = FirstHarness(model, policy=policy, batch_size=1, max_new_tokens=6)
    context, answer = lm.tok_encode(TEXTS[0]), lm.tok_encode("sixth", False)
    lm._loglikelihood_tokens([(None, context, answer)], True)
    lm.generate_until([ask(TEXTS[0], {"until": []})], disable_tqdm=True)
    # The first token comes from the prompt, and none of the six that are made ends an answer.
    for rate, n in zip(lm.skip_rates, [len(answer) - 1, 5], strict=True):
        assert rate == sum(max(n - life, 0) for life in lives) / (n * 4) > 0
