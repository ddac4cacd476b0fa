# SPDX-License-Identifier: Apache-2.0
"""`firstlm experiment`: files that say what to train and score, worked through in slices.

A file names a model, a data set and arms. Each arm is trained and scored once a seed, into
`RUNS/NAME-ARM-SEED` and `RESULTS/NAME-ARM-SEED.json`. What is there is not made again, and what was
interrupted goes on, so the same command works through a whole matrix, `--minutes` at a time.
Started several times at once, say with one GPU or core each, it shares the matrix between them.
What files say is read by `jobs.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

import torch
from filelock import FileLock, Timeout

from firstlm.command_config import ExperimentConfig
from firstlm.errors import ConfigError
from firstlm.jobs import Job, files_of, jobs_of
from firstlm.results import write_json
from firstlm.summary import Arm, rows

SUMMARY = "summary.json"
SHOWN = 8  # jobs that are named where many lack something
WAIT_S = 5.0  # between looks at what other processes have done


def run(options: ExperimentConfig) -> int:
    """Work through experiment files, or list what is done (`firstlm experiment`)."""
    known = {
        job.name: job
        for file in files_of(options.files)
        for job in jobs_of(file, options.runs, options.results)
    }
    jobs = [
        job
        for name, job in known.items()
        if not options.only or any(f"{name}-".startswith(f"{only}-") for only in options.only)
    ]
    if not jobs:
        raise ConfigError(f"No arm of these files is named {' or '.join(options.only or ())}.")
    if options.action == "list":
        for job in jobs:
            if changed := job.changed():
                done = f"made with other options: {', '.join(changed)}"
            else:
                done = "scored" if job.scored else "to do"
            if stale := job.stale:
                done += f"; with another {', '.join(stale)} than is there now"
            print(f"{job.name:40} {done}")
        return 0
    for job in jobs:
        if changed := job.changed(goes_on=options.action == "run"):
            folders = dict.fromkeys([str(job.artifact), job.train.output])
            raise ConfigError(
                f"What is there of {job.name} was made with other options than its file has now "
                f"({', '.join(changed)}). Remove {job.score.output}, and the artifact with its "
                f"-run folder ({' or '.join(folders)}), or name other folders with --runs and "
                "--results."
            )
    if options.action == "summary":
        return _summary(jobs, Path(options.results) / SUMMARY)
    end = None if options.minutes is None else monotonic() + 60 * options.minutes
    try:
        with _interrupted_after(options.minutes):
            _work_through(jobs, known, Path(options.runs))
    except KeyboardInterrupt:
        left = sum(not job.scored for job in jobs)
        if end is None or monotonic() < end:
            raise
        print(f"The time is up; {left} of {len(jobs)} are left. The same command goes on.")
        return 0
    print(f"All {len(jobs)} are in {options.results}.")
    return 0


def _work_through(jobs: list[Job], known: Mapping[str, Job], runs: Path) -> None:
    """Run all jobs that are not scored; those that another process is at are waited for.

    Every arm's first seed comes before second ones, so that there is something to compare early.
    """
    left, waits = sorted((job for job in jobs if not job.scored), key=lambda job: job.seed), False
    while left:
        busy = []
        for job in left:
            with _claimed(job, known, runs) as ours:
                if not ours:
                    busy.append(job)
                elif not job.scored:
                    job.run(known)
        left, before = [job for job in busy if not job.scored], left
        if left and len(left) == len(before):
            if not waits:
                print(f"Waiting for other processes: {', '.join(job.name for job in left)}.")
            waits = True
            sleep(WAIT_S)


@contextmanager
def _claimed(job: Job, known: Mapping[str, Job], runs: Path) -> Iterator[bool]:
    """Hold a job, and those that it would have to train, against other processes.

    Yields whether nobody else has one of them.
    """
    names, more = [job.name], list(job.needs)
    while more:
        needed = known[more.pop()]
        if needed.name not in names and not needed.trained:
            names.append(needed.name)
            more += needed.needs
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
    """Return the results of all jobs that are scored, by file and arm."""
    arms: dict[str, dict[str, Arm]] = {}
    for job in jobs:
        same = [other for other in jobs if (other.file, other.arm) == (job.file, job.arm)]
        found = {other.seed: other.report for other in same}
        reports = {seed: report for seed, report in found.items() if report is not None}
        if reports and job.arm not in arms.setdefault(job.file, {}):
            arms[job.file][job.arm] = Arm(f"{job.file}-{job.arm}", job.train, job.score, reports)
    return arms


def _summary(jobs: list[Job], file: Path) -> int:
    """Write one row per arm, policy and rate over all seeds that are scored."""
    groups = [list(group.values()) for group in arms_of(jobs).values()]
    for arm in (arm for group in groups for arm in group):
        if len(arm.commits) > 1:
            print(f"Note: {arm.name} was scored at several commits: {', '.join(arm.commits)}.")
    found = [row for group in groups for row in rows(group)]
    write_json(file, found)
    if missing := [job.name for job in jobs if not job.scored]:
        shown = ", ".join(missing[:SHOWN]) + (" ..." if len(missing) > SHOWN else "")
        print(f"Note: {len(missing)} of {len(jobs)} are not (all) scored yet: {shown}.")
    print(f"{len(found)} rows are in {file}.")
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
