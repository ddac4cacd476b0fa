# SPDX-License-Identifier: Apache-2.0
"""What long work has done so far, one JSON object a line, so that it goes on after an interrupt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firstlm.results import to_json, write_text


class Journal:
    """Parts of one piece of work by name; kept in memory alone without a file.

    Args:
        path: the file; None keeps nothing for later.
        work: what the parts belong to. Parts of other work that the file holds are dropped.

    Attributes:
        dropped: whether it held some.
    """

    def __init__(self, path: Path | None, work: Any = None) -> None:
        self.path, self.parts, self.dropped = path, {}, False
        self._head = to_json({"work": work})
        if path is None:
            return
        # A line ends with a line feed alone: texts may hold Unicode's other line ends.
        head, *lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        if head != self._head.encode():
            self.dropped = bool(head)
            return
        whole = [line for line in lines if self._take(line)]
        if lines != [*whole, b""]:  # one was cut off when it was written, or damaged since
            write_text(path, b"\n".join([head, *whole, b""]).decode())

    def _take(self, line: bytes) -> bool:
        """Take a part from its line; False where it is none."""
        try:
            part = json.loads(line.decode())
            self.parts[part["name"]] = part["done"]
        except (ValueError, TypeError, KeyError):
            return False
        return True

    def get(self, name: str) -> Any:
        """Return what `put` was given under this name, or None."""
        return self.parts.get(name)

    def put(self, name: str, done: Any) -> None:
        """Keep a part."""
        if self.path is not None:
            if not self.parts:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(self._head + "\n", encoding="utf-8")
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(name, done))
        self.parts[name] = done

    def close(self, begin: str = "") -> None:
        """Forget the parts whose names begin so: their work is done and written elsewhere."""
        self.parts = {name: d for name, d in self.parts.items() if not name.startswith(begin)}
        if self.path is None:
            return
        if self.parts:
            lines = [_line(name, done) for name, done in self.parts.items()]
            write_text(self.path, "".join([self._head + "\n", *lines]))
        else:
            self.path.unlink(missing_ok=True)


def _line(name: str, done: Any) -> str:
    return to_json({"name": name, "done": done}) + "\n"
