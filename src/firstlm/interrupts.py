# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM in training: the running step is finished and a checkpoint written first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from firstlm import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts(TrainerCallback):
    """Lets Ctrl-C, or the SIGTERM of who manages jobs, end training after the running step.

    A checkpoint is written then; a second signal ends it now. An interrupt amid a step would leave
    decisions counted whose weights were not updated.
    """

    def __init__(self) -> None:
        self.asked = False

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

    def _note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("Stopping after this step; Ctrl-C or SIGTERM again stops at once.")
