# SPDX-License-Identifier: Apache-2.0
"""`firstlm experiment`: files that say what to train and score, worked through in slices.

A file names a model, a data set and arms. Each arm is trained and scored once a seed, into
`RUNS/NAME-ARM-SEED` and `RESULTS/NAME-ARM-SEED.json`. What is there is not made again, and what was
interrupted goes on, so the same command works through a whole matrix, `--minutes` at a time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from firstlm import artifact_files, eval_command, train
from firstlm.command_config import EvalConfig, ExperimentConfig
from firstlm.config import TrainConfig
from firstlm.errors import ConfigError
from firstlm.options import from_dict, read_yaml
from firstlm.pretrained import ARTIFACT_FILE
from firstlm.results import DATA_VARIABLE, write_json
from firstlm.summary import Arm, read, rows

SUMMARY = "summary.json"
KEYS = {"data", "train", "eval", "arms"}
ARM_KEYS = {"seeds", "train", "eval"}
ARM_PATHS = ("artifact", "majority_of")  # options of training that may name an arm as "arm:NAME"


@dataclass(frozen=True)
class Unit:
    """One arm with one seed: what is trained, and how it is scored.

    Attributes:
        file: name of the experiment file, without its ending.
        arm: name of the arm.
        train: the options of its training, the seed among them.
        score: the options of its evaluation.
    """

    file: str
    arm: str
    train: TrainConfig
    score: EvalConfig

    @property
    def name(self) -> str:
        """FILE-ARM-SEED."""
        return f"{self.file}-{self.arm}-{self.train.seed}"

    @property
    def report(self) -> dict[str, Any] | None:
        """What its evaluation wrote, if it is there."""
        return read(Path(str(self.score.output)))

    @property
    def trained(self) -> bool:
        """Whether its artifact is there."""
        return (Path(self.train.output) / ARTIFACT_FILE).is_file()

    @property
    def scored(self) -> bool:
        """Whether its results hold all that was asked for."""
        report = self.report
        return report is not None and set(eval_command.run_names(self.score)) <= set(report["runs"])

    @property
    def changed(self) -> list[str]:
        """Options with which its artifact or results were made, and that the file has otherwise."""
        trained = (
            artifact_files.read_config(Path(self.train.output))["training"] if self.trained else {}
        )
        report = self.report or {}
        runs = [made.get("run", {}) for made in (trained, report.get("training", {}))]
        found = [name for run in runs for name in train.changed_options(run, self.train)]
        scored, asked = report.get("options", {}), eval_command.compared_options(self.score)
        found += [name for name in asked if name in scored and asked[name] != scored[name]]
        return list(dict.fromkeys(found))

    def run(self) -> None:
        """Train and score, as far as that is not done."""
        if not self.trained:
            print(f"{self.name}: training", flush=True)
            train.run(self.train)
        print(f"{self.name}: scoring", flush=True)
        eval_command.run(self.score)


def run(options: ExperimentConfig) -> int:
    """Work through experiment files, or list what is done (`firstlm experiment`)."""
    units = [
        unit
        for file in _files(options.files)
        for unit in units_of(file, options.runs, options.results)
        if not options.only or any(f"{unit.name}-".startswith(f"{n}-") for n in options.only)
    ]
    if not units:
        raise ConfigError(f"No arm of these files is named {' or '.join(options.only or ())}.")
    if options.action == "list":
        for unit in units:
            stale = f"made with other options: {', '.join(unit.changed)}" if unit.changed else ""
            print(f"{unit.name:40} {stale or ('scored' if unit.scored else 'to do')}")
        return 0
    for unit in units:
        if unit.changed:
            raise ConfigError(
                f"What is there of {unit.name} was made with other options than its file has now "
                f"({', '.join(unit.changed)}). Remove {unit.train.output}, its -run folder and "
                f"{unit.score.output}, or name other folders with --runs and --results."
            )
    if options.action == "summary":
        return _summary(units, Path(options.results) / SUMMARY)
    end = None if options.minutes is None else monotonic() + 60 * options.minutes
    try:
        with _interrupted_after(options.minutes):
            for unit in units:
                if not unit.scored:
                    unit.run()
    except KeyboardInterrupt:
        left = sum(not unit.scored for unit in units)
        if end is None or monotonic() < end:
            raise
        print(f"The time is up; {left} of {len(units)} are left. The same command goes on.")
        return 0
    print(f"All {len(units)} are in {options.results}.")
    return 0


def _summary(units: list[Unit], file: Path) -> int:
    """Write one row per arm, policy and rate over all seeds that are scored."""
    arms: dict[str, dict[str, Arm]] = {}
    for unit in units:
        found = {u.train.seed: u.report for u in units if (u.file, u.arm) == (unit.file, unit.arm)}
        reports = {seed: report for seed, report in found.items() if report is not None}
        if reports and unit.arm not in arms.setdefault(unit.file, {}):
            name = f"{unit.file}-{unit.arm}"
            arm = arms[unit.file][unit.arm] = Arm(name, unit.train, unit.score, reports)
            if len(arm.commits) > 1:
                print(f"Note: {name} was scored at several commits: {', '.join(arm.commits)}.")
    found = [row for group in arms.values() for row in rows(list(group.values()))]
    write_json(file, found)
    print(f"{len(found)} rows are in {file}.")
    return 0


def _files(paths: list[str]) -> list[Path]:
    """Return the files that are named, and those in folders that are."""
    found: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            raise ConfigError(f"{path} is no experiment file, nor a folder with any (*.yaml).")
        found += inside
    return found


def units_of(file: Path, runs: str, results: str) -> list[Unit]:
    """Return the units of an experiment file, in the order in which they are to be done.

    Raises:
        ConfigError: the file holds what is no experiment, or options that do not exist.
    """
    content = _known(read_yaml(file), KEYS, str(file))
    arms = _known(content["arms"], None, f"{file}: arms")
    data = _data(str(content["data"]))
    units = []
    for arm, said in arms.items():
        where = f"{file}: arm {arm}"
        if not isinstance(said or {}, dict):
            raise ConfigError(f"{where} is {said!r}; expected names with values.")
        said = _known({"seeds": [0], "train": {}, "eval": {}} | (said or {}), ARM_KEYS, where)
        if not (isinstance(said["seeds"], list) and all(type(s) is int for s in said["seeds"])):
            raise ConfigError(f"{where}: seeds is {said['seeds']!r}; expected a list: [0, 1, 2].")
        for seed in said["seeds"]:
            name = f"{file.stem}-{arm}-{seed}"
            output = f"{runs}/{name}"
            training = {
                "data": data["train"],
                "validation": data["validation"],
                **_known(content["train"], None, f"{file}: train"),
                **_known(said["train"], None, where),
                "seed": seed,
                "output": output,
            }
            for key in ARM_PATHS:
                named = str(training.get(key) or "")
                if named.startswith("arm:"):
                    if named[4:] not in arms:
                        raise ConfigError(f"{where} names the arm {named[4:]!r}, which is none.")
                    training[key] = f"{runs}/{file.stem}-{named[4:]}-{seed}"
            scoring = {
                "data": data["test"],
                **_known(content["eval"], None, f"{file}: eval"),
                **_known(said["eval"], None, where),
                "artifact": output,
                "output": f"{results}/{name}.json",
            }
            if not scoring.get("policies"):
                raise ConfigError(f"{where} does not say which policies to score.")
            where = f" in {where}"
            unit = Unit(
                file.stem,
                arm,
                from_dict(TrainConfig, training, where=where),
                from_dict(EvalConfig, scoring, where=where),
            )
            units.append(unit)
    return units


def _data(name: str) -> dict[str, str]:
    """Return the files of a data set by split: a folder, or one below the data variable's."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(os.environ.get(DATA_VARIABLE, "")) / name
    found = {}
    for split in ("train", "validation", "test"):
        files = [folder / f"{split}.jsonl{end}" for end in ("", ".gz")]
        found[split] = str(next((file for file in files if file.is_file()), files[-1]))
    return found


def _known(found: Any, keys: set[str] | None, where: str) -> Mapping[str, Any]:
    """Return a mapping from an experiment file; other things and other keys are refused."""
    if not isinstance(found, dict) or (not found and keys):
        raise ConfigError(f"{where} is {found!r}; expected names with values.")
    wrong = sorted(set(found) ^ keys) if keys is not None else []
    if wrong:
        raise ConfigError(
            f"{where} has {', '.join(map(repr, wrong))} missing or too much; expected "
            f"{', '.join(sorted(keys or ()))}."
        )
    return found


@contextmanager
def _interrupted_after(minutes: float | None) -> Iterator[None]:
    """Press Ctrl-C when the time is up: training ends with a checkpoint, scoring with a journal."""
    if minutes is None:
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # as background jobs do
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, max(60 * minutes, 1e-3))
    try:
        # An interrupt may strike while torch enters or leaves a scope without gradients.
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, before)
