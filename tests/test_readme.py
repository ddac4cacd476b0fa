# SPDX-License-Identifier: Apache-2.0
"""The README does what it says: its Python runs, its commands run, its numbers are the results'."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "examples").exists() or (tmp_path / "examples").symlink_to(ROOT / "examples")
    return subprocess.run(
        arguments, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )


def test_it_starts_with_the_two_commands() -> None:
    first = blocks("bash")[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make demo", "make test"]
    targets = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in targets
    assert "\ntest:" in targets


@pytest.mark.usefixtures("smollm2_folder")
def test_the_python_block_runs(tmp_path: Path) -> None:
    (block,) = blocks("python")
    done = run([sys.executable, "-c", block], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prefill" in done.stdout


@pytest.mark.usefixtures("smollm2_folder")
def test_the_commands_run(tmp_path: Path) -> None:
    lines = [line for block in blocks("bash")[1:] for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("firstlm ")]
    assert {words[1] for words in commands} >= {"generate", "inspect", "train", "diagnose"}
    for words in commands:
        done = run([sys.executable, "-m", *words], tmp_path)
        # diagnose may report what it finds (1), but nothing may be refused or crash
        allowed = {0, 1} if words[1] == "diagnose" else {0}
        assert done.returncode in allowed, (words, done.stdout[-2000:], done.stderr[-2000:])
        assert "Traceback" not in done.stderr


def test_the_tables_are_the_results() -> None:
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        from table import START, drawn_from, pages, pictures
    finally:
        sys.path.pop(0)
    found = pages()
    names = {"README.md", "results.md", "adaptivity.md", "speed.md", "capacity.md"}
    names |= {"quality.md", "vllm.md"}
    assert {file.name for file in found} == names
    for file, content in found.items():
        assert file.read_text(encoding="utf-8") == content
    assert README.split(START)[1].count("| --- |") > 1
    for file, source in pictures().items():  # written by the same command
        assert drawn_from(file) == source
        assert any(f"({file.relative_to(ROOT)})" in text for text in (README, *found.values()))
