# SPDX-License-Identifier: Apache-2.0
"""Experiment files and the jobs that they name.

A file that is `like` another takes over what that says and it does not, `train` and `eval` option
by option; its `arms` are its own, or a list of those to take over, own ones among them. An arm may
have `data` of its own to train on (several sets are mixed) and a `test` set of its own. One whose
`train` is "arm:NAME" trains nothing: it scores that arm's artifact on other data or under other
policies, or, with `balance`, what `firstlm balance` makes of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firstlm.command_config import BalanceConfig, EvalConfig
from firstlm.config import BASELINES, DIAGNOSTICS, RATED, UNMEASURED, TrainConfig
from firstlm.errors import ConfigError
from firstlm.jobs import ARM_PATHS, Job
from firstlm.options import closest, from_dict, read_yaml
from firstlm.results import DATA_VARIABLE

NAME = re.compile(r"\w[\w.]*")  # of files and arms
KEYS = {"data", "train", "eval", "arms"}
ARM_KEYS = {"seeds", "data", "test", "train", "balance", "eval"}


def files_of(paths: list[str]) -> list[Path]:
    """Return the files that are named, and those in folders that are, each once.

    Raises:
        ConfigError: there are none, or two have one name, with which their results would begin.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        inside = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            raise ConfigError(f"{path} is no experiment file, nor a folder with any (*.yaml).")
        for file in inside:
            if found.setdefault(file.stem, file).resolve() != file.resolve():
                raise ConfigError(
                    f"{found[file.stem]} and {file} have one name, and so would their results; "
                    "rename one of them."
                )
    return list(found.values())


def jobs_of(file: Path, runs: str, results: str) -> list[Job]:
    """Return the jobs of an experiment file, in the order in which they are to be done.

    Raises:
        ConfigError: the file holds what is no experiment, or options that do not exist.
    """
    content = _content(file)
    listed = _known(content["arms"], None, f"{file}: arms")
    if not listed:
        raise ConfigError(f"{file} has no arms; expected one or more, each by name.")
    if wrong := [n for n in (file.stem, *listed) if not (isinstance(n, str) and NAME.fullmatch(n))]:
        raise ConfigError(
            f"{file}: {', '.join(map(repr, wrong))} is no name for a file or an arm; expected "
            "text of letters, digits, '_' and '.', with quotes around what YAML takes for a number "
            "or the like (a '-' parts file, arm and seed in the names of results)."
        )
    arms = {arm: _arm(said, content, f"{file}: arm {arm}") for arm, said in listed.items()}
    jobs = []
    for arm, said in arms.items():
        where = f"{file}: arm {arm}"
        for seed in said["seeds"]:
            training, balancing, needs = _making(file, content, arms, arm, seed, runs)
            asked = {
                **_known(content["eval"], None, f"{file}: eval"),
                **_known(said["eval"], None, f"{where}: eval"),
            }
            _refuse(asked, ("artifact", "output"), where)
            scoring = {
                "data": data_files(said["test"], where)["test"],
                **asked,
                "artifact": (balancing or training).output,
                "output": f"{results}/{file.stem}-{arm}-{seed}.json",
            }
            if not scoring.get("policies"):
                raise ConfigError(f"{where} does not say which policies to score.")
            score = from_dict(EvalConfig, scoring, where=f" in {where}")
            jobs.append(Job(file.stem, arm, seed, training, balancing, score, needs))
    tests = {job.score.data for job in jobs}
    if len({Path(test).parent.name for test in tests}) < len(tests):
        raise ConfigError(
            f"{file} has test sets in folders of one name ({', '.join(sorted(tests))}), by which "
            "results are told apart; rename one."
        )
    known = {job.name: job for job in jobs}
    for job in jobs:
        for name in set(job.needs) - known.keys():
            raise ConfigError(f"{file}: {job.name} needs {name}, but that arm has no such seed.")
    for job in jobs:
        needed, seen = list(job.needs), set[str]()
        while needed:
            name = needed.pop()
            if name == job.name:
                raise ConfigError(f"{file}: {job.name} needs itself, by way of what it needs.")
            if name not in seen:
                seen.add(name)
                needed += known[name].needs
    for job in jobs:
        where = f"{file}: arm {job.arm}"
        _check_routers(job.train, known, where)
        _check_policies(job.train, job.score, known, where)
    return jobs


def _trained_routers(training: TrainConfig, known: Mapping[str, Job]) -> TrainConfig | None:
    """Return the run that trained the routers of what is trained, or None if none did.

    What goes on from an artifact that no arm makes is taken to have routers, of the kind asked for.
    """
    if training.trains_routers:
        return training
    if training.artifact is None:
        return None
    begun = known.get(Path(training.artifact).name)
    return training if begun is None else _trained_routers(begun.train, known)


