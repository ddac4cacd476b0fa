# SPDX-License-Identifier: Apache-2.0
"""`firstlm generate` from end to end on a tiny model: answers, strips, times, errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import make_byte_tokenizer, tiny_llama

from firstlm import FirstModel, cli
from firstlm.arms import Arms, answer
from firstlm.generate_command import TextPieces, decode, mask_strip, shorten
from firstlm.thresholds import Threshold

PROMPT = "Water boils at"
LINE = re.compile(
    r"^skipped (\d+\.\d)%  (\S+)  TTFT \d+\.\d ms  TPOT (?:\d+\.\d ms|-)  \d+\.\d tokens/s"
    r"  KV \d+\.\d+ [KM]iB$"
)


def with_lora(model):
    """Put LoRA that really changes something on a model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model.base = get_peft_model(model.base, config)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.base.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Folder of an artifact whose routers skip layer 2 of 4, for a saved base with a tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    base, tokenizer = tiny_llama(), make_byte_tokenizer()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = FirstModel.from_base(base, tokenizer=tokenizer)
    for layer, router in enumerate(model.routers):
        router.weight.data.zero_()
        router.bias.data.fill_(-1.0 if layer == 2 else 2.0)
    model = with_lora(model)
    model.base_id = str(folder / "base")
    rows = [Threshold(0.0, 2.0, 0.0), Threshold(0.25, 0.0, 0.25), Threshold(0.5, -3.0, 1.0)]
    model.thresholds.table["skip"] = rows
    model.save_pretrained(str(folder / "artifact"))
    return str(folder / "artifact")


@pytest.fixture
def model(artifact):
    return FirstModel.from_pretrained(artifact)


