"""A pool of verifier processes. A sample that raises, hangs, eats memory or kills its process costs its own reward and
nothing else.

Each process has a thread that feeds it, so that a hung one is killed and replaced while the others go on. The
processes are commands of their own and not multiprocessing's, on which the process-pool libraries build: its spawned
children import the main module first, and the main module here is a training rank, with torch and Megatron.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing import Pipe
from types import TracebackType
from typing import Any, Self

from drpo_megatron.config.schema import DataConfig, RewardConfig
from drpo_megatron.records import Rollout
from drpo_megatron.rewards.worker import OUT_OF_MEMORY

log = logging.getLogger(__name__)

# Imports and the verifier's own set-up: seconds on an idle machine.
START_TIMEOUT_S = 180.0
OUT_OF_MEMORY_ENDING = f"exit code {OUT_OF_MEMORY}"

Sample = tuple[str, str | None, dict[str, Any]]
Answer = tuple[float, str | None]


class RewardError(RuntimeError):
    """The verifiers cannot be started. The message says why."""


class RewardPool:
    """`reward.workers` verifier processes. Context manager; leaving it, or `close`, leaves no process.

    The constructor returns at once; the processes get ready while the caller goes on.
    """

    def __init__(self, reward: RewardConfig, data: DataConfig) -> None:
        self._samples: queue.SimpleQueue[tuple[Sample, Future[Answer]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._feeders = [_Feeder(reward, data, self._samples, self._closing) for _ in range(reward.workers)]
        for feeder in self._feeders:
            feeder.start()

    def score(self, rollouts: Sequence[Rollout]) -> None:
        """Set `reward` and `reward_error` of each rollout; wait for all of them.

        A verifier that raises, returns anything but a finite number, dies, takes longer than reward.timeout_s or more
        memory than reward.memory_mb gives reward 0 and the reason in `reward_error`, and a warning with the prompt's id
        in the log. Raises RewardError when a verifier process cannot be started.
        """
        answers = self._submit(rollouts)
        for number, (rollout, answer) in enumerate(zip(rollouts, answers, strict=True)):
            _record(number, rollout, answer.result())

    async def score_async(self, rollouts: Sequence[Rollout]) -> None:
        """The same, without blocking the event loop."""
        answers = [asyncio.wrap_future(answer) for answer in self._submit(rollouts)]
        for number, (rollout, answer) in enumerate(zip(rollouts, answers, strict=True)):
            _record(number, rollout, await answer)

    def _submit(self, rollouts: Sequence[Rollout]) -> list[Future[Answer]]:
        if self._closing.is_set():
            raise RewardError("the reward pool is closed")
        futures: list[Future[Answer]] = []
        for rollout in rollouts:
            future: Future[Answer] = Future()
            self._samples.put(((rollout.text, rollout.prompt.answer, rollout.prompt.metadata), future))
            futures.append(future)
        return futures

    def close(self) -> None:
        """End the processes, also one in the middle of a sample. May be called twice."""
        self._closing.set()
        for feeder in self._feeders:
            self._samples.put(None)
            feeder.kill_process()
        for feeder in self._feeders:
            feeder.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _record(number: int, rollout: Rollout, answer: Answer) -> None:
    rollout.reward, rollout.reward_error = answer
    if rollout.reward_error is not None:
        log.warning("prompt %s, sample %d: reward 0, %s", rollout.prompt.id, number, rollout.reward_error)


class _Feeder(threading.Thread):
    """Owns one verifier process at a time, and feeds it one sample at a time.

    It lives as long as the pool: the kernel ends a process together with the thread that started it (die_with_parent).
    """

    def __init__(
        self,
        reward: RewardConfig,
        data: DataConfig,
        samples: queue.SimpleQueue[tuple[Sample, Future[Answer]] | None],
        closing: threading.Event,
    ) -> None:
        super().__init__(name="reward-feeder", daemon=True)
        self._reward, self._data, self._samples, self._closing = reward, data, samples, closing
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._ready = False

    def run(self) -> None:
        with contextlib.suppress(RewardError, OSError):  # the first sample tries again, and its future gets the error
            self._start_process()
        while (item := self._samples.get()) is not None:
            sample, future = item
            if not future.set_running_or_notify_cancel():
                continue  # whoever asked was cancelled; from here on it cannot be
            try:
                future.set_result(self._score(sample))
            except (RewardError, OSError) as error:
                future.set_exception(error)
        self.kill_process()

    def kill_process(self) -> None:
        """SIGKILL to the process and whatever it started: nothing less ends a loop in C code."""
        with self._lock:
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):  # it has ended, and left nothing behind
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                self._process = None

    def _start_process(self) -> None:
        with self._lock:
            if self._closing.is_set():
                raise RewardError("the reward pool is closed")
            self._connection, theirs = Pipe()
            environment = os.environ | {
                # What the trainer can import, the verifier can: a user's function may live in the working directory.
                "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
                "OMP_NUM_THREADS": "1",
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "drpo_megatron.rewards.worker", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            theirs.close()
            self._ready = False
            self._connection.send((self._reward, self._data))

    def _wait_ready(self) -> None:
        """Its start does not count as a sample's time."""
        if self._ready:
            return
        try:
            if not self._connection.poll(START_TIMEOUT_S):
                raise RewardError(f"a verifier process was not ready after {START_TIMEOUT_S:.0f} s; see the rank's log")
            problem = self._connection.recv()
        except (EOFError, OSError) as error:
            ending = self._ending()
            if ending == OUT_OF_MEMORY_ENDING:
                too_low = f"it does not fit into reward.memory_mb = {self._reward.memory_mb}: raise that"
                raise RewardError(f"the verifier cannot be started: {too_low}") from error
            raise RewardError(f"a verifier process ended while it started ({ending}); see the log") from error
        if problem is not None:
            raise RewardError(f"the verifier cannot be started: {problem}")
        self._ready = True

    def _score(self, sample: Sample) -> Answer:
        process = self._process
        if process is None or process.poll() is not None:
            self._start_process()
        self._wait_ready()
        try:
            self._connection.send(sample)
            if self._connection.poll(self._reward.timeout_s):
                answer: Answer = self._connection.recv()
                return answer
            reason = f"the verifier took longer than {self._reward.timeout_s:g} s"
        except (EOFError, OSError):
            ending = self._ending()
            reason = f"the verifier's process ended ({ending})"
            if ending == OUT_OF_MEMORY_ENDING:
                reason = f"the verifier ran out of memory (reward.memory_mb is {self._reward.memory_mb})"
        self.kill_process()
        return 0.0, reason

    def _ending(self) -> str:
        process = self._process
        if process is None:
            return "the pool was closed"
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its connection closed"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
