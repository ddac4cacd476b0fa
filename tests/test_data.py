# SPDX-License-Identifier: Apache-2.0
"""Rows become examples, examples become token ids, and bad rows name their place."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_byte_tokenizer

from firstlm.data import (
    IGNORE,
    Collator,
    Encoded,
    encode,
    encode_all,
    encode_prompt,
    pad_left,
    scored_examples,
    split_validation,
)
from firstlm.errors import ConfigError, DataError
from firstlm.examples import Example, load_examples

PAIR = {"prompt": "Say hi.", "completion": " Hi."}
QA = {"task": "qa", "source": "Context: A cat sat.\nQuestion: Who sat?", "target": "A cat"}


def write(path: Path, *rows: Any) -> Path:
    """Write rows as JSON lines; text rows are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- conventions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_prompt_completion_rows_are_taken_verbatim(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / name, PAIR, {**PAIR, "completion": " Bye ", "id": 7})
    first, second = load_examples(source)
    assert (first.prompt, first.completion, first.references) == ("Say hi.", " Hi.", ("Hi.",))
    assert (first.id, second.id) == ("line-1", "7")
    assert second.completion == " Bye "


def test_task_field_chooses_the_template(tmp_path: Path) -> None:
    source = write(
        tmp_path / "d.jsonl",
        {**QA, "answers": ["A cat", "cat"]},
        {"task": "summarization", "source": "Long.", "target": "Short"},
        {"task": "translation", "source": "Hello", "target": "Hallo", "source_lang": "en",
         "target_lang": "de", "references": ["Hallo", "Guten Tag"]},
    )  # fmt: skip
    qa, summary, translation = load_examples(source)
    assert qa.prompt == "Context: A cat sat.\nQuestion: Who sat?\nAnswer:"
    assert (qa.completion, qa.references) == (" A cat", ("A cat", "cat"))
    assert (summary.prompt, summary.references) == ("Long.\nSummary:", ("Short",))
    assert translation.prompt == "English: Hello\nGerman:"
    assert translation.references == ("Hallo", "Guten Tag")


