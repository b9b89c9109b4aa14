"""How a run is told to stop at the next place where it can go on later."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

log = logging.getLogger(__name__)

RECORD = "stopped.txt"
"""In the run's log directory: what a run that stopped when it was told to left behind."""

_REPEAT_S = 5.0  # a scheduler's signal reaches a rank directly and, a moment later, through torchrun


class StopRequested(Exception):
    """Raised on all ranks, once a checkpoint is complete. The message says which."""


class StopSignal:
    """Set by SIGUSR1 and SIGTERM. Another one, after a few seconds, ends the process at once.

    Rank 0's decides; the others only must not die of the signal. Without `saves` SIGTERM ends the process at once: on
    rank 0 as KeyboardInterrupt, because it has servers to stop, elsewhere as the system does it, which also releases
    rank 0 from a collective.
    """

    def __init__(self, rank: int, saves: bool) -> None:
        self._rank = rank
        self._requested = threading.Event()
        self._since = 0.0
        if saves:
            signal.signal(signal.SIGUSR1, self._on_signal)
            signal.signal(signal.SIGTERM, self._on_signal)
        elif rank == 0:
            signal.signal(signal.SIGTERM, interrupt)

    def is_set(self) -> bool:
        return self._requested.is_set()

    def _on_signal(self, number: int, _: object) -> None:
        now = time.monotonic()
        if not self._requested.is_set():
            self._since = now
            self._requested.set()
            log.info("%s: the run stops at the next checkpoint, as soon as it can", signal.Signals(number).name)
        elif number == signal.SIGTERM and now - self._since > _REPEAT_S:
            if self._rank == 0:
                raise KeyboardInterrupt
            os._exit(128 + number)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
