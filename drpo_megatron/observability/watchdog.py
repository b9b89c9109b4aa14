"""Explains a run that stands still, and ends it with a code that a scheduler can act on."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from drpo_megatron.platform.process import kill_descendants

log = logging.getLogger(__name__)

EXIT_STALLED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""

_HELD_S = 5.0  # grace for a Python thread to get the interpreter
_OTHERS_S = 8.0  # the other ranks write their stacks meanwhile, also one that needs _HELD_S
_REPORT_S = 120.0  # backstop of the report: a log directory that hangs, say


class Watchdog:
    """One a rank, in a thread. Context manager around all that it watches; rank 0's judges, and ends the job.

    The clock starts with the first `watch` and starts again with each. When it reaches `limit_s` (None: never), this
    rank writes the stacks of its threads to `stacks_rank_N.txt` of the log directory. Rank 0 then writes what stands
    still and `server_states()`, a line a string, into its log and into the failure record `error_rank_0.txt`, waits a
    few seconds for the other ranks' stacks, kills the processes it started, and ends with EXIT_STALLED; torchrun ends
    the other ranks. They wait for rank 0 through several of its verbs, so that their own limit proves nothing: they end
    by themselves only when it has passed twice.

    Where C code keeps the interpreter, no Python thread runs. `faulthandler` has a thread without Python for that: five
    seconds behind the limit it writes the stacks and ends the process. It can do nothing else: there is no record then,
    the code is 1, and the heading `Timeout` in the stacks says it (`stalls`); the kernel ends the rank's children.

    SIGUSR2 writes the stacks at any time, and the rank goes on.
    """

    def __init__(self, limit_s: float | None, rank: int, log_directory: Path) -> None:
        self.step: int | None = None
        self.server_states: Callable[[], list[str]] = list
        self._limit_s, self._rank, self._directory = limit_s, rank, log_directory
        self._what = ""
        self._since: float | None = None
        self._closed = self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        path = self._directory / f"stacks_rank_{self._rank}.txt"
        self._stacks = path.open("a", buffering=1)
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        log.info("`kill -USR2 %d` writes the stacks of this rank to %s", os.getpid(), path)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
            if not self._ending:
                faulthandler.cancel_dump_traceback_later()
        self._thread.join()  # does not return from a stall: what broke meanwhile must not cover the report

    def watch(self, what: str) -> None:
        """Start the clock for `what`, which the report will name. Thread-safe."""
        with self._changed:
            if self._limit_s is None or self._closed or self._ending:
                return
            self._what, self._since = what, time.monotonic()
            self._end_after(self._limit_s + _HELD_S)
            self._changed.notify()

    def _end_after(self, seconds: float) -> None:
        """Replaces the timer of the thread without Python; a process has one."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)

    def _run(self) -> None:
        described: float | None = None
        with self._changed:
            while not self._closed:
                if self._since is None or self._limit_s is None:
                    self._changed.wait()
                    continue
                limits = 2 if described == self._since else 1
                left = self._since + limits * self._limit_s - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                stalled = (
                    f"{'before the first step' if self.step is None else f'step {self.step}'}, {self._what}: not done "
                    f"after {limits * self._limit_s:g} s"
                )
                described = self._since
                self._end_after(self._limit_s + _HELD_S)
                self._dump(stalled)
                if self._rank == 0 or limits == 2:
                    self._ending = True
                    self._end_after(_REPORT_S)
                    break
                log.warning("%s; rank 0 decides whether the job ends", stalled)
        if self._ending:
            self._end(stalled)

    def _dump(self, stalled: str) -> None:
        self._stacks.write(f"rank {self._rank}, {stalled} (the thread in watchdog.py is the watchdog)\n")
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _end(self, stalled: str) -> None:
        begin = time.monotonic()
        try:
            lines = [f"Stalled: {stalled}; the limit is training.verb_timeout_s = {self._limit_s:g} s"]
            if self._rank:
                lines.append("rank 0 did not end the job")
            lines += [f"stacks: {self._directory / 'stacks_rank_*.txt'}, a file a rank"]
            self._record(lines)  # first without what has to be asked for
            lines += self._ask_servers()
            self._record(lines)
            log.error("%s", "\n".join(lines))
            if self._rank == 0:
                time.sleep(max(0.0, begin + _OTHERS_S - time.monotonic()))
        finally:
            kill_descendants()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_STALLED)

    def _ask_servers(self) -> list[str]:
        try:
            return self.server_states()
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the report, and the job ends
            return [f"the state of the servers is unknown: {type(error).__name__}: {error}"]

    def _record(self, lines: list[str]) -> None:
        text = "\n".join([*lines, f"exit code {EXIT_STALLED}: a scheduler may start the job again"])
        (self._directory / f"error_rank_{self._rank}.txt").write_text(text + "\n")


def stalls(log_directory: Path) -> list[tuple[int, str]]:
    """(rank, message) of each watchdog that ended its rank: those with a record first, in the order of their time.

    Read from the files that the ranks left, because torchrun does not pass their exit codes on.
    """
    ending = f"\nexit code {EXIT_STALLED}: "
    records = sorted(log_directory.glob("error_rank_*.txt"), key=lambda path: path.stat().st_mtime_ns)
    found = [(_rank_of(path), text.strip()) for path in records if ending in (text := path.read_text())]
    for path in sorted(log_directory.glob("stacks_rank_*.txt"), key=_rank_of):
        if any(line.startswith("Timeout (") for line in path.read_text().splitlines()):
            message = (
                f"Stalled: longer in a verb than training.verb_timeout_s, in C code that keeps the interpreter; "
                f"the end of {path} shows where"
            )
            found.append((_rank_of(path), message))
    return found


def _rank_of(path: Path) -> int:
    return int(path.stem.rsplit("_", 1)[1])
