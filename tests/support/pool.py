"""Processes that take one function after the other: the ranks of all tests, started once.

Nothing of a function may reach the next one. A rank puts back what a function may change (`tests/support/leftovers.py`)
and reports what it may not leave behind, which fails the test. A rank that raises leaves the others in a collective
that nobody joins: then all of them are killed, and the next function gets new ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal, Self

import psutil
from torch.distributed import TCPStore

LIMIT_S = 900.0
"""For all of what one function does, on a machine that is busy with other things."""
_STACKS_S = 5.0
_PR_SET_PDEATHSIG = 1
_PRELOADED = ["tests.support.preloaded"]


@dataclass(frozen=True)
class _Member:
    process: Any
    connection: multiprocessing.connection.Connection


class Pool:
    """Ranks 0, 1, ... of one machine, each started when it is first needed. A context manager ends them.

    may_leave: the only function that they get may leave behind what it likes.
    """

    def __init__(self, method: Literal["forkserver", "spawn"], may_leave: bool = False) -> None:
        self._may_leave = may_leave
        self._context = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload(_PRELOADED)
        self._members: list[_Member] = []
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        return [member.process.pid for member in self._members]

    def run(
        self, world: int, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float = LIMIT_S
    ) -> list[Any]:
        """`run_ranks` of `tests/support/launch.py`, on these ranks."""
        job = pickle.dumps((function, args))
        # The ranks meet at a store of this process, as under torchrun: nobody else can have taken its port.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self._members) < world:
            self._start(len(self._members))
        members = self._members[:world]
        try:
            for rank, member in enumerate(members):
                member.connection.send_bytes(
                    pickle.dumps((_environment(rank, world, store.port), job, self._may_leave))
                )
            return self._answers(members, time.monotonic() + timeout_s)
        except BaseException:  # also an interrupt: what these ranks would say next is of this function
            self._kill()
            raise

    def _answers(self, members: list[_Member], deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        waiting = {member.connection: rank for rank, member in enumerate(members)}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer\n{self._stacks(waiting.values())}")
            failures = []
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    value, error = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    members[rank].process.join()
                    error = f"it ended with exit code {members[rank].process.exitcode}"
                if error is not None:
                    failures.append(f"rank {rank} of {len(members)} failed:\n{error}")
                else:
                    answers[rank] = pickle.loads(value)
            if failures:
                raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(len(members))]

    def close(self) -> None:
        self._kill()
        self._directory.cleanup()

    def _start(self, rank: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._stack_file(rank), os.getpid()), name=f"rank {rank}", daemon=True
        )
        process.start()
        theirs.close()
        self._members.append(_Member(process, ours))

    def _kill(self) -> None:
        processes = [process for member in self._members for process in _family(member.process.pid)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for member in self._members:
            member.process.join()
            member.connection.close()
        self._members.clear()

    def _stack_file(self, rank: int) -> Path:
        return Path(self._directory.name) / f"stacks_{rank}.txt"

    def _stacks(self, ranks: Any) -> str:
        """Where ranks are that do not answer, as far as they can say so soon."""
        files = [self._stack_file(rank) for rank in sorted(ranks)]
        for rank in ranks:
            if self._members[rank].process.is_alive():
                os.kill(self._members[rank].process.pid, signal.SIGUSR1)
        time.sleep(_STACKS_S)
        return "\n".join(f"{file.stem}:\n{file.read_text()}" for file in files if file.exists())


def _family(pid: int) -> list[psutil.Process]:
    """A rank and what it has started, such as the writer of a checkpoint."""
    try:
        rank = psutil.Process(pid)
        return [rank, *rank.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _serve(connection: multiprocessing.connection.Connection, stack_file: Path, owner: int) -> None:
    """In the rank, until its owner ends it or has ended."""
    _end_with_the_parent(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner's to answer
    # With the mark of a daemon it could have no processes of its own, as a checkpoint does. Its owner ends it anyway.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    with stack_file.open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        while True:
            try:
                environment, job, may_leave = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            connection.send_bytes(pickle.dumps(_answer(environment, job, may_leave)))


def _end_with_the_parent(owner: int) -> None:
    """A rank in a collective that nobody joins never reads that its owner is gone.

    The parent is the owner, or the fork server. That ends when nobody is left who could ask it for a process, and it
    has told its ranks how to.
    """
    ask = forkserver._forkserver._forkserver_alive_fd  # type: ignore[attr-defined]
    if ask is not None:
        os.close(ask)
        forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent or not Path(f"/proc/{owner}").exists():
        os._exit(1)  # it ended before


def _answer(environment: dict[str, str], job: bytes, may_leave: bool) -> tuple[bytes | None, str | None]:
    """(the pickled result, None), or (None, what went wrong)."""
    import torch

    torch.set_num_threads(1)
    try:
        os.environ.update(environment)
        function, args = pickle.loads(job)
        from tests.support.leftovers import nothing_left_behind

        with contextlib.nullcontext() if may_leave else nothing_left_behind():
            # As bytes: torch's own pickling would hand over file descriptors that end with this process.
            return pickle.dumps(function(*args)), None
    except BaseException:  # noqa: BLE001 - a rank's failure, whatever it is, is the test's result
        return None, traceback.format_exc()
    finally:
        for name in environment:
            os.environ.pop(name, None)
