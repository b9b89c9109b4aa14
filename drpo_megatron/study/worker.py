"""Makes runs of the study one after the other: `python -m drpo_megatron.study.worker`, on one core.

What a short run would spend most of its time on is done once: the imports, and the start of a rollout server. The
server is a real one, is kept from run to run, and is replaced only when a run needs another kind. The first push of a
run replaces all its weights, drops its cache and names them version 0. Each run is a process of its own all the same:
a fork of this one, which has imported everything and touched nothing. With a CUDA device it is started afresh, because
CUDA does not survive a fork; it then shares the device with the server, which holds it throughout.

Protocol: a pickled `Task` from the pool, the pickled `Record` back, or the error of a server that does not start; it
ends when its connection is closed.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from drpo_megatron import platform
from drpo_megatron.config import RunConfig
from drpo_megatron.fp8.rollout import RolloutWeights
from drpo_megatron.observability.curves import read_metrics
from drpo_megatron.platform.process import die_with_parent
from drpo_megatron.platform.versions import versions
from drpo_megatron.rollout.errors import ServerStartError
from drpo_megatron.rollout.fleet import fleet_of
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.study.grid import Job, Study
from drpo_megatron.study.records import Record, Status, metrics_of
from launch.local import prepare_run_directory, read_failure

# What a run imports, directly or when it first needs it.
_IMPORTED_BEFORE = (
    "drpo_megatron.training.loop",
    "drpo_megatron.training.main",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.configuration_qwen3",
)
# Of the servers alone; no number depends on them. The cache of prefixes took a fifth of a server's time and has nothing
# to save in prompts of two tokens. A batch at staleness 8 has some 4,000 tokens: on a GPU this leaves room for others.
_FOR_THE_SERVER = ("rollout.server.args.disable_radix_cache=true", "rollout.server.args.max_total_tokens=32768")
_ENVIRONMENT = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Task:
    """A run to make. `scratch`: where runs and server logs live; a run that did not fail leaves nothing there."""

    study: Study
    job: Job
    scratch: Path


@dataclass
class KeptServer:
    """A rollout server that outlives runs."""

    _server: SGLangServer | None = None
    _command: tuple[list[str], dict[str, str]] = field(default_factory=lambda: ([], {}))

    def url(self, config: RunConfig) -> str:
        """Of a server as `config` asks for, started or kept. Raises ServerStartError."""
        config = config.model_copy(update={"name": f"server-{os.getpid()}", "seed": 0})
        (server,) = fleet_of(config).servers
        assert isinstance(server, SGLangServer)
        command = server.command()
        if self._server is None or command != self._command or not self._server.healthy():
            self.stop()
            self._server, self._command = server, command
            if weights := RolloutWeights.of(config):
                weights.write_model(config)
            server.start()
            server.wait_ready()
        return self._server.url

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def make(task: Task, server: KeptServer) -> Record:
    """Make one run. Raises ServerStartError."""
    study, job = task.study, task.job
    own = [f"tracking.directory={task.scratch}"]
    config = study.config(job, own)
    shutil.rmtree(config.run_directory, ignore_errors=True)  # of a study that was killed in it
    url = server.url(study.config(job, [*own, *_FOR_THE_SERVER]))
    start = time.monotonic()
    config = study.config(job, [*own, f"rollout.server.addresses=[{url}]"])
    prepare_run_directory(config)
    code = run_rank(config)
    rows = _rows(config)
    status, reason = _ending(config, code, len(rows))
    if status == "failed":
        server.stop()  # what state it is in is not known
    elif status == "done":
        shutil.rmtree(config.run_directory)
    return Record(
        loss=job.cell.loss,
        parameters=dict(job.cell.parameters),
        precision=job.cell.precision,
        staleness=job.cell.staleness,
        seed=job.seed,
        status=status,
        reason=reason,
        seconds=round(time.monotonic() - start, 1),
        digest=study.digest,
        settings=study.settings,
        versions=versions(),
        metrics=metrics_of(rows),
    )


def run_rank(config: RunConfig) -> int:
    """Train in a process of its own; returns its exit code, negative for a signal."""
    path = config.run_directory / "config.yaml"
    if platform.has_cuda():
        command = [sys.executable, "-m", "drpo_megatron.training.main", str(path)]
        return subprocess.run(command, env=os.environ | _ENVIRONMENT, check=False).returncode
    worker = os.getpid()
    child = os.fork()
    if child == 0:
        _train(path, worker)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _train(path: Path, worker: int) -> None:
    """In the fork; never returns. `worker`: its parent, which may have ended before the kernel was asked to tell."""
    die_with_parent()
    if os.getppid() != worker:
        os._exit(1)
    try:
        os.environ.update(_ENVIRONMENT)
        sys.argv = ["drpo_megatron.training.main", str(path)]
        importlib.import_module("drpo_megatron.training.main").main()
    finally:
        os._exit(1)


def _rows(config: RunConfig) -> list[dict[str, float]]:
    try:
        return read_metrics(config.run_directory)
    except ValueError:  # it ended before its first step
        return []


def _ending(config: RunConfig, code: int, steps: int) -> tuple[Status, str]:
    if code == 0 and steps == config.training.steps:
        return "done", ""
    failure = read_failure(config)
    message = failure.message.splitlines()[0] if failure else f"the process ended with code {code}"
    # FloatingPointError: too many updates in a row with a gradient that is not finite. The other comes from a server.
    non_finite = message.startswith("FloatingPointError") or "not finite" in message
    return ("non_finite" if non_finite else "failed"), message


def serve(connection: Connection) -> None:
    """Answer tasks until the other side closes."""
    if not platform.has_cuda():
        platform.activate()
        for module in _IMPORTED_BEFORE:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # or each run would go through all of it
    server = KeptServer()
    try:
        while True:
            task = connection.recv()
            try:
                connection.send(make(task, server))
            except ServerStartError as error:  # it would hit the next run too: the study stops
                connection.send(error)
    except (EOFError, BrokenPipeError):
        return
    finally:
        server.stop()


if __name__ == "__main__":
    die_with_parent()
    serve(Connection(int(sys.argv[1])))