@pytest.fixture
def firstlm(capsys):
    def call(*words):
        code = cli.main(["generate", *map(str, words)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def expected(model, prompt, count, **options):
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    out = model.generate(
        ids, torch.ones_like(ids), max_new_tokens=count, do_sample=False, **options
    )
    return decode(model.tokenizer, out.sequences[0, ids.shape[1] :].tolist())


def test_the_answer_streams_and_a_line_says_what_it_took(artifact, model, firstlm):
    code, out, err = firstlm(artifact, "--prompt", PROMPT, "--max-new-tokens", 8)
    assert (code, err) == (0, "")
    text, line, rest = out.rsplit("\n", 2)
    assert rest == ""
    assert text == expected(model.merge_and_unload(), PROMPT, 8)
    found = LINE.match(line)
    assert found, line
    assert found.groups() == ("25.0", "██·█")


def test_a_wanted_rate_and_several_prompts(artifact, firstlm):
    code, out, _ = firstlm(artifact, "--prompt", "one", "two", "--skip-rate", "0.0")
    assert code == 0
    assert out.count("skipped 0.0%  ████") == 2
    assert "[1/2] one\n" in out
    assert "[2/2] two\n" in out


def test_the_fast_engine_answers_the_same(artifact, firstlm):
    words = (artifact, "--prompt", PROMPT, "--skip-rate", "0.25", "--max-new-tokens", "8")
    _, wanted, _ = firstlm(*words, "--dtype", "float32")
    code, found, said = firstlm(*words, "--dtype", "float32", "--engine", "fast")
    assert code == 0
    assert found.splitlines()[0] == wanted.splitlines()[0]
    assert "Compiling" in said
    assert "engine='hf'" not in said


def test_beams_are_those_of_transformers(artifact, model, firstlm):
    words = (artifact, "--prompt", PROMPT, "--max-new-tokens", 6, "--num-beams", 3)
    code, out, _ = firstlm(*words)
    assert code == 0
    text, line, _ = out.rsplit("\n", 2)
    assert text == expected(model.merge_and_unload(), PROMPT, 6, num_beams=3)
    assert LINE.match(line)


def test_sampling_repeats_with_a_seed(artifact, firstlm):
    def text(seed):
        words = ("--temperature", "1.5", "--top-p", "0.9", "--seed", seed, "--max-new-tokens", 12)
        return firstlm(artifact, "--prompt", PROMPT, *words)[1].rsplit("\n", 2)[0]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_comparison_shows_both_side_by_side(artifact, model, firstlm, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = firstlm(
        artifact, "--prompt", PROMPT, "[b]x", "--compare", "--max-new-tokens", 4
    )
    assert (code, err) == (0, "")
    rows = {}
    for line in out.splitlines():
        if line.strip():
            rows.setdefault(line.split()[0], []).append(line.split()[1:])
    assert rows["layers"] == [["████", "██·█"]] * 2
    assert rows["skipped"] == [["0.0%", "25.0%"]] * 2
    assert rows["base"] == [["routed", "ratio"]] * 2
    for name in ("TTFT", "TPOT", "tokens/s"):
        assert all(re.fullmatch(r"\d+\.\d\dx", row[-1]) for row in rows[name])
    assert all(row[-1] == "0.75x" for row in rows["KV"])
    assert "[2/2] [b]x" in out
    assert "2 prompts: skipped 25.0% (25.0% to 25.0%)" in out


def test_arms_are_the_base_exactly_and_the_merged_model(artifact, model):
    ids = model.tokenizer(PROMPT)["input_ids"]
    arms = Arms(model)
    before = {name: p.clone() for name, p in model.base.named_parameters()}
    plain = FirstModel.from_base(tiny_llama())
    merged = FirstModel.from_pretrained(artifact).merge_and_unload()
    for _ in range(2):  # going back and forth leaves nothing behind
        base, routed = arms.answers(ids, None, max_new_tokens=12)
        with plain.run_all():
            assert base.ids == answer(plain, ids, max_new_tokens=12).ids
        assert routed.ids == answer(merged, ids, max_new_tokens=12).ids
        assert base.ids != routed.ids
    assert base.layer_calls == {"prefill": 4, "decode": 4 * (len(base.ids) - 1)}
    assert routed.layer_calls == {"prefill": 3, "decode": 3 * (len(routed.ids) - 1)}
    assert all(torch.equal(p, before[name]) for name, p in model.base.named_parameters())


def test_timed_runs_have_equally_many_tokens_and_take_turns(model, monkeypatch):
    turns = []
    whole = Arms._answer
    monkeypatch.setattr(
        Arms,
        "_answer",
        lambda self, name, *a, **k: turns.append(name) or whole(self, name, *a, **k),
    )
    base, routed = Arms(model).timings([1, 5, 9], None, tokens=5, rounds=3)
    assert turns == ["base", "routed", "routed", "base", "base", "routed"]
    assert [len(run.seconds) for run in base + routed] == [5] * 6
    assert all(run.tpot > 0 for run in base + routed)


def test_a_weight_that_cannot_be_merged_leaves_the_adapter_on(model):
    ids = model.tokenizer(PROMPT)["input_ids"]
    wanted = answer(model, ids, max_new_tokens=6).ids
    layer = next(m for m in model.base.modules() if hasattr(m, "lora_variant"))
    layer.lora_variant["default"] = None  # such as DoRA
    arms = Arms(model)
    layer.lora_variant.clear()
    assert arms._merged is None
    assert arms.answers(ids, None, max_new_tokens=6)[1].ids == wanted


@pytest.mark.parametrize("text", ["plain text", "año, naïve, 東京, 🚂 and [b]", "\n two  spaces"])
def test_pieces_make_up_the_text_and_no_half_characters(text):
    tokenizer = make_byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TextPieces(tokenizer)
    found = [pieces.push(i, last=n == len(ids)) for n, i in enumerate(ids, start=1)]
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_a_half_character_at_the_end_is_shown():
    tokenizer = make_byte_tokenizer()
    first = tokenizer("é", add_special_tokens=False)["input_ids"][0]
    assert TextPieces(tokenizer).push(first, last=True) == "\ufffd"


def test_strips_fall_back_to_ascii():
    keep = torch.tensor([True, False, True])
    assert mask_strip(keep, io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == "█·█"
    assert mask_strip(keep, io.TextIOWrapper(io.BytesIO(), encoding="ascii")) == "#.#"


def test_long_prompts_are_shown_on_one_line():
    assert shorten("a\n b") == "a b"
    assert len(shorten("word " * 100)) <= 70


def test_a_pipe_gets_plain_text_and_stdin_is_one_prompt(artifact, model):
    prompt = "Context: x.\nQuestion: y?\nAnswer:"
    for words in ((), ("--compare",)):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "firstlm",
                "generate",
                artifact,
                "--max-new-tokens",
                "4",
                *words,
            ],
            input=prompt + "\n",
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii()
        assert "\x1b" not in done.stdout
        assert "##.#" in done.stdout
        assert "25.0%" in done.stdout


@pytest.mark.parametrize("rows", [True, False])
def test_prompts_from_a_file(artifact, firstlm, tmp_path, rows):
    file = tmp_path / ("p.jsonl" if rows else "p.txt")
    row = json.dumps({"source": "abc", "target": "d"})
    file.write_text(f"{row}\n{row}\n{row}\n" if rows else "one\n\ntwo\nthree\n")
    template = ("--template", "qa") if rows else ()
    words = ("--file", file, "--limit", 2, "--max-new-tokens", 2, *template)
    code, out, _ = firstlm(artifact, *words)
    assert code == 0
    assert out.count("skipped") == 2
    assert ("[2/2] abc Answer:" if rows else "[2/2] two") in out


def test_chat_rows_are_asked_with_the_template(artifact, model, firstlm, tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n")
    code, out, _ = firstlm(artifact, "--file", file, "--max-new-tokens", 4)
    assert code == 0
    asked = model.tokenizer.apply_chat_template(
        chat[:1], tokenize=False, add_generation_prompt=True
    )
    ids = model.tokenizer(asked, add_special_tokens=False)["input_ids"]
    merged = model.merge_and_unload()
    wanted = decode(model.tokenizer, answer(merged, ids, max_new_tokens=4).ids)
    assert out.startswith(wanted + "\nskipped")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", "x", "--skip-rate", "0.99"], "between 0 and 0.9"),
        (["--prompt", "x", "--skip-rate", "0.25", "--prefill", "full"], "no thresholds"),
        (["--prompt", ""], "empty"),
        (["--prompt", "a" * 600], "exceed the model's context of 512"),
        (["--prompt", "x", "--template", "qa"], "--template is for"),
        (["--prompt", "x", "--compare", "--num-beams", "2"], "leave --num-beams out"),
        (["--prompt", "x", "--weights", "int8"], "needs --engine fast"),
        (["--prompt", "x", "--engine", "fast", "--num-beams", "2"], "needs --engine hf"),
        (["--file", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--file", "."], ".: this is a folder; name a file"),
        (["--prompt", "x", "--limit", "3"], "--limit is for the prompts of a file"),
        (["--prompt", "\udcff\udcfe"], "--prompt: the prompt is not UTF-8 text"),
        (["--file", "empty.txt"], "empty.txt: the prompt is empty"),
        (["--file", "latin.txt"], "not UTF-8"),
        (["--file", "broken.jsonl"], "broken.jsonl:2: broken JSON"),
        (["--prompt", "x", "--model", "nowhere/at-all/x"], "neither a model folder nor a hub id"),
    ],
)
def test_bad_input_ends_with_one_message(artifact, firstlm, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{\n')
    code, out, err = firstlm(artifact, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1


def test_an_artifact_that_is_not_there(firstlm):
    code, out, err = firstlm("/nowhere/artifact", "--prompt", "x")
    assert (code, out) == (2, "")
    assert "/nowhere/artifact" in err


def test_an_empty_stdin(artifact, firstlm, monkeypatch):
    stdin = types.SimpleNamespace(isatty=lambda: True, read=lambda: "\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = firstlm(artifact)
    assert (code, out) == (2, "")
    assert err.startswith("Prompt (Ctrl-D")
    assert "stdin: the prompt is empty" in err
