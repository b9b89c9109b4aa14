"""Runs of the study over the cores of this host, or over its GPUs: each worker has a server of its own.

Without a GPU a worker has a core. With GPUs they are dealt out in turn, and the workers of one share it: the model is
far smaller than a GPU, and most of a run's time goes by on the processor.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    members = [
        _Member(index, place, tasks, keep_one, errors, scratch)
        for index, place in enumerate(_places(min(workers, len(jobs))))
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


@dataclass(frozen=True)
class _Place:
    """Where a worker runs: on one core, or with one CUDA device, by its name in CUDA_VISIBLE_DEVICES."""

    core: int | None = None
    device: str | None = None


def _places(workers: int) -> list[_Place]:
    if platform.has_cuda():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(d) for d in range(platform.device_count())]
        return [_Place(device=devices[index % len(devices)]) for index in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [_Place(core=cores[index % len(cores)]) for index in range(workers)]


class _Member(threading.Thread):
    """Owns one worker process, which the kernel ends together with this thread."""

    def __init__(
        self,
        index: int,
        place: _Place,
        tasks: queue.SimpleQueue[Task],
        keep: Callable[[Record], None],
        errors: queue.SimpleQueue[BaseException],
        scratch: Path,
    ) -> None:
        super().__init__(name=f"study-{index}", daemon=True)
        self._place, self._tasks, self._keep, self._errors = place, tasks, keep, errors
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
        if self._place.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self._place.device
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
        if self._place.core is not None:  # neighbours on a core would only take turns
            os.sched_setaffinity(self._process.pid, {self._place.core})
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
