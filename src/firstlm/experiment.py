# SPDX-License-Identifier: Apache-2.0
"""`firstlm experiment`: files that say what to train and score, worked through in slices.

A file names a model, a data set and arms. Each arm is trained and scored once a seed, into
`RUNS/NAME-ARM-SEED` and `RESULTS/NAME-ARM-SEED.json`. What is there is not made again, and what was
interrupted goes on, so the same command works through a whole matrix, `--minutes` at a time.
Started several times at once, say with one GPU or core each, it shares the matrix between them.
What files say is read by `matrix.py`.
"""

from __future__ import annotations

import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import torch
from filelock import FileLock, Timeout

from firstlm.command_config import ExperimentConfig
from firstlm.errors import ConfigError, DataError, FirstError, kind_and_line
from firstlm.jobs import Job
from firstlm.matrix import files_of, jobs_of
from firstlm.results import check_file, write_json
from firstlm.scoreboard import SUMMARY
from firstlm.scored import Arm
from firstlm.sections import read_rows
from firstlm.summary import rows, strayed_masks

OK, FAILED = 0, 1  # exit codes
SHOWN = 8  # jobs that are named where many lack something
WAIT_S = 5.0  # between looks at what other processes have done


def run(options: ExperimentConfig) -> int:
    """Work through experiment files, or list what is done (`firstlm experiment`)."""
    known = {
        job.name: job
        for file in files_of(options.files)
        for job in jobs_of(file, options.runs, options.results)
    }
    if options.only and options.action == "summary":
        raise ConfigError(
            "A summary is of whole files: its shares and gains compare arms. Leave --only out."
        )
    jobs = [
        job
        for name, job in known.items()
        if not options.only or any(f"{name}-".startswith(f"{only}-") for only in options.only)
    ]
    if not jobs:
        raise ConfigError(f"No arm of these files is named {' or '.join(options.only or ())}.")
    if options.action == "list":
        for job in jobs:
            print(f"{job.name:40} {_state(job)}")
        return 0
    if options.action == "summary":
        everything = all(Path(path).is_dir() for path in options.files)
        return _summary(jobs, Path(options.results) / SUMMARY, everything)
    end = None if options.minutes is None else monotonic() + 60 * options.minutes
    failures = _Failures()
    failed = failures.reasons
    try:
        with _interrupted_after(options.minutes):
            _work_through(jobs, known, Path(options.runs), failures)
        if not failed:
            print(f"All {len(jobs)} are in {options.results}.")
    except KeyboardInterrupt:
        left = sum(job.name in failed or not job.scored for job in jobs)
        if end is None or monotonic() < end:
            raise
        print(f"The time is up; {left} of {len(jobs)} are left. The same command goes on.")
    finally:
        if failed:
            again = (
                ", and the same command tries them again (what was begun goes on; remove "
                f"{options.runs}/NAME-run to begin anew)"
            )
            # What was made otherwise is refused until what is there has gone.
            again = again if failed.keys() - failures.refused else ""
            print(f"These failed{again}:\n{_listed(failed)}")
    return FAILED if failed else OK


def _state(job: Job) -> str:
    """Say in a few words how far a job is."""
    try:
        changed, stale = [*job.made_otherwise(), *job.scored_otherwise()], job.stale
    except FirstError as error:
        return f"cannot be read: {error}"
    state = "scored" if job.scored else "to do"
    if changed:
        state = f"made with other options: {', '.join(dict.fromkeys(changed))}"
    return state + (f"; with another {', '.join(stale)} than is there now" if stale else "")


def _obstacle(job: Job, goes_on: bool) -> str | None:
    """Say why what is there of a job cannot be gone on with; None where it can."""
    try:
        made, scored = job.made_otherwise(), job.scored_otherwise(goes_on)
    except FirstError as error:
        return str(error)
    if not made and not scored:
        return None
    there = [str(job.score.output)]
    if made and job.artifact.name != job.name:
        return f"{job.artifact}, which it scores, was made with other options ({', '.join(made)})."
    if made:
        there += [str(job.artifact), f"{job.artifact}-run"]
    return (
        f"{'its artifact was' if made else 'its results were'} made with other options than its "
        f"file has now ({', '.join(made or scored)}). Remove what is there "
        f"(rm -rf {shlex.join(there)}), or name other folders with --runs and --results."
    )


