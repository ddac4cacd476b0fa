# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM in training: the running step is finished and a checkpoint written first."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from firstlm import processes

TOGETHER = 2.0  # seconds within which two signals are one wish
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts(TrainerCallback):
    """Lets Ctrl-C, or the SIGTERM of a job manager, end training after the running step.

    A checkpoint is written then. A second Ctrl-C ends it now, but not one that comes along with the
    first signal: launchers pass on what their processes have got, too. An interrupt amid a step
    would leave decisions counted whose weights were not updated.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any process was told to; Trainer calls this."""
        if self.agreed(args.device):
            self.asked = True  # never taken back: a signal may come while processes agree
            control.should_save = control.should_training_stop = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was told to stop; all of them must ask."""
        return bool(processes.total(torch.tensor(int(self.asked), device=device)))

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within this scope the signals are noted here."""
        if threading.current_thread() is not threading.main_thread():  # others may set no handlers
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [n for n in SIGNALS if before[n] is not signal.SIG_IGN]  # as Ctrl-C in background
        for number in heard:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])

    def _note(self, number: int, _frame: Any) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
            tqdm.write("Stopping after this step; press Ctrl-C again to stop at once.")
        elif number == signal.SIGINT and time.monotonic() - self._since > TOGETHER:
            raise KeyboardInterrupt
