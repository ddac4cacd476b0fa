# SPDX-License-Identifier: Apache-2.0
"""Scoring answers: equal to a count by hand, in the examples' order, and resumable."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama

from firstlm import FirstModel, cli, eval_command, evaluate
from firstlm.data import encode, encode_prompt
from firstlm.errors import ConfigError, DataError
from firstlm.evaluate import evaluate as score_policy
from firstlm.examples import load_examples
from firstlm.journal import Journal
from firstlm.losses import mean_loss
from firstlm.metrics import means, score_qa
from firstlm.policies import FixedMask, RunAll
from firstlm.tasks import find_task
from firstlm.thresholds import Threshold

SOURCES = [
    "Who runs?",
    "What is the name of the tall one in the garden?",
    "Why",
    "Where to go now?",
]


def opinionated(tokenizer):
    """A tiny model whose routers decide differently from prompt to prompt."""
    model = FirstModel.from_base(tiny_llama(), tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in model.routers:
            router.weight.copy_(20 * torch.randn(router.weight.shape, generator=generator))
            router.bias.zero_()
    rows = [Threshold(0.1, 3.0, 0.1), Threshold(0.25, 0.0, 0.25), Threshold(0.5, -3.0, 0.5)]
    model.thresholds.table = {"skip": rows, "full": rows}
    return model


@pytest.fixture
def model(byte_tokenizer):
    return opinionated(byte_tokenizer)


@pytest.fixture
def data(tmp_path):
    rows = [
        {"id": f"q{i}", "task": "qa", "source": source, "target": "a cat", "answers": ["a cat"]}
        for i, source in enumerate(SOURCES)
    ]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def examples(data):
    return load_examples(data)


def one_by_one(model, examples, tokenizer, policy, tokens):
    """Answer each example alone, with nothing of `evaluate` in between."""
    found = []
    for example in examples:
        ids = torch.tensor([encode_prompt(example, tokenizer)])
        output = model.generate(ids, policy=policy, max_new_tokens=tokens, do_sample=False)
        text = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        found.append((text.lstrip().split("\n")[0].rstrip(), output.keep[0].tolist()))
    return found


def test_routed_answers_and_masks_equal_those_of_each_prompt_alone(model, examples, byte_tokenizer):
    alone = one_by_one(model, examples, byte_tokenizer, model.policy_for(None), 6)
    result = score_policy(model, examples, "router", batch_size=3, max_new_tokens=6, progress=False)
    assert [item["id"] for item in result["items"]] == ["q0", "q1", "q2", "q3"]
    assert [item["prediction"] for item in result["items"]] == [text for text, _ in alone]
    masks = [[letter == "1" for letter in item["keep"]] for item in result["items"]]
    assert masks == [keep for _, keep in alone]
    rates = [1 - sum(keep) / 4 for keep in masks]
    assert len(set(rates)) > 1
    assert result["skip_rate"]["mean"] == pytest.approx(sum(rates) / 4)
    assert result["distinct_masks"] == len(set(map(tuple, masks)))
    by_layer = [1 - sum(column) / 4 for column in zip(*masks, strict=True)]
    assert result["layer_skip_share"] == pytest.approx(by_layer)


def test_scores_are_those_of_the_metrics(model, examples, monkeypatch):
    texts = ["The cat.", "cat sat", "dog", "\n a cat\nand more"]
    by_length = sorted(range(4), key=lambda i: -len(SOURCES[i]))
    task = find_task(examples)
    answers = iter([[task.clean(texts[i]) for i in by_length]])
    real = evaluate._answer
    monkeypatch.setattr(evaluate, "_answer", lambda *a: real(*a) | {"answers": next(answers)})
    result = score_policy(model, examples, "run_all", max_new_tokens=1, progress=False)
    assert [item["em"] for item in result["items"]] == [1, 0, 0, 1]
    assert [item["f1"] for item in result["items"]] == [1.0, 0.6667, 0.0, 1.0]
    assert result["em"]["value"] == 50.0
    assert result["f1"]["value"] == pytest.approx(100 * (1 + 2 / 3 + 0 + 1) / 4)
    wanted = score_qa([task.clean(text) for text in texts], [["a cat"]] * 4)["f1"].estimate()
    assert (result["f1"]["low"], result["f1"]["high"]) == (wanted.low, wanted.high)


def test_layer_calls_are_counted_by_hand(model, examples, monkeypatch):
    monkeypatch.setattr(evaluate._Ended, "__call__", lambda self, ids, scores, **_: never(ids))
    model.base.generation_config.eos_token_id = None
    result = score_policy(
        model, examples, FixedMask([True, False, True, True]), batch_size=2, max_new_tokens=5,
        progress=False,
    )  # fmt: skip
    # Two batches; 3 layers run each time, once for the prompt and once for each of 4 more tokens.
    assert result["layer_calls"] == {"prefill": 2 * 3, "decode": 2 * 3 * 4}
    assert result["decode_steps"] == 2 * 4
    assert result["skip_rate"] == {"mean": 0.25, "std": 0, "p5": 0.25, "p95": 0.25}
    assert result["layer_skip_share"] == [0, 1, 0, 0]


def never(ids):
    return torch.zeros(len(ids), dtype=torch.bool)


def test_generation_stops_after_the_first_line(model, examples, byte_tokenizer, monkeypatch):
    newline = byte_tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    letter = byte_tokenizer("x", add_special_tokens=False)["input_ids"][0]
    script = iter([newline, letter, newline, letter, letter, letter])

    def scripted(module, args, output):
        output.logits[:] = 0
        output.logits[..., next(script)] = 1

    with model.base.register_forward_hook(scripted):
        result = score_policy(model, examples, "run_all", max_new_tokens=6, progress=False)
    assert result["decode_steps"] == 2
    assert [item["prediction"] for item in result["items"]] == ["x"] * 4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_base_is_the_model_without_adapter_and_run_all_with_it(model, examples, byte_tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = score_policy(model, examples, "run_all", max_new_tokens=6, progress=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.base = get_peft_model(
            model.base, LoraConfig(target_modules="all-linear", init_lora_weights=False)
        )
    model.base.eval()
    base = score_policy(model, examples, "base", max_new_tokens=6, progress=False)
    adapted = score_policy(model, examples, "run_all", max_new_tokens=6, progress=False)
    assert [i["prediction"] for i in base["items"]] == [i["prediction"] for i in plain["items"]]
    assert [i["prediction"] for i in adapted["items"]] != [i["prediction"] for i in plain["items"]]
    assert base["skip_rate"]["mean"] == adapted["skip_rate"]["mean"] == 0


def test_bertscore_is_of_the_answers_and_kept_by_item(model, examples):
    def score(predictions, references):
        return means([len(text) / 100 for text in predictions])

    found = score_policy(model, examples, "run_all", bert_score=score, progress=False)
    lengths = [len(item["prediction"]) for item in found["items"]]
    assert [item["bertscore"] for item in found["items"]] == [n / 100 for n in lengths]
    assert found["bertscore"]["value"] == pytest.approx(sum(lengths) / len(lengths))
    assert "bertscore" not in score_policy(model, examples, "run_all", progress=False)


def test_what_is_longer_than_the_context_is_named(model, examples, monkeypatch):
    with pytest.raises(DataError, match=r"id q0.*context of 512"):
        score_policy(model, examples, max_new_tokens=500, progress=False)
    long = replace(examples[-1], completion=" word" * 200)
    monkeypatch.setattr(evaluate, "_answer", lambda *_: pytest.fail("answered before it was seen"))
    with pytest.raises(DataError, match="more than max_length 512"):
        score_policy(model, [*examples, long], max_new_tokens=5, progress=False)
    with pytest.raises(ConfigError, match="router"):
        score_policy(model, examples, "run_all", 0.25, progress=False)
    with pytest.raises(ConfigError, match="base, run_all, router"):
        score_policy(model, examples, "routers", progress=False)


@pytest.fixture
def words(data, tmp_path, byte_tokenizer, monkeypatch):
    """Words of a command line; the artifact's model is a tiny one in memory."""
    monkeypatch.setattr(
        FirstModel, "from_pretrained", lambda *args, **kwargs: opinionated(byte_tokenizer)
    )
    return [
        "eval", "tiny", "--data", str(data), "--max-new-tokens", "4", "--batch-size", "2",
        "--output", str(tmp_path / "out" / "result.json"), "--skip-rates",
    ]  # fmt: skip


