# SPDX-License-Identifier: Apache-2.0
"""One job of an experiment: what is trained, how it is scored, how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlm import artifact_files, balance, eval_command, train
from firstlm.command_config import BalanceConfig, EvalConfig
from firstlm.config import TrainConfig
from firstlm.data import items_hash, scored_examples
from firstlm.examples import needs_tokenizer
from firstlm.pretrained import ARTIFACT_FILE
from firstlm.results import sha256_of
from firstlm.rows import exists
from firstlm.scoreboard import read

ARM_PATHS = ("artifact", "majority_of")  # options of training that may name an arm as "arm:NAME"


@dataclass(frozen=True)
class Job:
    """One arm with one seed: what is trained, and how it is scored.

    Attributes:
        file: name of the experiment file, without its ending.
        arm: name of the arm.
        seed: its seed.
        train: the options of its training, the seed among them.
        balance: those of balancing what was trained, if that is to be done.
        score: the options of its evaluation.
        needs: names of the jobs whose artifacts it takes.
    """

    file: str
    arm: str
    seed: int
    train: TrainConfig
    balance: BalanceConfig | None
    score: EvalConfig
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """FILE-ARM-SEED."""
        return f"{self.file}-{self.arm}-{self.seed}"

    @property
    def report(self) -> dict[str, Any] | None:
        """What its evaluation wrote, if it is there."""
        return read(Path(str(self.score.output)))

    @property
    def artifact(self) -> Path:
        """The folder of its artifact."""
        return Path((self.balance or self.train).output)

    @property
    def trained(self) -> bool:
        """Whether its artifact is there."""
        return (self.artifact / ARTIFACT_FILE).is_file()

    @property
    def scored(self) -> bool:
        """Whether its results hold all that was asked for."""
        runs = (self.report or {}).get("runs", {})
        names = eval_command.run_names(self.score)
        return all(n in runs and eval_command.holds(runs[n], self.score) for n in names)

    @property
    def _training(self) -> dict[str, Any]:
        """What its artifact says of how it was trained; nothing where there is none."""
        if not self.trained:
            return {}
        return artifact_files.read_config(self.artifact)["training"]

    def made_otherwise(self) -> list[str]:
        """Return options with which its artifact was made, and that the file has not."""
        found = self._training_differs(self._training)
        return [name for name in found if name != "dtype" or self.train.dtype != "auto"]

    def scored_otherwise(self, goes_on: bool = True) -> list[str]:
        """Return options with which its results were made, and that the file has not.

        Args:
            goes_on: whether what is missing will be added, which must be in the same number format.
        """
        report = self.report or {}
        # "auto" is as suits a machine. What is scored stays, and says in which format it was; a
        # file that is not complete is not gone on with in another.
        stays = self.scored or not goes_on
        found = self._training_differs(report.get("training", {}))
        scored, asked = report.get("options", {}), eval_command.compared_options(self.score)
        differing = [name for name in asked if name in scored and asked[name] != scored[name]]
        # A data folder may lie elsewhere now; that its items are the same, a summary checks.
        if (
            report
            and Path(report["inputs"]["data"]).parent.name != Path(self.score.data).parent.name
        ):
            differing.append("data")
        if report and not differing and self._other_items(report["inputs"]):
            differing.append("data")
        for names, dtype in ((found, self.train.dtype), (differing, self.score.dtype)):
            if dtype == "auto" and stays and "dtype" in names:
                names.remove("dtype")
        return list(dict.fromkeys(found + differing))

    def _other_items(self, inputs: Mapping[str, Any]) -> bool:
        """Tell whether the test set, a file that is there, has other items now than were scored.

        Of chats, for which a tokenizer is needed, a summary knows.
        """
        source, known = self.score.data, inputs.get("items_sha256")
        if known is None or not Path(source).is_file():
            return False
        if inputs.get("data_sha256") == sha256_of(source) or needs_tokenizer(
            source, self.score.template
        ):
            return False
        now = scored_examples(source, self.score.template, limit=self.score.limit)
        return items_hash(now) != known

    def _training_differs(self, record: Mapping[str, Any]) -> list[str]:
        """Return the options of training or balancing that differ from those in a record of it."""
        if not record:
            return []
        run = dict(record.get("run", {}))
        for key in ARM_PATHS:  # other arms' artifacts may lie elsewhere now
            asked = getattr(self.train, key)
            if asked and Path(run.get(key) or "").name == Path(asked).name:
                run[key] = asked
        found, made = train.changed_options(run, self.train), record.get("balance")
        if made and self.balance:
            found += balance.changed_options(made, self.balance)
        elif made or self.balance:
            found.append("balance")
        return found

    @property
    def stale(self) -> list[str]:
        """Names of artifacts that it took or scored, and that were made anew since."""
        if not self.trained:
            return []
        training = self._training
        taken = training.get("provenance", {}).get("data", {})
        made_of = [(getattr(self.train, key), taken[key]) for key in ARM_PATHS if key in taken]
        if self.balance is not None:
            before = training.get("balance", {}).get("artifact_sha256")
            made_of.append((self.balance.artifact, before))
        found = []
        for path, before in made_of:
            folder = Path(path or "")
            there = (folder / ARTIFACT_FILE).is_file()
            if there and artifact_files.content_hash(str(folder)) != before:
                found.append(folder.name)
        scored = (self.report or {}).get("training", {})
        if any(scored.get(k) != training.get(k) for k in ("provenance", "balance") if scored):
            found.append(self.artifact.name)
        return found

    def chain(self, others: Mapping[str, Job]) -> list[Job]:
        """Return the jobs to be trained before this one, what those need first, and this one last.

        Args:
            others: all jobs by name.
        """
        found: dict[str, Job] = {}
        for name in () if self.trained else self.needs:
            found |= {job.name: job for job in others[name].chain(others) if not job.trained}
        return [*found.values(), self]

    def routers_of(self, others: Mapping[str, Job]) -> list[str]:
        """Return the files that its routers were trained on, maybe in another job.

        Args:
            others: all jobs by name.
        """
        begun_with = others.get(Path(self.train.artifact or "").name)
        if begun_with is not None and self.train.stage == "lora":
            return begun_with.routers_of(others)
        return list(self.train.data or ())

    def taken(self, others: Mapping[str, Job]) -> list[Job]:
        """Return the jobs whose artifacts, which are there, it or what it needs is trained from.

        Args:
            others: all jobs by name.
        """
        if self.trained:
            return []
        needed = [others[name] for job in self.chain(others) for name in job.needs]
        return [job for job in needed if job.trained]

    def make(self) -> None:
        """Train, if that is not done; what it needs must be there."""
        if self.trained:
            return
        print(f"{self.name}: {'balancing' if self.balance else 'training'}", flush=True)
        if self.balance:
            balance.run(self.balance)
        else:
            train.run(self.train)

    def evaluate(self) -> None:
        """Score what was trained, as far as that is not done."""
        print(f"{self.name}: scoring", flush=True)
        eval_command.run(self.score)

    def missing(self, others: Mapping[str, Job]) -> list[str]:
        """Return data files that are yet to be read, by it or what it needs, and that do not exist.

        Args:
            others: all jobs by name.
        """
        if self.scored:
            return []
        files = [self.score.data]
        for job in self.chain(others):
            if job.balance and not job.trained:
                files += job.balance.data or ()
            elif not job.trained:
                files += [*(job.train.data or ()), *(job.train.validation or ())]
        return [file for file in dict.fromkeys(files) if not exists(file)]
