"""Child processes: their environment, their state, and that they cannot outlive the run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Environment of a process with large tensors in host memory: torch asks for huge pages, where the kernel gives them on
request, and passes over memory take about a tenth less time. torch reads it once, at its first tensor."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: between fork and exec only the call itself is safe
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def die_with_parent() -> None:
    """For `preexec_fn`: the kernel sends SIGTERM to this process when the thread that started it ends (Linux)."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def killed_with_parent() -> None:
    """The same with SIGKILL, for a child that would finish its work on SIGTERM."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def stop_group(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """End a process started with `start_new_session=True` and its group: SIGTERM, then SIGKILL after `timeout_s`."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the SIGKILL below ends what is left
            process.wait(timeout=timeout_s)
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def keep_freed_memory() -> None:
    """For a process that makes and drops large tensors in host memory all the time, such as weight buckets: the C
    library keeps what is freed, where the kernel would give the next one new pages, zeroed one by one. Forks inherit
    it.

    A call, and not GLIBC_TUNABLES: with that in the environment the loader moves it, and setproctitle, by which SGLang
    names its workers, does nothing.
    """
    if hasattr(_LIBC, "mallopt"):  # a C library without the call only loses time
        _LIBC.mallopt(_M_MMAP_MAX, 0)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass(frozen=True)
class ProcessState:
    """A process as /proc shows it. `state` is its letter there: R runs, S waits, T is stopped, Z has ended …"""

    pid: int
    name: str
    state: str
    parent: int
    group: int


def processes() -> list[ProcessState]:
    """Every process of this host that the caller may see, by id (Linux)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                before, after = (entry / "stat").read_text(errors="replace").rsplit(")", 1)
                state, parent, group = after.split()[:3]
                name = before.split("(", 1)[1]
                found.append(ProcessState(int(entry.name), name, state, int(parent), int(group)))
    return sorted(found, key=lambda process: process.pid)


def children(parent: int) -> list[int]:
    return [process.pid for process in processes() if process.parent == parent and process.state not in "ZX"]


def kill_descendants() -> None:
    """SIGKILL to all that this process started, directly and indirectly, in whatever group or session it is."""
    for _ in range(3):  # what was started while we looked is found by the next look
        family, running = {os.getpid()}, []
        states = processes()
        while more := [p for p in states if p.parent in family and p.pid not in family]:
            family |= {p.pid for p in more}
            running += [p.pid for p in more if p.state not in "ZX"]
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
