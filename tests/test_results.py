# SPDX-License-Identifier: Apache-2.0
"""What is on disk is whole: writes that really fail leave the old content and no leftovers."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlm.results import (
    atomic_dir,
    check_file,
    portable,
    provenance,
    sha256_of,
    to_json,
    write_json,
    write_text,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


def names(folder):
    return sorted(child.name for child in folder.iterdir())


def run_with_small_files(code, *arguments, limit=20_000):
    """Run code in a process whose files can't grow past `limit` bytes: its writes really fail."""
    start = f"""
        import resource, signal, sys
        from pathlib import Path
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    """
    program = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )


@given(json_values)
def test_json_comes_back_as_it_was_written(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("json") / "a" / "run.json"
    write_json(file, value)
    assert json.loads(file.read_text(encoding="utf-8")) == value
    assert names(file.parent) == ["run.json"]


def test_json_takes_numpy_and_torch_and_has_no_nan():
    values = {
        "nan": float("nan"),
        "inf": [float("inf")],
        "numpy": np.float32(0.5),
        "array": np.arange(2),
        "tensor": torch.tensor([True]),
        "half": torch.tensor(float("nan")),
        1: (1, 2),
    }
    assert json.loads(to_json(values), parse_constant=pytest.fail) == {
        "nan": None, "inf": [None], "numpy": 0.5, "array": [0, 1], "tensor": [True], "half": None,
        "1": [1, 2],
    }  # fmt: skip
    with pytest.raises(TypeError, match="object can't be written"):
        to_json({"x": object()})


def test_a_value_that_cannot_be_written_leaves_the_old_file(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": 1}
    assert names(tmp_path) == ["run.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"old": 1})
    done = run_with_small_files(
        """
        from firstlm.results import write_json
        write_json(sys.argv[1], "x" * 50_000)
        """,
        file,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert json.loads(file.read_text()) == {"old": 1}
    assert names(tmp_path) == ["run.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "art"
    with atomic_dir(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
        assert folder.parent == tmp_path
    assert (target / "sub" / "a").read_text() == "1"
    with atomic_dir(target) as folder:
        (folder / "b").write_text("2")
        assert names(target) == ["sub"]
    assert names(target) == ["b"]
    assert names(tmp_path) == ["art"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path, error):
    target = tmp_path / "art"
    with atomic_dir(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(error), atomic_dir(target) as folder:  # noqa: PT012
        (folder / "a").write_text("new")
        raise error
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["art"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_on_a_full_disk_leaves_the_old_one(tmp_path, exists):
    target = tmp_path / "art"
    if exists:
        with atomic_dir(target) as folder:
            (folder / "a").write_text("old")
    done = run_with_small_files(
        """
        from firstlm.results import atomic_dir
        with atomic_dir(sys.argv[1]) as folder:
            (folder / "first").write_text("fits")
            (folder / "a").write_text("x" * 50_000)
        """,
        target,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert names(tmp_path) == (["art"] if exists else [])
    if exists:
        assert names(target) == ["a"]
        assert (target / "a").read_text() == "old"


def test_a_kill_in_the_middle_leaves_the_old_folder(tmp_path):
    target = tmp_path / "art"
    with atomic_dir(target) as folder:
        (folder / "a").write_text("old")
    code = """
        import os, signal, sys
        from firstlm.results import atomic_dir
        with atomic_dir(sys.argv[1]) as folder:
            (folder / "a").write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)])
    assert done.returncode == -signal.SIGKILL
    assert (target / "a").read_text() == "old"


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path):
    target = tmp_path / "art"
    with atomic_dir(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_dir(target) as folder:
        folder.rmdir()
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["art"]


def test_a_last_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "art"
    with atomic_dir(target) as folder:
        (folder / "a").write_text("old")
    replace = Path.replace
    with pytest.raises(OSError, match="gone"), atomic_dir(target) as folder:  # noqa: PT012
        (folder / "a").write_text("new")

        def failing(self, other):
            if self == folder:  # no real disk fails here on demand
                raise OSError("gone")
            return replace(self, other)

        monkeypatch.setattr(Path, "replace", failing)
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["art"]


def test_a_file_in_the_way_is_not_replaced(tmp_path):
    target = tmp_path / "art"
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"), atomic_dir(target):
        pass
    assert target.read_text() == "mine"


def test_links_stay_links(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    with atomic_dir(link) as folder:
        (folder / "a").write_text("1")
    write_text(link / "b", "2")
    assert link.is_symlink()
    assert names(real) == ["a", "b"]


def test_files_have_the_rights_others_would_get(tmp_path):
    old = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "1")
        with atomic_dir(tmp_path / "d"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o755


def test_a_folder_in_a_files_place_is_named(tmp_path):
    for write in (check_file, lambda path: write_text(path, "x")):
        with pytest.raises(IsADirectoryError) as caught:
            write(tmp_path)
        assert caught.value.filename == str(tmp_path)
    check_file(None)
    check_file(tmp_path / "new" / "file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text").write_text("x")
    with pytest.raises(NotADirectoryError):
        check_file(tmp_path / "text" / "file")


def test_sha256_of_a_file(tmp_path):
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    known = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_of(empty) == known


def test_provenance_says_where_a_number_comes_from():
    record = provenance(seed=3, dataset="abc")
    assert json.loads(to_json(record)) == record
    assert record["seed"] == 3
    assert record["dataset"] == "abc"
    assert record["torch"] == torch.__version__
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["cpu"]
    assert record["hardware"]["gpu"] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    assert record["date"].endswith("+00:00")
    assert record["argv"][1:] == sys.argv[1:]


def test_provenance_names_no_folders_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("FIRSTLM_DATA", str(tmp_path))
    monkeypatch.setattr(
        sys, "argv", ["/x/bin/firstlm", "eval", f"{tmp_path}/qa/a.jsonl", "b.jsonl"]
    )
    assert provenance()["argv"] == ["firstlm", "eval", "$FIRSTLM_DATA/qa/a.jsonl", "b.jsonl"]
    assert portable(f"{tmp_path}more/a.jsonl") == f"{tmp_path}more/a.jsonl"
    monkeypatch.delenv("FIRSTLM_DATA")
    assert portable("/qa/a.jsonl") == "/qa/a.jsonl"