def _without_routers(training: TrainConfig, known: Mapping[str, Job]) -> bool:
    """Tell whether what is trained has no routers that decide."""
    return training.policy != "router" or _trained_routers(training, known) is None


def _check_routers(training: TrainConfig, known: Mapping[str, Job], where: str) -> None:
    """Refuse to train with routers that other arms will not have, or of another kind."""
    routed = known.get(Path(training.majority_of or "").name)
    if routed is not None and _without_routers(routed.train, known):
        raise ConfigError(
            f"{where} takes the majority mask of {routed.arm}, which has no routers of its own."
        )
    begun = known.get(Path(training.artifact or "").name)
    if begun is None:
        return
    made = _trained_routers(begun.train, known)
    if made is None:
        if training.stage == "lora" and training.policy == "router" and training.skip_rate != 0:
            raise ConfigError(
                f"{where} trains LoRA for routers that exist, but {begun.arm}, from which it goes "
                "on, has none that were trained."
            )
        return
    for name in ("unit", "reads"):
        found, asked = getattr(made, name), getattr(training, name)
        if found != asked:
            raise ConfigError(
                f"{where} has {name} {asked!r}, and goes on from {begun.arm}, whose routers have "
                f"{name} {found!r}."
            )


def _check_policies(
    training: TrainConfig, score: EvalConfig, known: Mapping[str, Job], where: str
) -> None:
    """Refuse policies that an artifact cannot be scored under, before it is trained."""
    own = training.policy
    of_routers = ("router", "majority", *DIAGNOSTICS)
    for policy in score.policies or ():
        if policy == own != "router":
            continue
        if policy in of_routers and _without_routers(training, known):
            has = (
                f"is trained for {own!r}"
                if own != "router"
                else "trains LoRA with all layers alone"
            )
            raise ConfigError(f"{where} {has}, so that it has no {policy!r} to score.")
        if policy in BASELINES and policy not in (*UNMEASURED, *of_routers):
            raise ConfigError(
                f"{where} scores {policy!r}, whose order of layers is measured where LoRA is "
                f"trained for it: give it an arm of its own with train: {{policy: {policy}}}."
            )
        if policy in RATED and policy != own and not score.skip_rates:
            raise ConfigError(f"{where} scores {policy!r}, which needs skip_rates.")
        if policy == "token_level" and (training.unit != "block" or score.prefill != "skip"):
            raise ConfigError(f"{where} scores 'token_level': expected unit block, prefill skip.")


def _content(file: Path, above: tuple[Path, ...] = ()) -> Mapping[str, Any]:
    """Return what an experiment file says, together with the one that it is `like`."""
    if file.resolve() in above:
        raise ConfigError(f"{file} is like itself, by way of the files that it is like.")
    found = read_yaml(file)
    if not (isinstance(found, dict) and "like" in found):
        return _known(found, KEYS, str(file))
    other = file.parent / str(found.pop("like"))
    content = dict(_content(other, (*above, file.resolve())))
    for key, value in found.items():
        if key == "arms" and isinstance(value, list):
            value = _taken(value, _known(content["arms"], None, f"{other}: arms"), file, other)
        elif key in ("train", "eval") and isinstance(value, dict):
            value = {**content.get(key, {}), **value}
        content[key] = value
    return _known(content, KEYS, str(file))


def _taken(
    listed: list[Any], arms: Mapping[str, Any], file: Path, other: Path
) -> Mapping[str, Any]:
    """Return the arms that a list takes over from another file or says itself."""
    found: dict[Any, Any] = {}
    for arm in listed:
        taken = isinstance(arm, str)
        if not taken and not (isinstance(arm, dict) and len(arm) == 1):
            raise ConfigError(
                f"{file} lists {arm!r} among its arms; expected the name of an arm of {other}, or "
                "an arm of its own: a name with what it says."
            )
        if taken and arm not in arms:
            raise ConfigError(f"{file} takes the arm {arm!r}, but {other} has none.")
        ((name, said),) = [(arm, arms[arm])] if taken else arm.items()
        if name in found:
            raise ConfigError(f"{file} lists the arm {name!r} twice.")
        found[name] = said
    return found


