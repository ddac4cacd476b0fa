# SPDX-License-Identifier: Apache-2.0
"""Forms of requests and answers, without a server: tokens that are parts of letters, slips."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import make_byte_tokenizer
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from firstlm.api import EXTENSIONS, Answer, CompletionRequest, Form, TextSoFar, token_bytes
from firstlm.policies import RunAll
from firstlm.scheduler import Ask, Piece, Request

TEXT = "é🎉 a"


def sentencepiece() -> Any:
    """A vocabulary with a token for each byte, as sentencepiece falls back on."""
    letters = {"▁": 256, "a": 257, "▁a": 258}
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | letters
    raw = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("make", [make_byte_tokenizer, sentencepiece])
def test_bytes_of_tokens_make_up_the_text(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) >= 6 + 2
    assert b"".join(token_bytes(tokenizer, token) for token in ids).decode() == TEXT


def test_bytes_of_real_tokens_make_up_the_text(tokenizer: Any) -> None:
    ids = tokenizer(TEXT + " 東京 naïve", add_special_tokens=False)["input_ids"]
    found = b"".join(token_bytes(tokenizer, token) for token in ids)
    assert found.decode() == TEXT + " 東京 naïve"


def written(
    chat: bool, pieces: list[Piece], logprobs: int | None = 5, tokenizer: Any = None
) -> Any:
    tokenizer = tokenizer or make_byte_tokenizer()
    ask = Ask(ids=[65], policy=RunAll(), max_new_tokens=8, logprobs=logprobs)
    request = Request(ask, lambda _: None, frozenset())
    answer = Answer(0, request, TextSoFar(tokenizer, []), 1)
    for piece in pieces:
        answer.take(piece)
    return Form(chat, "tiny", tokenizer).whole([answer], 1)["choices"][0]["logprobs"]


def test_parts_of_letters_have_names_of_their_own() -> None:
    letter = "🎉".encode()
    ids = make_byte_tokenizer()("🎉", add_special_tokens=False)["input_ids"]
    top = tuple((token, -float(i)) for i, token in enumerate(ids))
    pieces = [Piece(ids[0], logprob=-0.5, top=top), Piece(None, "length")]
    found = written(False, pieces)
    assert found["tokens"] == [r"bytes:\xf0"]
    assert sorted(found["top_logprobs"][0].values()) == [-3.0, -2.0, -1.0, 0.0]
    chat = written(True, pieces)
    assert [one["bytes"] for one in chat["content"][0]["top_logprobs"]] == [[b] for b in letter]


def test_a_space_that_decoders_strip_is_part_of_its_token() -> None:
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]  # as Llama 2's
    )
    pieces = [Piece(257, logprob=-1.0, top=((257, -1.0), (258, -2.0))), Piece(None, "length")]
    found = written(False, pieces, tokenizer=tokenizer)["top_logprobs"]
    assert [list(top.items()) for top in found] == [[("a", -1.0), (" a", -2.0)]]
    assert [token_bytes(tokenizer, token) for token in (257, 258)] == [b"a", b" a"]


def test_of_tokens_with_one_name_the_likelier_is_told() -> None:
    tokenizer = sentencepiece()
    tokenizer.add_tokens("b")
    tokenizer.add_tokens(AddedToken(" b", normalized=False))
    tokenizer.backend_tokenizer.decoder = decoders.Strip(" ", 1, 0)
    one, two = (tokenizer.convert_tokens_to_ids(name) for name in ("b", " b"))
    pieces = [Piece(one, logprob=-1.0, top=((one, -1.0), (two, -2.0))), Piece(None, "length")]
    assert written(False, pieces, tokenizer=tokenizer)["top_logprobs"] == [{"b": -1.0}]


def test_an_empty_answer_has_empty_probabilities_where_they_were_asked_for() -> None:
    ended = [Piece(2, "stop", -0.1)]
    assert written(True, ended) == {"content": [], "refusal": None}
    assert written(False, ended)["tokens"] == []
    assert written(True, ended, None) is None


@pytest.mark.parametrize("name", ["skip_rat", "skip-rate", "skiprate", "polcy", "prefil"])
def test_a_slip_in_a_name_of_ours_is_told(name: str) -> None:
    with pytest.raises(ValidationError, match=f"no field '{name}'; did you mean"):
        CompletionRequest.model_validate({"prompt": "a", name: 0.2})


def test_names_of_others_are_passed_over() -> None:
    others = ["user", "metadata", "store", "min_p", "n_keep", "keep_alive", "prefix", "kept"]
    others += ["skip_special_tokens", "prompt_cache_key"]
    CompletionRequest.model_validate({"prompt": "a", **dict.fromkeys(others, 1)})
    CompletionRequest.model_validate({"prompt": "a", **{f"skip_rat{i}": 1 for i in range(10**5)}})


def test_slips_are_told_of_all_fields_that_openai_has_not() -> None:
    assert set(EXTENSIONS) <= CompletionRequest.model_fields.keys()
