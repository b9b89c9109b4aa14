"""What a unit test may not do, so that the group stays the one that everybody runs after each change.

It starts no Python process (each imports for seconds), imports no SGLang and listens on loopback alone. A test that
must is of another group, which CONTRIBUTING.md lists with what each costs. Programs that take milliseconds are named
below.
"""

from __future__ import annotations

import multiprocessing.process
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

WHERE = "a test that needs this belongs into tests/ranks, tests/server, tests/e2e or tests/slow: see CONTRIBUTING.md"
SMALL = (
    "git",
    "make",
    "bash",
    "ldconfig",
    "gcc",
    "cc",
    "uname",
    "lscpu",
    "sinfo",
    "sbatch",
    "scontrol",
    "sacct",
    "sacctmgr",
    "squeue",
    "scancel",
    "nvidia-smi",
)
"""What the product asks on its way, or a library while it is imported."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class NotAUnitTest(OSError):
    """The test did what unit tests may not. To the product it is a machine that starts no more processes."""


@pytest.fixture(autouse=True)
def nothing_but_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test that starts a process, listens beyond loopback, or imports SGLang, also where it hides the error."""
    seen: list[str] = []

    def refuse(what: str) -> NoReturn:
        seen.append(what)
        raise NotAUnitTest(f"a unit test {what}: {WHERE}")

    def start(*arguments: Any, **options: Any) -> NoReturn:
        refuse("starts a process")

    popen = subprocess.Popen.__init__

    def popen_of_a_small_program(self: subprocess.Popen[Any], args: Any, *arguments: Any, **options: Any) -> None:
        first = args.split()[0] if isinstance(args, str) else args[0]
        if Path(os.fsdecode(first)).name not in SMALL:
            refuse(f"starts {first}")
        popen(self, args, *arguments, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", popen_of_a_small_program)
    monkeypatch.setattr(subprocess.Popen, "_child_created", False, raising=False)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp", "system"):
        monkeypatch.setattr(os, name, start)
    bind = socket.socket.bind

    def bind_to_loopback(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            refuse(f"binds to {address[0]!r}, which other hosts reach")
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", bind_to_loopback)
    before = "sglang" in sys.modules
    yield
    if "sglang" in sys.modules and not before:
        seen.append("imports SGLang, which takes as long as all others")
    if seen:
        pytest.fail(f"a unit test {seen[0]}: {WHERE}")
