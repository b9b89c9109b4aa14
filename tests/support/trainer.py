"""`drpo train` in a second instead of twenty: its ranks are forks of a process that has imported the trainer.

The command itself runs in the test's process, by `drpo_megatron.cli.main`: configuration, refusals, notes, the run
directory, messages and exit codes are its own. Only its launcher is replaced, and what a rank does begins with
`drpo_megatron.training.main.main`, as under torchrun. Use it with a server that runs, by `rollout.server.addresses`.
What is about processes, such as deaths and signals, must start the real command: `tests/support/runs.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_INTERRUPTED
from drpo_megatron.config import RunConfig
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.platform.process import die_with_parent
from drpo_megatron.rollout.server import SGLangServer
from launch import local

LIMIT_S = 900.0
"""For a run of a few steps on a machine that is busy with other things."""
_TERMINATED_S = 60.0  # what torchrun gives the other ranks when one has failed, and more
Launch = Callable[..., Any] | None
"""What stands for `subprocess.Popen` where a server is started. It must pickle."""
_PRELOADED = ["tests.support.trainer_imports"]


@dataclass(frozen=True)
class Outcome:
    """How a command ended: what it printed, on both streams, and where its run is, if it began one."""

    code: int
    output: str
    directory: Path | None = None

    def done(self) -> Outcome:
        """The same, of a command that succeeded."""
        assert self.code == 0, self.output
        return self

    @property
    def metrics(self) -> list[dict[str, Any]]:
        assert self.directory is not None, self.output
        return read_lines(self.directory / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(config: Path, *words: str, launch: Launch = None, **environment: str) -> Outcome:
    """`drpo train CONFIG WORDS...`: overrides and options. launch: what starts servers, such as `ServerPool.launch`.
    environment: variables of the ranks and what they start.

    Raises TimeoutError when a rank does not end.
    """
    with tempfile.TemporaryDirectory() as place:
        terminal = Path(place) / "terminal"
        terminal.touch()
        runs: list[RunConfig] = []

        def run(config: RunConfig, layout: ParallelLayout) -> int:
            runs.append(config)
            return _run_forked(config, layout, terminal, environment, launch)

        with mock.patch.object(local, "run", run):
            ended = drpo("train", config, *words)
        directory = runs[0].run_directory if runs else None
        return Outcome(ended.code, ended.output + terminal.read_text(), directory)


def drpo(*words: object) -> Outcome:
    """`drpo WORDS...` in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code
    assert isinstance(code, int), code
    if code == EXIT_INTERRUPTED:  # who runs the tests pressed Ctrl-C
        raise KeyboardInterrupt
    return Outcome(code, output.getvalue())


def drpo_apart(*words: object, launch: Launch = None) -> Outcome:
    """`drpo WORDS...` in a fork of the process that has imported everything: a command that changes its process, by
    signal handlers, variables or the log, or starts servers, by `launch`, which end with the thread that started them.
    """
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output"
        output.touch()
        process = _context().Process(target=_command, args=([str(word) for word in words], output, launch), daemon=True)
        process.start()
        try:
            process.join(LIMIT_S)
            assert process.exitcode is not None, f"did not end in {LIMIT_S:.0f} s: {output.read_text()}"
        finally:
            process.kill()
            process.join()
        return Outcome(process.exitcode, output.read_text())


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run_forked(config: RunConfig, layout: ParallelLayout, terminal: Path, more: dict[str, str], launch: Launch) -> int:
    """What `launch.local.run` returns: 0, or 1 when a rank failed, which ends the others."""
    from torch.distributed import TCPStore

    context = _context()
    # The ranks meet at a store of the launcher, as under torchrun: nobody else can have taken its port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **local.training_environment(config),
        **more,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_WORLD_SIZE": str(layout.world_size),
    }
    ranks = [
        context.Process(
            target=_rank, args=(config.run_directory, environment | _place(rank), terminal, launch), daemon=True
        )
        for rank in range(layout.world_size)
    ]
    for process in ranks:
        process.start()
    try:
        return _wait(ranks)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()


def _place(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _wait(ranks: list[Any]) -> int:
    running, deadline, failed = list(ranks), time.monotonic() + LIMIT_S, False
    while running:
        multiprocessing.connection.wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic()))
        running = [p for p in running if p.exitcode is None]
        if running and time.monotonic() > deadline:
            if failed:
                return 1
            raise TimeoutError(f"{len(running)} of {len(ranks)} ranks did not end in {LIMIT_S:.0f} s")
        if not failed and any(p.exitcode for p in ranks):
            failed, deadline = True, time.monotonic() + _TERMINATED_S
            for process in running:
                process.terminate()
    return int(any(p.exitcode for p in ranks))


def _rank(directory: Path, environment: dict[str, str], terminal: Path, launch: Launch) -> None:
    """In the fork; never returns."""
    try:
        _prepare(terminal, directory / "log" / "torchrun.log", launch)
        os.environ.update(environment)
        sys.argv = ["drpo_megatron.training.main", str(directory / "config.yaml")]
        importlib.import_module("drpo_megatron.training.main").main()
    finally:
        os._exit(1)


def _command(words: list[str], output: Path, launch: Launch) -> None:
    """In the fork."""
    _prepare(output, output, launch)
    die_with_parent()
    cli.main(words)


def _prepare(stdout: Path, stderr: Path, launch: Launch) -> None:
    # Ended by its parent in any case; without the mark it may have processes of its own, as a checkpoint does.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    for path, number in ((stdout, 1), (stderr, 2)):
        sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, number)
        os.close(sink)
    if launch is not None:
        make = SGLangServer.__init__

        def make_with_launch(server: SGLangServer, *arguments: Any, **options: Any) -> None:
            make(server, *arguments, **options)
            server.launch = launch

        SGLangServer.__init__ = make_with_launch  # type: ignore[method-assign]
