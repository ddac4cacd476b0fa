# SPDX-License-Identifier: Apache-2.0
"""Examples: a prompt, its answer and its references, from rows in people's conventions.

Rows are `prompt`/`completion`, `messages`, or fields that a prompt template puts together. Knows
nothing about token ids; a tokenizer is only asked for its chat template.
"""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlm.errors import ConfigError, DataError
from firstlm.rows import Row, is_text, read_rows

TEMPLATES = {
    "translation": "{source_language}: {source}\n{target_language}:",
    "summarization": "{source}\nSummary:",
    "qa": "{source}\nAnswer:",
    "instruct": "{source}",
}
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "fi": "Finnish", "fr": "French",
    "hi": "Hindi", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sv": "Swedish", "ta": "Tamil", "te": "Telugu",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
CONVENTIONS = "prompt + completion, messages, or source + target"


@dataclass(frozen=True)
class Example:
    """One prompt with its wanted completion, and every reference a metric may accept."""

    id: str
    prompt: str
    completion: str
    references: tuple[str, ...]
    row: dict[str, Any] = field(repr=False, default_factory=dict)
    chat: bool = False  # the chat template already wrote every special token of the prompt
    where: str = ""  # file:line, for messages

    @property
    def group(self) -> str:
        """What it shares with examples that are about the same: its row's `context`, or its prompt.

        A test set of 500 questions about 13 texts is no 500 independent ones.
        """
        return str(self.row.get("context") or self.prompt)


