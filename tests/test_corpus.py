# SPDX-License-Identifier: Apache-2.0
"""Docstrings become training examples: the same each time, none in both parts."""

from __future__ import annotations

import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from firstlm import corpus
from firstlm.corpus import docstring_examples, split_docstring
from firstlm.errors import ConfigError, DataError

BODY = "The frame is built from the given rows, which must all have one length and one kind."


def test_split_docstring_takes_prose_only() -> None:
    text = f"Build a ``Frame`` from rows.\n\n    {BODY}\n\n    Args:\n        rows: a list\n    "
    assert split_docstring(text) == (BODY, "Build a Frame from rows.")


@pytest.mark.parametrize(
    "text",
    [
        "Build a frame from rows.",
        "Build a frame from rows.\n\nToo short.",
        f"Build.\n\n{BODY}",
        f"build(rows, kind=None) makes a frame\n\n{BODY}",
        "Build a frame from rows.\n\nArgs:\n    rows: " + BODY,
        "Build a frame from rows.\n\nParameters\n----------\n" + BODY,
        "Build a frame from rows.\n\n>>> build(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)",
    ],
)
def test_split_docstring_leaves_the_rest(text: str) -> None:
    assert split_docstring(text) is None


def test_bodies_end_at_sixty_words() -> None:
    body, _ = split_docstring("Build a frame from rows.\n\n" + f"{BODY} " * 9) or ("", "")
    assert len(body.split()) == 60


def test_installed_packages_give_diverse_examples() -> None:
    train, held = docstring_examples(500, seed=1)
    assert (len(train), len(held)) == (450, 50)
    both = train + held
    assert len({e.id for e in both}) == len({e.prompt for e in both}) == 500
    assert len({e.completion.lower() for e in both}) == 500
    modules = [{e.id.split("#")[0].rpartition(".")[0] for e in part} for part in (train, held)]
    assert not modules[0] & modules[1]
    packages = Counter(e.row["package"] for e in both)
    assert len(packages) >= 20
    assert packages.most_common(1)[0][1] <= 150
    for example in both:
        assert example.prompt.endswith("\nSummary:")
        assert example.completion == " " + example.references[0]
        assert 12 <= len(example.row["source"].split()) <= 60
    assert docstring_examples(500, seed=1) == (train, held)
    assert docstring_examples(500, seed=2)[0] != train


def test_bad_limits_and_bare_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ({"limit": 3}, {"validation_share": 0.0}):
        with pytest.raises(ConfigError, match="expected 10 examples or more"):
            docstring_examples(**bad)
    empty = dict.fromkeys(sysconfig.get_paths(), str(tmp_path))
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: empty)
    with pytest.raises(DataError, match="no docstrings"):
        docstring_examples(50)