@dataclass
class _Failures:
    """What failed in one call.

    Attributes:
        reasons: why, by job.
        unmade: names of those that have no artifact now.
        refused: names of those that the same command cannot make.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    unmade: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def add(self, job: Job, why: str) -> None:
        """Note and say why a job failed."""
        self.reasons[job.name] = why
        print(f"{job.name} failed: {why}", file=sys.stderr)


def _listed(reasons: Mapping[str, str]) -> str:
    """Return one line for each job, with what is to be said of it."""
    return "\n".join(f"  {name}: {why}" for name, why in reasons.items())


def _work_through(
    jobs: list[Job], known: Mapping[str, Job], runs: Path, failures: _Failures
) -> None:
    """Run all jobs that are not scored; those that another process is at are waited for.

    Every arm's first seed comes before second ones, so that there is something to compare early.
    Those that fail do not end the others.
    """
    for job in jobs:
        if why := _obstacle(job, goes_on=True):
            failures.add(job, why)
            failures.refused.add(job.name)
    open_ = [job for job in jobs if job.name not in failures.reasons and not job.scored]
    for job in open_:
        check_file(job.score.output)
    left, waits = sorted(open_, key=lambda job: job.seed), False
    while left:
        busy = []
        for job in left:
            with _claimed(job, known, runs) as ours:
                if not ours:
                    busy.append(job)
                elif not job.scored:
                    _attempt(job, known, failures)
        left, before = [job for job in busy if not job.scored], left
        if left and len(left) == len(before):
            if not waits:
                print(f"Waiting for other processes: {', '.join(job.name for job in left)}.")
            waits = True
            sleep(WAIT_S)


def _attempt(job: Job, known: Mapping[str, Job], failures: _Failures) -> None:
    """Train a job, after what it needs, and score it."""
    if missing := job.missing(known):  # not found out after an hour of training
        failures.add(job, f"there is no {' and no '.join(missing)}")
        return
    for taken in job.taken(known):
        if why := _unusable(taken):
            failures.add(job, f"needs {taken.name}, but {why}")
            return
    for needed in job.chain(known):
        if needed.name not in failures.unmade:
            try:
                needed.make()
                if needed is job:
                    job.evaluate()
            except Exception as error:
                if not isinstance(error, FirstError | OSError):
                    traceback.print_exc()
                failures.add(needed, kind_and_line(error))
                if not needed.trained:
                    failures.unmade.add(needed.name)
        if needed.name in failures.unmade:
            failures.reasons.setdefault(job.name, f"needs {needed.name}")
            return


def _unusable(job: Job) -> str | None:
    """Say why nothing can be made of an artifact that is there; None where it can."""
    try:
        made = job.made_otherwise()
    except FirstError as error:
        return str(error)
    return f"that was made with other options ({', '.join(made)})" if made else None


@contextmanager
def _claimed(job: Job, known: Mapping[str, Job], runs: Path) -> Iterator[bool]:
    """Hold a job, and those that it would have to train, against other processes.

    Yields whether nobody else has one of them.
    """
    names = [one.name for one in job.chain(known)]
    folder = runs / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            for name in names:
                stack.enter_context(FileLock(folder / f"{name}.lock").acquire(timeout=0))
        except Timeout:
            stack.close()
            yield False
            return
        yield True


def arms_of(jobs: Sequence[Job]) -> dict[str, dict[str, Arm]]:
    """Return the results of all jobs that are scored, by file and arm.

    Raises:
        ConfigError: some were made with other options than their files have.
    """
    if changed := {job.name: why for job in jobs if (why := _obstacle(job, goes_on=False))}:
        raise ConfigError("These cannot be summed up:\n" + _listed(changed))
    seeds: dict[tuple[str, str], list[Job]] = {}
    known = {job.name: job for job in jobs}
    for job in jobs:
        seeds.setdefault((job.file, job.arm), []).append(job)
    arms: dict[str, dict[str, Arm]] = {}
    for (file, arm), same in seeds.items():
        found = {job.seed: job.report for job in same}
        reports = {seed: report for seed, report in found.items() if report is not None}
        if reports:
            one, routers = same[0], same[0].routers_of(known)
            arms.setdefault(file, {})[arm] = Arm(file, arm, one.train, one.score, reports, routers)
    return arms


def _summary(jobs: list[Job], file: Path, everything: bool) -> int:
    """Write one row per arm, policy and rate over all seeds that are scored.

    Args:
        jobs: of all arms that are summed up.
        file: the summary.
        everything: they are all there is; else rows of other experiment files stay in it.
    """
    groups = [list(group.values()) for group in arms_of(jobs).values()]
    if not groups:
        raise DataError(f"Nothing of these files is scored in {file.parent}: no rows to sum up.")
    for arm in (arm for group in groups for arm in group):
        if len(arm.commits) > 1:
            commits = ", ".join(arm.commits)
            print(f"Note: {arm.file}-{arm.name} was scored at several commits: {commits}.")
        formats = dict.fromkeys(arm.weights(list(arm.reports)))
        if len(formats) > 1:
            both = " and ".join(formats)
            print(f"Note: seeds of {arm.file}-{arm.name} were scored in different formats: {both}.")
    for run in (run for group in groups for run in strayed_masks(group)):
        print(f"Note: {run} skips other layers than most prompts of its routers do now.")
    found = [row for group in groups for row in rows(group)]
    ours = {job.file for job in jobs}
    there = [] if everything or not file.is_file() else read_rows(file)
    others = [row for row in there if row["file"] not in ours]
    write_json(file, sorted([*others, *found], key=lambda row: row["file"]))
    if missing := [job.name for job in jobs if not job.scored]:
        shown = ", ".join(missing[:SHOWN]) + (" ..." if len(missing) > SHOWN else "")
        print(f"Note: {len(missing)} of {len(jobs)} are not (all) scored yet: {shown}.")
    more = f", and {len(others)} of other files" if others else ""
    print(f"{len(found)} rows are in {file}{more}.")
    return 0


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
