# SPDX-License-Identifier: Apache-2.0
"""Training data that is there without a download: docstrings of the installed Python packages.

A docstring's body is the prompt and its summary line the answer, for functions and classes of the
standard library and of site-packages. Same machine and seed, same examples.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from firstlm.errors import ConfigError, DataError
from firstlm.examples import Example

PROMPT = "{body}\nSummary:"
BODY_WORDS = (12, 60)
SUMMARY_WORDS = (3, 16)
SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "testing", "lib2to3", "_vendor", "vendored"}
LARGEST_FILE = 150_000  # bytes; larger modules are slow to parse and often generated
PER_MODULE = 12
DOCSTRING = re.compile(r''':[ \t]*\n[ \t]+r?"""([^"\n]{12,140}\n[ \t]*\n.+?)"""''', re.DOTALL)
DEFINITION = re.compile(r"^[ \t]*(?:async def|def|class) (\w+)", re.MULTILINE)
SECTION = re.compile(r"^\s*\w+( \w+)?:?\s*$|^\s*[-=~^]{3,}\s*$|https?://", re.MULTILINE)
MARKUP = re.compile(r":\w+:`~?|[`*]{1,2}|^[>.|]{2,}|[|_=~-]{4,}")


def docstring_examples(
    limit: int = 2000,
    seed: int = 0,
    *,
    validation_share: float = 0.1,
    per_package: int = 150,
    files: int = 6000,
) -> tuple[list[Example], list[Example]]:
    """Return (train, validation) examples made from docstrings, at most `limit` together.

    Modules are read in an order drawn from the seed; each is either all training or all
    validation, and no body or summary is taken twice. `per_package` keeps one large package from
    filling the set; at most `files` modules are read.
    """
    if limit < 10 or not 0 < validation_share < 1:
        raise ConfigError(
            f"limit={limit}, validation_share={validation_share}; expected 10 examples or more "
            "and a share between 0 and 1."
        )
    parts: tuple[list[Example], list[Example]] = ([], [])
    wanted = (limit - round(limit * validation_share), round(limit * validation_share))
    taken: dict[str, int] = {}
    seen: set[str] = set()
    for package, module, path in itertools.islice(_modules(seed), files):
        if all(len(p) >= w for p, w in zip(parts, wanted, strict=True)):
            break
        place = int(_hash(f"split:{module}") < f"{int(validation_share * 16**8):08x}")
        if len(parts[place]) >= wanted[place] or taken.get(package, 0) >= per_package:
            continue
        room = min(
            PER_MODULE, per_package - taken.get(package, 0), wanted[place] - len(parts[place])
        )
        for name, body, summary in _docstrings(path):
            key = _hash(summary.lower())
            if room and key not in seen and (same := _hash(body.lower())) not in seen:
                seen |= {key, same}
                parts[place].append(_example(package, f"{module}.{name}#{same[:6]}", body, summary))
                taken[package] = taken.get(package, 0) + 1
                room -= 1
    if not parts[0] or not parts[1]:
        raise DataError("found no docstrings in the installed packages; name data with --data.")
    return parts


def _example(package: str, name: str, body: str, summary: str) -> Example:
    row = {"task": "summarization", "source": body, "target": summary, "package": package}
    return Example(name, PROMPT.format(body=body), f" {summary}", (summary,), row, where=name)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _modules(seed: int) -> Iterator[tuple[str, str, Path]]:
    """Yield (package, module, file), shuffled by the hash of the module's name and the seed."""
    paths = sysconfig.get_paths()
    found: dict[str, tuple[str, str, Path]] = {}
    for root in dict.fromkeys(Path(paths[key]) for key in ("stdlib", "purelib", "platlib")):
        for folder, names, files in os.walk(root):
            names[:] = sorted(
                n
                for n in names
                if n not in SKIPPED_FOLDERS and n != "site-packages" and "." not in n
            )
            for file in files:
                if file.endswith(".py") and not file.startswith("test_"):
                    path = Path(folder, file)
                    module = ".".join(path.relative_to(root).with_suffix("").parts)
                    found[module] = (module.split(".")[0], module, path)
    yield from sorted(found.values(), key=lambda entry: _hash(f"{seed}:{entry[1]}"))


def _docstrings(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (name, body, summary) of a file's functions and classes.

    Found by pattern: parsing thousands of modules would take half a minute.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            return
        source = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    for found in DOCSTRING.finditer(source):
        names = DEFINITION.findall(source, max(0, found.start() - 2000), found.start())
        if names and "\\" not in found[1] and (pair := split_docstring(found[1])):
            yield names[-1], *pair


def split_docstring(text: str) -> tuple[str, str] | None:
    """Return (body, summary) of a docstring whose prose has a fit length, else None.

    Body means the first paragraphs after the summary line, up to 60 words; lists of parameters,
    examples and tables end it.
    """
    head, _, rest = inspect.cleandoc(text).partition("\n\n")
    summary = _plain(head)
    if not SUMMARY_WORDS[0] <= len(summary.split()) <= SUMMARY_WORDS[1]:
        return None
    if not summary.isascii() or not re.fullmatch(r"[A-Za-z].*[a-z.)]", summary):
        return None
    if re.search(r"\w\(", summary):  # a signature
        return None
    kept: list[str] = []
    count = 0
    for paragraph in rest.split("\n\n"):
        if not _is_prose(paragraph):
            break
        words = _plain(paragraph).split()
        if kept and count + len(words) > BODY_WORDS[1]:
            break
        kept.append(" ".join(words[: BODY_WORDS[1]]))
        count += len(words)
    if count < BODY_WORDS[0]:
        return None
    return "\n".join(kept), summary


def _plain(text: str) -> str:
    return " ".join(MARKUP.sub("", text).split())


def _is_prose(paragraph: str) -> bool:
    first = paragraph.strip().split("\n")[0]
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return (
        first[:1].isalpha()
        and paragraph.isascii()
        and not first.endswith(":")
        and not re.match(r"\w+( \w+)?\s*:( |$)|Copyright", first)
        and not SECTION.search(paragraph)
        and letters >= 0.85 * len(paragraph)
    )
