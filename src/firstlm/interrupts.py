# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in training: the running step is finished and a checkpoint written before it stops."""

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


class Interrupts(TrainerCallback):
    """Lets Ctrl-C end training after the running step, with a checkpoint; a second one ends it now.

    An interrupt amid a step would leave decisions counted whose weights were not updated.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if Ctrl-C was pressed in any process; Trainer calls this."""
        if self.agreed(args.device):
            self.asked = True  # never taken back: Ctrl-C may come while processes agree
            control.should_save = control.should_training_stop = True

    def agreed(self, device: torch.device) -> bool:
        """Whether Ctrl-C was pressed in any process; all of them must ask."""
        return bool(processes.total(torch.tensor(int(self.asked), device=device)))

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within this scope Ctrl-C is noted here."""
        before = signal.getsignal(signal.SIGINT)
        # Background jobs ignore Ctrl-C, and only the main thread may set handlers.
        if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("Stopping after this step; press Ctrl-C again to stop at once.")
