# SPDX-License-Identifier: Apache-2.0
"""The tasks that `firstlm eval` scores: what an answer is, and which metrics it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from firstlm.config import TASKS
from firstlm.errors import ConfigError
from firstlm.examples import Example
from firstlm.metrics import Scores, score_qa, score_summaries, score_translation, tokenizer_for

Score = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, Scores]]


@dataclass(frozen=True)
class Task:
    """One task over one set of examples.

    Attributes:
        name: one of `TASKS`.
        primary: the metric by which models are compared.
        one_line: answers end at their first line break.
        score: maps predictions and references to scores by metric.
    """

    name: str
    primary: str
    one_line: bool
    score: Score

    def clean(self, text: str) -> str:
        """Return the part of what a model wrote that is its answer."""
        text = text.strip()
        return text.split("\n", 1)[0].rstrip() if self.one_line else text

    def ended(self, text: str) -> bool:
        """Tell whether what comes after a text so far would not be scored."""
        return self.one_line and "\n" in text.lstrip()


def find_task(
    examples: Sequence[Example], asked: str | None = None, template: str | None = None
) -> Task:
    """Return the task of examples: the one asked for, else the one whose template made their
    prompts, else the one that their rows name, else qa.

    Raises:
        ConfigError: rows name several tasks, an unknown one, or several target languages.
    """
    asked = asked or (template if template in TASKS else None)
    named = sorted({str(e.row["task"]) for e in examples if e.row.get("task") is not None})
    if asked is None and len(named) > 1:
        raise ConfigError(f"the rows name the tasks {', '.join(named)}; name one with --task.")
    name = asked or (named[0] if named else "qa")
    if name == "translation":
        languages = sorted({str(e.row["target_lang"]) for e in examples if "target_lang" in e.row})
        if len(languages) > 1:
            raise ConfigError(
                f"the rows are in the target languages {', '.join(languages)}; BLEU has one "
                "tokenizer a corpus, so score them one by one."
            )
        tokenize = tokenizer_for(languages[0] if languages else None)
        return Task(name, "bleu", True, partial(score_translation, tokenize=tokenize))
    if name == "summarization":
        return Task(name, "rougeL", False, score_summaries)
    if name == "qa":
        return Task(name, "f1", True, score_qa)
    raise ConfigError(
        f"the rows are of task {name!r}, which has no metric here; name one of "
        f"{', '.join(TASKS)} with --task."
    )