def result_of(words):
    with open(words[words.index("--output") + 1], encoding="utf-8") as file:
        return json.load(file)


def test_runs_are_written_and_not_repeated(words, monkeypatch, capsys):
    assert cli.main([*words, "0.25"]) == 0
    first = result_of(words)
    assert list(first["runs"]) == ["base", "run_all", "router@0.25"]
    assert first["inputs"]["data_sha256"] == first["provenance"]["data_sha256"]
    assert len(first["runs"]["router@0.25"]["items"]) == 4
    assert set(first["of_run_all"]) == {"base", "router@0.25"}

    done = []
    real = evaluate.evaluate
    monkeypatch.setattr(
        eval_command, "evaluate", lambda *a, **k: done.append(a[2:4]) or real(*a, **k)
    )
    assert cli.main([*words, "0.25", "0.5"]) == 0
    assert done == [("router", 0.5)]
    second = result_of(words)
    assert list(second["runs"]) == ["base", "run_all", "router@0.25", "router@0.5"]
    assert second["runs"]["base"] == first["runs"]["base"]
    assert "router@0.5" in capsys.readouterr().out


def test_what_was_not_asked_for_at_first_is_scored_later(words, capsys):
    words = [*words, "0.25", "--policies", "run_all", "router"]
    assert cli.main([*words, "--no-perplexity", "--timed", "0"]) == 0
    first = result_of(words)["runs"]
    assert not any("perplexity" in run for run in first.values())
    capsys.readouterr()
    assert cli.main([*words, "--timed", "0"]) == 0
    assert "router@0.25: done before with less than is asked for now" in capsys.readouterr().out
    second = result_of(words)["runs"]
    assert all(run["perplexity"]["value"] > 1 for run in second.values())
    assert [run["f1"] for run in second.values()] == [run["f1"] for run in first.values()]
    assert cli.main([*words, "--timed", "1"]) == 0
    third = result_of(words)["runs"]
    assert third["router@0.25"]["tpot_ratio"]["prompts"] == 1
    for fewer in (["--timed", "0"], ["--no-perplexity"]):
        assert cli.main([*words, *fewer]) == 0
        assert result_of(words)["runs"] == third
    capsys.readouterr()
    assert cli.main([*words, "--skip-rates", "0.5", "--no-perplexity", "--timed", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    head, last = (line.split() for line in lines if line.startswith(("run ", "router@0.5 ")))
    assert "perplexity" in head
    # "of run_all" is one cell, maybe empty; there is no perplexity, nor its interval.
    assert len(last) in (len(head) - 1 - 2, len(head) - 2 - 2)


def test_an_interrupted_run_keeps_what_was_finished(words, monkeypatch):
    real = evaluate.evaluate

    def interrupted(model, examples, policy, *args, **kwargs):
        if policy == "router":
            raise KeyboardInterrupt
        return real(model, examples, policy, *args, **kwargs)

    monkeypatch.setattr(eval_command, "evaluate", interrupted)
    assert cli.main([*words, "0.25"]) == 130
    assert list(result_of(words)["runs"]) == ["base", "run_all"]
    monkeypatch.setattr(eval_command, "evaluate", real)
    assert cli.main([*words, "0.25"]) == 0
    assert list(result_of(words)["runs"]) == ["base", "run_all", "router@0.25"]


def test_an_interrupted_policy_goes_on_at_its_next_batch(words, monkeypatch):
    words = [*words[:-1], "--batch-size", "1", words[-1]]
    real, answered = evaluate._answer, []

    def interrupted(*arguments):
        if len(answered) == 10:  # in the third run: base and run_all have four each
            raise KeyboardInterrupt
        answered.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(evaluate, "_answer", interrupted)
    assert cli.main([*words, "0.25"]) == 130
    journal = Path(words[words.index("--output") + 1] + ".partial")
    assert len(journal.read_text().splitlines()) == 1 + 2
    damaged = '{"name": "router@0.25 2", "done": {"answers": []}}\n'  # no batch at all
    journal.write_text(journal.read_text() + damaged + '{"name": "router@0.25 3", "do')  # cut off
    monkeypatch.setattr(evaluate, "_answer", lambda *a: answered.append(a[-1]) or real(*a))
    assert cli.main([*words, "0.25"]) == 0
    assert len(answered) == 12
    assert not journal.exists()
    whole = [*words, "0.25"]
    whole[whole.index("--output") + 1] += ".whole"
    assert cli.main(whole) == 0
    assert plain(result_of(words)) == plain(result_of(whole))


def test_two_cannot_write_into_one_file(words, monkeypatch, capsys):
    real, codes = evaluate.evaluate, []

    def again(*arguments, **options):
        if not codes:
            codes.append(cli.main([*words, "0.25"]))
        return real(*arguments, **options)

    monkeypatch.setattr(eval_command, "evaluate", again)
    assert cli.main([*words, "0.25"]) == 0
    assert codes == [2]
    assert "Another evaluation writes into" in capsys.readouterr().err


def test_what_was_begun_outlives_other_runs_and_a_move(words, monkeypatch, data, capsys):
    words = [*words, "0.25", "--batch-size", "1"]
    real, answered = evaluate._answer, []

    def interrupted(*arguments):
        if len(answered) == 3:
            raise KeyboardInterrupt
        answered.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(evaluate, "_answer", interrupted)
    assert cli.main([*words, "--policies", "router"]) == 130
    monkeypatch.setattr(evaluate, "_answer", lambda *a: answered.append(a[-1]) or real(*a))
    moved = data.parent / "elsewhere"
    moved.mkdir()
    words[words.index(str(data))] = str(shutil.move(data, moved))
    words[1] = "tiny-elsewhere"
    assert cli.main([*words, "--policies", "run_all"]) == 0
    assert len(answered) == 3 + 4
    assert cli.main([*words, "--policies", "router"]) == 0
    assert len(answered) == 3 + 4 + 1
    assert "not used" not in capsys.readouterr().out


def test_plain_lora_is_scored_with_all_layers_alone(words, byte_tokenizer, monkeypatch, capsys):
    plain = FirstModel.from_base(tiny_llama(), tokenizer=byte_tokenizer)
    monkeypatch.setattr(FirstModel, "from_pretrained", lambda *args, **kwargs: plain)
    assert cli.main([*words, "0.25"]) == 0
    assert list(result_of(words)["runs"]) == ["base", "run_all"]


def plain(report):
    """Leave out what differs from run to run: times and where it ran."""
    if isinstance(report, dict):
        return {k: plain(v) for k, v in report.items() if k not in ("seconds", "provenance")}
    return report


def test_a_journal_of_other_work_is_not_taken_up(tmp_path):
    journal = Journal(tmp_path / "j", {"seed": 1})
    journal.put("a", [1])
    assert Journal(tmp_path / "j", {"seed": 1}).get("a") == [1]
    other = Journal(tmp_path / "j", {"seed": 2})
    assert other.dropped
    assert other.get("a") is None
    other.put("b", 2)
    assert Journal(tmp_path / "j", {"seed": 2}).parts == {"b": 2}


@pytest.mark.parametrize("damage", [b"{nope\n", b'{"name": "\xe9", "done": 1}\n', b"[1]\n", b"\n"])
def test_a_damaged_line_of_a_journal_costs_its_part_alone(tmp_path, damage):
    file = tmp_path / "j"
    journal = Journal(file, 1)
    for name in "abc":
        journal.put(name, name * 2)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], damage, lines[3]]))
    found = Journal(file, 1)
    assert found.parts == {"a": "aa", "c": "cc"}
    found.put("b", "bb")
    assert Journal(file, 1).parts == {"a": "aa", "c": "cc", "b": "bb"}