def _arm(said: Any, content: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return all that a file says of an arm, as far as it differs from arm to arm."""
    if not isinstance(said or {}, dict):
        raise ConfigError(f"{where} is {said!r}; expected names with values.")
    sets: Any = (said or {}).get("data", content["data"])
    usual = {"seeds": [0], "data": sets, "test": sets, "train": {}, "balance": None, "eval": {}}
    found = _known(usual | (said or {}), ARM_KEYS, where)
    seeds = found["seeds"]
    if not (seeds and isinstance(seeds, list) and all(type(s) is int for s in seeds)) or (
        len({*seeds}) < len(seeds)
    ):
        raise ConfigError(
            f"{where}: seeds is {seeds!r}; expected a list such as [0, 1, 2], each once."
        )
    return found


def _making(
    file: Path,
    content: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    arm: str,
    seed: int,
    runs: str,
    above: tuple[str, ...] = (),
) -> tuple[TrainConfig, BalanceConfig | None, tuple[str, ...]]:
    """Return how an arm's artifact is trained and balanced, and the jobs that it needs."""
    said, where = arms[arm], f"{file}: arm {arm}"
    own = f"{runs}/{file.stem}-{arm}-{seed}"

    def job_named(value: Any) -> str | None:
        """Return the name of the job that "arm:NAME" means, with the same seed."""
        if not str(value or "").startswith("arm:"):
            return None
        if value[4:] not in arms:
            raise ConfigError(f"{where} names the arm {value[4:]!r}, which is none.")
        return f"{file.stem}-{value[4:]}-{seed}"

    if needed := job_named(said["train"]):
        other = said["train"][4:]
        if job_named(arms[other]["train"]) and arms[other]["balance"] is None:
            raise ConfigError(f"{where} names the arm {other!r}, which trains nothing itself.")
        if other in (arm, *above):
            raise ConfigError(f"{where} needs itself, by way of what it needs.")
        training, balancing, _ = _making(file, content, arms, other, seed, runs, (arm, *above))
        if said["balance"] is not None:
            _refuse(said["balance"], ("output",), where)
            options = {
                "artifact": (balancing or training).output,
                "data": training.validation,
                "template": training.template,
                **_known(said["balance"], None, f"{where}: balance"),
                "output": own,
            }
            balancing = from_dict(BalanceConfig, options, where=f" in {where}")
        return training, balancing, (needed,)
    if said["balance"] is not None:
        raise ConfigError(f'{where} balances, but has no train: "arm:NAME" to balance.')
    sets = said["data"] if isinstance(said["data"], list) else [said["data"]]
    data = [data_files(name, where) for name in sets]
    asked = {
        **_known(content["train"], None, f"{file}: train"),
        **_known(said["train"], None, f"{where}: train"),
    }
    _refuse(asked, ("seed", "output"), where)
    options = {
        "data": [one["train"] for one in data],
        "validation": [one["validation"] for one in data],
        **asked,
        "seed": seed,
        "output": own,
    }
    needs = {key: job_named(options.get(key)) for key in ARM_PATHS}
    options |= {key: f"{runs}/{name}" for key, name in needs.items() if name}
    config = from_dict(TrainConfig, options, where=f" in {where}")
    return config, None, tuple(name for name in needs.values() if name)


def data_files(name: Any, where: str) -> dict[str, str]:
    """Return the files of a data set by split: a folder, or one below the data variable's."""
    if not isinstance(name, str):
        raise ConfigError(
            f"{where} names the data {name!r}; expected one data set. With several to train on, "
            "say with `test` which one is scored."
        )
    folder = Path(name)
    if not folder.is_dir():
        if not os.environ.get(DATA_VARIABLE):
            raise ConfigError(
                f"{where} names the data {name!r}, which is no folder here, and {DATA_VARIABLE} is "
                f"not set. Set it to the folder that holds {name}/train.jsonl.gz and its like, or "
                "name a folder of your own."
            )
        folder = Path(os.environ[DATA_VARIABLE]) / name
    found = {}
    for split in ("train", "validation", "test"):
        files = [folder / f"{split}.jsonl{end}" for end in ("", ".gz")]
        found[split] = str(next((file for file in files if file.is_file()), files[-1]))
    return found


def _refuse(asked: Any, names: tuple[str, ...], where: str) -> None:
    """Refuse options that an experiment sets by itself."""
    for name in names:
        if isinstance(asked, dict) and name in asked:
            raise ConfigError(
                f"{where} sets {name}, which follows from the names of file and arm and from "
                "`seeds`; leave it out."
            )


def _known(found: Any, keys: set[str] | None, where: str) -> Mapping[str, Any]:
    """Return a mapping from an experiment file; other things and other keys are refused."""
    if not isinstance(found, dict) or (not found and keys):
        raise ConfigError(f"{where} is {found!r}; expected names with values.")
    if keys is None:
        return found
    if extra := [name for name in found if name not in keys]:
        hint = closest(str(extra[0]), sorted(keys)) or f"; expected {', '.join(sorted(keys))}"
        raise ConfigError(f"{where} has {extra[0]!r}, which means nothing there{hint}.")
    if lacking := sorted(keys - set(found)):
        raise ConfigError(f"{where} lacks {', '.join(map(repr, lacking))}.")
    return found
