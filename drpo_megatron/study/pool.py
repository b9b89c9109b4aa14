"""Runs of the study over the cores of this host: one worker a core, each with a server of its own."""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from drpo_megatron import platform
from drpo_megatron.platform.process import HUGE_PAGES, stop_group
from drpo_megatron.platform.versions import versions
from drpo_megatron.rollout.errors import ServerStartError
from drpo_megatron.study.grid import Job, Study
from drpo_megatron.study.records import Record
from drpo_megatron.study.worker import Task

log = logging.getLogger(__name__)

_MOST_DEATHS = 3
_STOP_S = 10.0  # a worker ends its server, and the run it is in


class WorkersFailed(RuntimeError):
    """A worker died too often. The message says where its log is."""


def run_jobs(study: Study, jobs: Sequence[Job], scratch: Path, workers: int, keep: Callable[[Record], None]) -> None:
    """Make all of `jobs`, in about their order; `keep` gets each record when its run ended, one at a time.

    scratch: for logs, and the runs while they go on. Raises ServerStartError, WorkersFailed when a worker died too
    often, and what `keep` raises; no process is left then.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for job in jobs:
        tasks.put(Task(study, job, scratch))
    lock, errors = threading.Lock(), queue.SimpleQueue[BaseException]()

    def keep_one(record: Record) -> None:
        with lock:
            keep(record)

    # Without a GPU neighbours on a core would only take turns.
    cores = sorted(os.sched_getaffinity(0))
    members = [
        _Member(index, None if platform.has_cuda() else cores[index % len(cores)], tasks, keep_one, errors, scratch)
        for index in range(min(workers, len(jobs)))
    ]
    for member in members:
        member.start()
    try:
        for member in members:
            while member.is_alive():
                member.join(timeout=0.2)
                if not errors.empty():
                    raise errors.get()
    finally:
        for member in members:
            member.close()
        for member in members:
            member.join()
    if not errors.empty():
        raise errors.get()


class _Member(threading.Thread):
    """Owns one worker process, which the kernel ends together with this thread."""

    def __init__(
        self,
        index: int,
        core: int | None,
        tasks: queue.SimpleQueue[Task],
        keep: Callable[[Record], None],
        errors: queue.SimpleQueue[BaseException],
        scratch: Path,
    ) -> None:
        super().__init__(name=f"study-{index}", daemon=True)
        self._core, self._tasks, self._keep, self._errors = core, tasks, keep, errors
        self._log = scratch / f"worker-{index}.log"
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0

    def close(self) -> None:
        """End the worker, also one in the middle of a run, and then the thread."""
        self._closing.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def run(self) -> None:
        try:
            while not self._closing.is_set():
                if self._serve():
                    return
        except BaseException as error:  # noqa: BLE001 - raised by run_jobs
            self._errors.put(error)

    def _serve(self) -> bool:
        """Pass tasks to a worker; False when it died."""
        connection = self._start()
        assert self._process is not None
        task: Task | None = None
        try:
            while not self._closing.is_set():
                try:
                    task = self._tasks.get_nowait()
                except queue.Empty:
                    return True
                connection.send(task)
                answer: Record | ServerStartError = connection.recv()
                if isinstance(answer, ServerStartError):
                    raise answer
                self._keep(answer)
            return True
        except (EOFError, OSError):
            code = self._process.wait()
            if task is None or self._closing.is_set():
                return True
            self._keep(_died(task, code))
            self._deaths += 1
            if self._deaths == _MOST_DEATHS:
                raise WorkersFailed(f"a worker of the study died {_MOST_DEATHS} times; see {self._log}") from None
            return False
        finally:
            connection.close()  # which ends the worker
            stop_group(self._process, timeout_s=_STOP_S)

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        environment = os.environ | HUGE_PAGES | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1"}
        with self._log.open("ab") as sink, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "drpo_megatron.study.worker", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        if self._core is not None:
            os.sched_setaffinity(self._process.pid, {self._core})
        return ours


def _died(task: Task, code: int) -> Record:
    cell = task.job.cell
    return Record(
        loss=cell.loss,
        parameters=dict(cell.parameters),
        precision=cell.precision,
        staleness=cell.staleness,
        seed=task.job.seed,
        status="failed",
        reason=f"the worker ended with code {code}",
        seconds=0.0,
        digest=task.study.digest,
        settings=task.study.settings,
        versions=versions(),
        metrics={},
    )