def test_named_template_overrules_the_task(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", QA)
    assert load_examples(source, template="summarization")[0].prompt.endswith("\nSummary:")


@pytest.mark.parametrize(
    ("template", "prompt", "completion"),
    [
        ("Q: {question}\\nA: ", "Q: Who?\nA:", " Cat"),  # the blank moves into the completion
        ("Q: {question}\n", "Q: Who?\n", "Cat"),
        ("{{x}} {question}", "{x} Who?", " Cat"),
    ],
)
def test_own_template(tmp_path: Path, template: str, prompt: str, completion: str) -> None:
    row = {"question": "Who?", "answers": {"text": ["Cat", "The cat"], "answer_start": [0, 0]}}
    [example] = load_examples(write(tmp_path / "d.jsonl", row), template=template)
    assert (example.prompt, example.completion) == (prompt, completion)
    assert example.references == ("Cat", "The cat")


def test_messages_use_the_chat_template_with_one_bos(tmp_path: Path) -> None:
    tokenizer = make_byte_tokenizer(adds_bos=True)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    source = write(tmp_path / "d.jsonl", {"messages": messages})
    [example] = load_examples(source, tokenizer=tokenizer)
    assert example.prompt == "<s>[user]a\n[assistant]b\n[user]c\n[assistant]"
    assert (example.completion, example.references) == ("d", ("d",))
    ids = encode_prompt(example, tokenizer)
    assert ids == tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(example.prompt, tokenizer) == ids  # as plain text too


def test_ids_are_made_unique(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": i} for i in ("a", "a", "a#2", "a")]
    ids = [e.id for e in load_examples(write(tmp_path / "d.jsonl", *rows))]
    assert ids[:2] == ["a", "a#2"]
    assert len(set(ids)) == 4


def test_limit_leaves_later_rows_unread(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", PAIR, "", PAIR, "{broken")
    assert [e.id for e in load_examples(source, limit=2)] == ["line-1", "line-3"]
    with pytest.raises(ConfigError, match="limit is 0"):
        load_examples(source, limit=0)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", r"d\.jsonl:2: broken JSON"),
        ('{"prompt": "x", "completion": ', r":2: broken JSON: .* at column 31"),
        ('{"n": ' + "1" * 5000 + "}", r":2: a number that cannot be read"),
        ("[1, 2]", r"d\.jsonl:2: expected a JSON object, found list"),
        ({"text": "x", "n": 1}, r":2: no known columns; .*source \+ target; found n, text"),
        ({"prompt": "x"}, r":2: no known columns"),
        ({"prompt": "x", "completion": 3}, r":2: completion is int; expected text"),
        ({"prompt": "x", "completion": "  "}, r":2: the answer is empty"),
        ({"prompt": "", "completion": "x"}, r":2: the prompt is empty"),
        ({"prompt": "x", "completion": "\ud800"}, r":2: the answer holds half a surrogate"),
        ({"source": "x", "target": "y"}, r":2: no prompt template .*no task field.*--template"),
        ({**QA, "task": "poetry"}, r":2: no prompt template .*'poetry'"),
        ({**QA, "target": ""}, r":2: the answer is empty"),
        ({**QA, "answers": [1]}, r":2: answers is not a list of texts"),
        ({**QA, "task": "translation"}, r":2: the template wants a field 'source_lang'"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    source = write(tmp_path / "d.jsonl", PAIR, row)
    with pytest.raises(DataError, match=message):
        load_examples(source)


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
        [{"role": "user", "content": None}, {"role": "assistant", "content": "y"}],
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, byte_tokenizer: Any) -> None:
    source = write(tmp_path / "d.jsonl", {"messages": messages})
    with pytest.raises(DataError, match=r":1: expected messages as a list"):
        load_examples(source, tokenizer=byte_tokenizer)


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    source = write(
        tmp_path / "d.jsonl",
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    )
    plain = make_byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        load_examples(source, tokenizer=plain)
    with pytest.raises(ConfigError, match="need a tokenizer"):
        load_examples(source)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Q: {source} A: {target}", r"would put the answer into the prompt"),
        ("poems", "unknown template 'poems'; expected translation, summarization, qa"),
        ("{question", "template"),
        ("{0}", "not the plain name"),
        ("{source.__class__}", "not the plain name"),
        ("{source:>99}", "not the plain name"),
    ],
)
def test_bad_templates(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_examples(write(tmp_path / "d.jsonl", QA), template=template)


def test_template_with_a_field_that_the_row_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r":1: the template wants a field 'topic'.*source, target"):
        load_examples(write(tmp_path / "d.jsonl", QA), template="About {topic}:")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no such file"):
        load_examples("none.jsonl")
    with pytest.raises(DataError, match="no rows"):
        load_examples(write(tmp_path / "empty.jsonl"))
    write(tmp_path / "a.jsonl", PAIR)
    with pytest.raises(DataError, match=r"is a folder.*a\.jsonl"):
        load_examples(tmp_path)
    with pytest.raises(DataError, match=r"only \.jsonl"):
        load_examples(write(tmp_path / "a.csv", "a,b"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "ä"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl:1: not UTF-8"):
        load_examples(tmp_path / "latin.jsonl")


def test_broken_gzip(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jsonl.gz", *[PAIR] * 50).read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "no.jsonl.gz").write_bytes(b'{"prompt": "x"}\n')
    for name in ("cut.jsonl.gz", "no.jsonl.gz"):
        with pytest.raises(DataError, match=f"{name}: cannot be read after line"):
            load_examples(tmp_path / name)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is there")
def test_hub_ids_need_the_extra() -> None:
    for name in ("squad", "rajpurkar/squad:validation", "owner/name/config:train"):
        with pytest.raises(DataError, match=r"pip install 'firstlm\[hub\]'"):
            load_examples(name)


def test_hub_ids_are_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a local folder of the same name for the hub's; the way is the same."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    rows = [{"prompt": f"say {i}:", "completion": f" {i}"} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(text)
    examples = load_examples("owner/name/default:train[1:4]")
    assert [e.prompt for e in examples] == ["say 1:", "say 2:", "say 3:"]
    assert examples[0].where == "owner/name/default[train[1:4]] row 1"
    with pytest.raises(DataError, match=r"split 'test'.*could not be loaded"):
        load_examples("owner/name/default:test")


# --- tokens --------------------------------------------------------------------------------------


def test_answer_continues_the_prompt_and_ends_with_eos(tokenizer: Any) -> None:
    example = Example("1", "Question: Who sat?\nAnswer:", " The cat", ("The cat",))
    item = encode(example, tokenizer)
    assert item.prompt_ids == encode_prompt(example.prompt, tokenizer)
    assert item.answer_ids[-1] == tokenizer.eos_token_id
    assert item.answer_ids.count(tokenizer.eos_token_id) == 1
    joint = tokenizer(example.prompt + example.completion)["input_ids"]
    assert item.prompt_ids + item.answer_ids[:-1] == joint
    assert tokenizer.decode(item.answer_ids, skip_special_tokens=True) == " The cat"


def test_prompt_ids_stay_those_of_inference_when_a_token_would_cross() -> None:
    merging = make_byte_tokenizer(merges=[("n", "b")])
    assert len(merging("unbe", add_special_tokens=False)["input_ids"]) == 3
    item = encode(Example("1", "un", "be", ("be",)), merging)
    assert item.prompt_ids == encode_prompt("un", merging)
    assert merging.convert_ids_to_tokens(item.answer_ids) == ["b", "e", "</s>"]


def test_tokenizers_that_close_every_text() -> None:
    from tokenizers import processors

    closing = make_byte_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    item = encode(Example("1", "ab", "c", ("c",)), closing)
    assert item.prompt_ids[0] == 1
    assert 2 not in item.prompt_ids
    assert item.answer_ids[1:] == [2]


def test_too_long_names_row_lengths_and_option(
    tmp_path: Path, byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [PAIR, {"id": "big", "prompt": "x" * 20, "completion": "y" * 10}]
    examples = load_examples(write(tmp_path / "d.jsonl", *rows))
    pattern = r"d\.jsonl:2 \(id big\): prompt of 21 \+ answer of 11 .* 32, .*31.*--max-length"
    with pytest.raises(DataError, match=pattern):
        encode_all(examples, byte_tokenizer, 31)
    assert len(encode_all(examples, byte_tokenizer, 32)[0]) == 2
    with caplog.at_level(logging.WARNING):
        kept, encoded = encode_all(examples, byte_tokenizer, 31, too_long="drop")
    assert [e.id for e in kept] == ["line-1"]
    assert len(encoded) == 1
    assert "dropped 1 of 2 examples" in caplog.text
    with pytest.raises(DataError, match="all 2 examples are longer"):
        encode_all(examples, byte_tokenizer, 3, too_long="drop")


def test_collator_masks_everything_but_the_answer() -> None:
    batch = Collator(0)([Encoded([5, 6, 7], [8, 2]), Encoded([9], [2])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 2], [0, 0, 0, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE] * 3 + [8, 2], [IGNORE] * 4 + [2]]
    assert batch["prompt_mask"].tolist() == [[True] * 3 + [False] * 2, [False] * 3 + [True, False]]
    assert batch["prompt_mask"].dtype == torch.bool


def test_pad_left_keeps_empty_rows_masked() -> None:
    ids, mask = pad_left([[1, 2], []], pad_id=9)
    assert ids.tolist() == [[1, 2], [9, 9]]
    assert mask.tolist() == [[1, 1], [0, 0]]


# --- held-out examples ---------------------------------------------------------------------------


def some(count: int) -> list[Example]:
    """Examples of which two each share a context."""
    return [Example(str(i), f"p{i}", "c", ("c",), {"context": f"t{i // 2}"}) for i in range(count)]


def test_split_is_deterministic_and_keeps_contexts_together() -> None:
    examples = some(200)
    train, held = split_validation(examples, 0.1, seed=3)
    assert len(held) == 20
    assert sorted(train + held, key=lambda e: int(e.id)) == examples
    assert not {e.row["context"] for e in train} & {e.row["context"] for e in held}
    again = split_validation(examples[::-1], 0.1, seed=3)[1]
    assert {e.id for e in again} == {e.id for e in held}
    other = split_validation(examples, 0.1, seed=4)[1]
    assert {e.id for e in other} != {e.id for e in held}


def test_split_always_leaves_both_parts() -> None:
    train, held = split_validation(some(4), 0.01)
    assert (len(train), len(held)) == (2, 2)
    train, held = split_validation(some(4), 0.99)
    assert (len(train), len(held)) == (2, 2)
    with pytest.raises(DataError, match="cannot hold out"):
        split_validation(some(2), 0.5)
    with pytest.raises(ConfigError, match="expected between 0 and 1"):
        split_validation(some(4), 1.5)


@pytest.mark.parametrize(
    "name", ["qa/squad_v1", "qa/qamr", "summarization/scitldr", "translation/wmt_ende"]
)
def test_real_data(shared_data: Path, tokenizer: Any, name: str) -> None:
    file = shared_data / name / "test.jsonl.gz"
    if not file.exists():
        pytest.skip(f"FIRSTLM_DATA has no {name}")
    examples = load_examples(file, limit=50)
    assert len({e.id for e in examples}) == 50
    for example, item in zip(*encode_all(examples, tokenizer, 100_000), strict=True):
        assert example.completion.strip() == example.row["target"].strip()
        assert tokenizer.decode(item.answer_ids, skip_special_tokens=True) == example.completion


def test_rows_to_answer_need_no_answer(tmp_path: Path, byte_tokenizer: Any) -> None:
    rows = [
        {"prompt": "why"},
        {"source": "why", "task": "qa"},
        {"messages": [{"role": "user", "content": "why"}]},
    ]
    source = write(tmp_path / "d.jsonl", *rows)
    found = load_examples(source, tokenizer=byte_tokenizer, answers=False)
    assert [example.prompt for example in found][:2] == ["why", "why\nAnswer:"]
    assert "why" in found[2].prompt
    with pytest.raises(DataError, match=":1: no known columns"):
        load_examples(source, tokenizer=byte_tokenizer)


def test_what_is_scored_is_drawn_from_all_of_a_file_and_always_the_same(tmp_path):
    file = tmp_path / "test.jsonl"
    rows = [
        {"id": f"{i:03}", "prompt": f"p{i}", "completion": "c", "context": f"text {i // 50}"}
        for i in range(200)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scored_examples(str(file), limit=40)
    assert [e.id for e in found] == [e.id for e in scored_examples(str(file), limit=40)]
    ids = [e.id for e in found]
    assert ids == sorted(set(ids))
    assert {e.group for e in found} == {f"text {i}" for i in range(4)}
    assert len(scored_examples(str(file))) == len(scored_examples(str(file), limit=500)) == 200