def test_a_journal_survives_being_cut_off_again_and_again(tmp_path):
    """Also with texts that hold line ends which are none in a file of lines."""
    file = tmp_path / "j"
    for turn in range(3):
        journal = Journal(file, "work")
        assert journal.parts == {str(i): ["a\u2028b\x85c"] for i in range(turn)}
        journal.put(str(turn), ["a\u2028b\x85c"])
        with file.open("a") as stream:
            stream.write('{"name": "torn", "do')
    assert len(Journal(file, "work").parts) == 3


def test_results_of_other_inputs_are_not_mixed(words, data, capsys):
    assert cli.main([*words, "0.25"]) == 0
    before = result_of(words)
    assert cli.main([*words, "0.25", "--max-new-tokens", "5"]) == 2
    assert "(max_new_tokens)" in capsys.readouterr().err
    data.write_text(data.read_text().replace("a cat", "a dog"))
    assert cli.main([*words, "0.25"]) == 2
    assert "data_sha256" in capsys.readouterr().err
    assert result_of(words) == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["0.8"], "outside what was calibrated"),
        (["0.99"], "between 0 and 0.9"),
        (["0.25", "--task", "poetry"], "qa, translation, summarization"),
        (["0.25", "--data", "/nowhere.jsonl"], "no such file"),
        (["0.25", "--policies", "best"], "base, run_all, router, random"),
    ],
)
def test_wrong_input_ends_with_code_2_and_writes_nothing(words, more, says, capsys, tmp_path):
    assert cli.main([*words, *more]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_first(words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(FirstModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    words[words.index("--output") + 1] = str(tmp_path)
    assert cli.main([*words, "0.25"]) == 2
    assert "Is a directory. Name another place." in capsys.readouterr().err


def test_tasks_without_a_metric_are_refused(words, data, capsys):
    data.write_text(json.dumps({"task": "poetry", "prompt": "rose", "completion": "x"}) + "\n")
    assert cli.main([*words, "0.25"]) == 2
    assert "'poetry', which has no metric" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "primary", "label"),
    [("translation", "bleu", "BLEU-1"), ("summarization", "rougeL", "ROUGE-2")],
)
def test_other_tasks_get_their_own_metrics(words, data, capsys, task, primary, label):
    row = {"task": task, "source": "one two", "target": "eins zwei", "target_lang": "de"}
    row["source_lang"] = "en"
    data.write_text(json.dumps(row) + "\n")
    assert cli.main([*words, "0.25"]) == 0
    report = result_of(words)
    assert (report["task"], report["primary"]) == (task, primary)
    assert primary in report["runs"]["base"]
    assert label in capsys.readouterr().out


def test_perplexity_is_that_of_the_wanted_answers_under_the_policy(model, examples):
    encoded = [encode(example, model.tokenizer) for example in examples]
    for policy in (RunAll(), FixedMask([True, False, False, True])):
        loss, _ = mean_loss(model, encoded, policy, 4)
        result = score_policy(
            model, examples, policy, max_new_tokens=1, batch_size=3, progress=False
        )
        assert result["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
    alone = [mean_loss(model, [row], policy, 1)[0] for row in encoded]
    found = [item["perplexity"] for item in result["items"]]
    assert found == pytest.approx([math.exp(loss) for loss in alone], rel=1e-4)
    assert len(set(found)) == len(found)


def test_perplexity_can_be_left_out_of_some_runs(words, capsys, monkeypatch):
    asked = [*words, "0.25"]
    assert cli.main([*asked, "--policies", "base"]) == 0
    assert "perplexity" in capsys.readouterr().out.splitlines()[-3]
    monkeypatch.setattr("firstlm.evaluate.item_losses", None)
    assert cli.main([*asked, "--no-perplexity", "--policies", "base", "router"]) == 0
    base, router = result_of(words)["runs"].values()
    assert base["perplexity"]["value"] > 1
    assert "perplexity" not in router
    assert "perplexity" not in router["items"][0]
    head, of_base, of_router, *_ = (
        line.split() for line in capsys.readouterr().out.splitlines()[-4:]
    )
    assert "perplexity" in head
    assert len(of_router) == len(of_base) - 2  # neither a value nor its interval


def test_a_file_of_something_else_is_not_written_over(words, tmp_path, capsys):
    file = tmp_path / "out" / "result.json"
    file.parent.mkdir()
    file.write_text("[1, 2]")
    assert cli.main([*words, "0.25"]) == 2
    assert "holds no results" in capsys.readouterr().err
    assert file.read_text() == "[1, 2]"


def test_rows_without_references_are_scored_against_their_completion(byte_tokenizer, tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_text(json.dumps({"prompt": "Who?", "completion": " me"}) + "\n")
    result = score_policy(
        opinionated(byte_tokenizer), load_examples(file), max_new_tokens=2, progress=False,
        items=False,
    )  # fmt: skip
    assert result["count"] == 1
    assert "items" not in result