def load_examples(
    source: str | Path,
    *,
    template: str | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    answers: bool = True,
) -> list[Example]:
    """Read examples from a .jsonl(.gz) file or a hub dataset (see `rows.read_rows`).

    Args:
        source: the file, or `owner/name:split`.
        template: a name in `TEMPLATES` or own text with {fields} of the row (a backslash-n stands
            for a line break); without it, `messages` and `prompt` rows are used as they are, and
            the `task` field of `source` rows names the template.
        tokenizer: needed for `messages` rows only, for its chat template.
        limit: take the first N rows; later rows are not looked at.
        answers: rows must have an answer; False takes prompts without one, too.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected 1 or more examples.")
    text = None if template is None else find_template(template)
    examples: list[Example] = []
    seen: set[str] = set()
    for row in itertools.islice(read_rows(source), limit):
        examples.append(_example(row, text, tokenizer, seen, answers))
    if not examples:
        raise DataError(f"{source}: there are no rows in it; expected one JSON object a line.")
    return examples


def needs_tokenizer(source: str | Path, template: str | None = None) -> bool:
    """Whether a file holds chats, of which a tokenizer makes prompts."""
    return template is None and any("messages" in row.values for row in read_rows(source))


def find_template(template: str) -> str:
    """Return the text of a named template, or an own template after checking its {fields}."""
    text = TEMPLATES.get(template, template).replace("\\n", "\n")
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(
            f"template {template!r}: {error}; write {{field}} for a field, {{{{ for a brace."
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    if not names:
        raise ConfigError(
            f"unknown template {template!r}; expected {', '.join(TEMPLATES)}, "
            "or own text with {fields} of the row such as 'Question: {source} Answer:'."
        )
    if leaks := sorted({"target", "completion", "answers", "references"} & set(names)):
        raise ConfigError(
            f"template {template!r} names {{{leaks[0]}}}, which would put the answer into the "
            "prompt; a template is the prompt alone, and the answer is added to it."
        )
    bad = [p[1] for p in parts if p[1] is not None and (not p[1].isidentifier() or p[2] or p[3])]
    if bad:
        raise ConfigError(f"template {template!r}: {{{bad[0]}}} is not the plain name of a field.")
    return text


def _example(
    row: Row, template: str | None, tokenizer: Any, seen: set[str], answers: bool
) -> Example:
    values, where = row.values, row.where
    references = _references(values, where)
    chat = False
    if template is not None:
        prompt, completion = _fill(template, values, where, references, answers)
    elif "messages" in values:
        prompt, completion = _from_messages(values["messages"], where, tokenizer, answers)
        chat = True
    elif "prompt" in values and ("completion" in values or not answers):
        prompt = _text(values, "prompt", where)
        completion = _text(values, "completion", where) if "completion" in values else ""
    elif "source" in values and ("target" in values or references or not answers):
        task = values.get("task")
        if task not in TEMPLATES:
            found = f"its task field is {task!r}" if "task" in values else "it has no task field"
            raise DataError(
                f"{where}: no prompt template for this row: {found}; "
                f"name one with --template ({', '.join(TEMPLATES)}, or own text with {{fields}})."
            )
        prompt, completion = _fill(TEMPLATES[task], values, where, references, answers)
    else:
        found = ", ".join(sorted(map(str, values))) or "none"
        raise DataError(f"{where}: no known columns; expected {CONVENTIONS}; found {found}.")
    for name, value in (("prompt", prompt), ("answer", completion)):
        if not value.strip() and (answers or name == "prompt"):
            raise DataError(f"{where}: the {name} is empty; fill it or take the row out.")
        if not is_text(value):
            raise DataError(f"{where}: the {name} holds half a surrogate pair, which is no text.")
    name = _unique(values.get("id"), row.number, seen)
    references = references or (completion.strip(),)
    return Example(name, prompt, completion, references, values, chat, where)


def _text(values: dict[str, Any], name: str, where: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {type(value).__name__}; expected text.")
    return value


def _unique(value: Any, number: int, seen: set[str]) -> str:
    base = f"line-{number}" if value in (None, "") else str(value)
    name = base
    for copy in itertools.count(2):
        if name not in seen:
            break
        name = f"{base}#{copy}"
    seen.add(name)
    return name


def _references(values: dict[str, Any], where: str) -> tuple[str, ...]:
    for name in ("answers", "references"):
        found = values.get(name)
        if isinstance(found, dict):  # the SQuAD layout of the hub: {"text": [...], ...}
            found = found.get("text")
        if found:
            texts = [found] if isinstance(found, str) else found
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise DataError(f"{where}: {name} is not a list of texts.")
            return tuple(texts)
    return (_text(values, "target", where),) if values.get("target") else ()


def _fill(
    template: str,
    values: dict[str, Any],
    where: str,
    references: tuple[str, ...],
    answers: bool = True,
) -> tuple[str, str]:
    """Return (prompt, completion); the blank between them belongs to the completion.

    Most tokenizers join a blank to the word after it, so a prompt must not end with one.
    """
    fields: dict[str, Any] = dict(values)
    for side in ("source", "target"):
        if isinstance(code := values.get(f"{side}_lang"), str):
            fields[f"{side}_language"] = LANGUAGES.get(code.lower().split("-")[0], code)
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None and not isinstance(fields.get(name), str | int | float):
            asked = name.replace("_language", "_lang")
            raise DataError(
                f"{where}: the template wants a field {asked!r} with text; the row has "
                f"{', '.join(sorted(map(str, values)))}."
            )
    prompt = template.format_map(fields).rstrip(" ")
    answer = next((n for n in ("target", "completion") if n in values), None)
    if answer is None and not references:
        if answers:
            raise DataError(f"{where}: no answer; expected a field target, completion or answers.")
        return prompt, ""
    target = references[0] if answer is None else _text(values, answer, where)
    blank = "" if not target.strip() or prompt.endswith(("\n", "\t")) else " "
    return prompt, blank + target.strip()


def _from_messages(messages: Any, where: str, tokenizer: Any, answers: bool) -> tuple[str, str]:
    if tokenizer is None:
        raise ConfigError(f"{where}: messages rows need a tokenizer with a chat template.")
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if well_formed and not answers and messages and messages[-1]["role"] != "assistant":
        return render_chat(messages, tokenizer, where), ""
    if not well_formed or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: expected messages as a list of objects with role and content (text), "
            "at least two, the last one by the assistant."
        )
    return render_chat(messages[:-1], tokenizer, where), messages[-1]["content"]


def render_chat(messages: list[dict[str, str]], tokenizer: Any, where: str = "chat") -> str:
    """Return the prompt that asks the model for the next assistant turn."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{where}: the tokenizer has no chat template, so messages cannot become a prompt; "
            "use an instruct model, or prompt + completion rows."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja's own errors, and raise_exception() of the template
        raise DataError(f"{where}: the chat template refused the messages: {error}") from error
