# SPDX-License-Identifier: Apache-2.0
"""Rows out of JSONL files and hub datasets, each with the place it came from.

Knows nothing about prompts, templates or tokens: a row is a dict, a place is "file:line".
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlm.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz")
HUB_ID = re.compile(r"(?P<path>[\w.-]+(/[\w.-]+){0,2})(:(?P<split>[\w.\[\]:%+-]+))?")
LOOKS_LIKE_A_FILE = re.compile(r"^[./~]|\\|\.(jsonl?|gz|csv|tsv|txt|parquet|ya?ml)$")


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON may hold half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Row:
    """One row as it was found: `number` counts lines from 1, `where` is for messages."""

    values: dict[str, Any]
    number: int
    where: str


def exists(source: str | Path) -> bool:
    """Whether there is such a file; a hub dataset, of which only the hub knows, counts as there."""
    path = Path(source).expanduser()
    return path.exists() or not LOOKS_LIKE_A_FILE.search(str(source))


def check_sources(*sources: str | Path) -> None:
    """Refuse files that are not there or do not begin with a row, before something slow begins.

    Raises:
        DataError: as `read_rows`; of a hub dataset nothing is looked at but its name.
    """
    for source in sources:
        rows = read_rows(source)
        if Path(source).expanduser().exists():
            next(rows, None)


def read_rows(source: str | Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl or .jsonl.gz file, or of a hub dataset.

    A hub dataset is named `name:split`, `owner/name:split` or `owner/name/config:split`; without a
    split, `train` is read. Reading is lazy: what comes after the last row taken is not looked at.

    Raises:
        DataError: a missing, unreadable or broken file, with its line number.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.name.endswith(SUFFIXES))[:5]
        hint = f"; it holds {', '.join(inside)}" if inside else " inside it"
        raise DataError(f"{source} is a folder; name one .jsonl or .jsonl.gz file{hint}.")
    if path.exists():
        if not path.name.endswith(SUFFIXES):
            raise DataError(
                f"{source}: only .jsonl and .jsonl.gz files are read (one JSON object a line)."
            )
        return _read_file(path)
    match = HUB_ID.fullmatch(str(source))
    if match is None or LOOKS_LIKE_A_FILE.search(str(source)):
        raise DataError(f"{source}: there is no such file.")
    return _read_hub(match["path"], match["split"] or "train")


def _read_file(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield Row(_parse(line, number, where), number, where)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}.") from error


def _parse(line: bytes, number: int, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        row = json.loads(text.rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text ({error.reason}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON: {error.msg} at column {error.colno}; "
            "expected one JSON object on each line."
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply.") from error
    except ValueError as error:  # Python refuses integers of thousands of digits
        raise DataError(f"{where}: a number that cannot be read: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    return row


def _read_hub(path: str, split: str) -> Iterator[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            f"{path}: there is no such file, and reading it as a hub dataset needs the package "
            "datasets: pip install 'firstlm[hub]'."
        )
    datasets = importlib.import_module("datasets")

    parts = path.split("/")
    name, config = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    try:
        table = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds, from its own and others' modules
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"{path}: there is no such file, and the hub dataset {name!r} "
            f"(config {config!r}, split {split!r}) could not be loaded: {reason}"
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(dict(values), number, f"{path}[{split}] row {number}")
