# SPDX-License-Identifier: Apache-2.0
"""The results of one arm of an experiment, seed by seed, and the test set that they are over.

Needs no model, and its tokenizer for chats alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from firstlm.command_config import EvalConfig
from firstlm.config import TrainConfig
from firstlm.data import items_hash, scored_examples
from firstlm.errors import DataError
from firstlm.examples import needs_tokenizer
from firstlm.metrics import Scores, grouped, means, perplexity
from firstlm.pretrained import SMOLLM2, load_tokenizer
from firstlm.sections import arm_of
from firstlm.tasks import Task, find_task


class Arm:
    """The results of one arm, seed by seed.

    Args:
        file: name of its experiment file.
        name: its own.
        train: options of its training (of any seed).
        score: options of its evaluation.
        reports: what `firstlm eval` wrote, by seed.
        routers_of: the files that its routers were trained on, where others than its own.
    """

    def __init__(
        self,
        file: str,
        name: str,
        train: TrainConfig,
        score: EvalConfig,
        reports: Mapping[int, dict[str, Any]],
        routers_of: Sequence[str] | None = None,
    ) -> None:
        self.file, self.name, self.train, self.score = file, name, train, score
        self.reports = dict(sorted(reports.items()))
        counts = {run["count"] for report in reports.values() for run in report["runs"].values()}
        if len(counts) != 1:
            raise DataError(f"The results of {train.output} are over {sorted(counts)} items.")
        (self.count,) = counts
        tokenizer = None
        if needs_tokenizer(score.data, score.template):
            tokenizer = load_tokenizer(score.model or self.model)
        examples = scored_examples(score.data, score.template, tokenizer, score.limit)
        if len(examples) != self.count:
            raise DataError(
                f"The results of {train.output} are over {self.count} items, but {score.data} has "
                f"{len(examples)}."
            )
        known = [example.id for example in examples]
        self.items = items_hash(examples)
        for report in reports.values():
            for name, run in report["runs"].items():
                if [item["id"] for item in run["items"]] != known:
                    raise DataError(
                        f"{name} of {train.output} was scored on other items of {score.data} than "
                        f"limit={score.limit} draws now; remove {score.output} and score it again."
                    )
            told = report["inputs"].get("items_sha256")  # not in results of 2026-11-25
            if told not in (None, self.items):
                raise DataError(
                    f"{score.data} has changed since {train.output} was scored on it; remove "
                    f"{score.output} and score it again."
                )
        self.groups = grouped([example.group for example in examples])
        self.dataset = Path(score.data).parent.name
        self.trained_on = [Path(file).parent.name for file in train.data or ()]
        self.routers_of = [Path(file).parent.name for file in routers_of or train.data or ()]
        self.task: Task = find_task(examples, score.task, score.template)
        self._references = [example.references for example in examples]
        self._scores: dict[str, dict[str, dict[int, Scores]]] = {}

    def comparable(self, other: Arm) -> bool:
        """Whether another arm is of the same model, and was scored on the same items."""
        ours, theirs = ((arm.model, arm.dataset, arm.items) for arm in (self, other))
        return ours == theirs

    @property
    def lora(self) -> bool:
        """Whether its artifact has LoRA."""
        trained = self.train.stage != "routers" and self.train.lora_steps > 0
        # Results of before 2026-11-28 do not say so.
        return any(report.get("lora", trained) for report in self.reports.values())

    @property
    def model(self) -> str:
        """Name of the base model that its artifact was made for."""
        # Results of before 2026-11-28 do not say so.
        told = [report.get("base_model") for report in self.reports.values()]
        return next(filter(None, told), self.score.model or self.train.model or SMOLLM2)

    @property
    def mask_of(self) -> str:
        """The arm whose routers one mask for all of its prompts is made of."""
        return arm_of(Path(self.train.majority_of or self.score.artifact).name)

    def weights(self, seeds: Sequence[int]) -> list[str]:
        """Return the number format in which its model was scored, by seed."""
        inputs = [self.reports[seed]["inputs"] for seed in seeds]
        # Results of 2026-11-25 do not say so.
        return [one.get("weights", "unknown").removeprefix("torch.") for one in inputs]

    @property
    def commits(self) -> list[str]:
        """The versions of the code at which its runs were scored."""
        made = [
            run.get("provenance", {}).get("git")
            for r in self.reports.values()
            for run in r["runs"].values()
        ]
        known = [f"{git['commit'][:7]}{'+' * git['dirty']}" for git in made if git]
        return list(dict.fromkeys(known))

    @property
    def names(self) -> list[str]:
        """The runs, in order."""
        return list(dict.fromkeys(n for report in self.reports.values() for n in report["runs"]))

    def runs(self, name: str) -> dict[int, dict[str, Any]]:
        """Return one run's results by seed."""
        return {s: r["runs"][name] for s, r in self.reports.items() if name in r["runs"]}

    def scores(self, name: str) -> dict[str, dict[int, Scores]]:
        """Return each metric's scores of a run, by seed."""
        if name in self._scores:
            return self._scores[name]
        found = self._scores[name] = dict[str, dict[int, Scores]]()
        for seed, run in self.runs(name).items():
            items = run["items"]
            by_metric = self.task.score([item["prediction"] for item in items], self._references)
            # Results of 2026-11-25 lack answer_tokens; what is no number was written as null.
            if all("answer_tokens" in x and x.get("perplexity") is not None for x in items):
                tokens = [item["answer_tokens"] for item in items]
                losses = [np.log(item["perplexity"]) * item["answer_tokens"] for item in items]
                by_metric |= {"perplexity": perplexity(losses, tokens)}
            if all("bertscore" in item for item in items):
                by_metric |= {"bertscore": means([item["bertscore"] for item in items])}
            for metric, scores in by_metric.items():
                found.setdefault(metric, {})[seed] = scores
        return found

    def keeps(self, name: str, seed: int) -> list[str]:
        """Return the layers that each prompt of a run kept."""
        return [item["keep"] for item in self.runs(name)[seed]["items"]]

    def primary(self, name: str, seeds: Sequence[int]) -> list[Scores]:
        """Return the primary scores of a run, one for each of some seeds."""
        scores = self.scores(name)[self.task.primary]
        return [scores[seed] for seed in seeds]

    def skip_rate(self, name: str, seeds: Sequence[int]) -> float:
        """Return the share of layers that a run skipped, the mean over some seeds."""
        return mean([self.runs(name)[seed]["skip_rate"]["mean"] for seed in seeds])


def base_seeds(seeds: Sequence[int], known: Sequence[int]) -> tuple[Sequence[int], bool]:
    """Return with which seeds of a base to compare, and whether they are the same.

    Where it lacks one of them all of its own count.
    """
    paired = set(seeds) <= set(known)
    return (seeds if paired else known), paired


def formats_differ(arm: Arm, seeds: Iterable[int], other: Arm, others: Iterable[int]) -> bool:
    """Tell whether two arms were scored in other number formats, over some seeds of each."""
    ours, theirs = arm.weights(list(seeds)), other.weights(list(others))
    return ours != theirs if len(ours) == len(theirs) else set(ours) != set(theirs)


def mean(values: Sequence[float]) -> float:
    """Return a mean as a Python number."""
    return float(np.mean(values))
