"""`drpo` as a user runs it, in processes of its own: what the tests that kill, stop and interrupt runs share.

A run that need not be a process is faster with `tests/support/trainer.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from drpo_megatron.report.parting import MEASURED
from tests.support.trainer import Outcome, read_lines

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
MOE = ROOT / "configs" / "tiny-qwen3-moe.yaml"
LIMIT_S = 600.0
"""Until a test gives up: for a machine that is busy with other things."""
SMALL = ("rollout.prompts_per_step=8", "rollout.samples_per_prompt=4")
# Of a set with six prompts, for evaluations in between.
DIGITS = "{source: {type: function, function: 'drpo_megatron.data.examples:repeat_digit', size: 6, seed: 9}}"
# A slow machine is not a dead server.
_PATIENT = ("rollout.server.start_timeout_s=900", "rollout.server.health_timeout_s=300")


def settings(directory: Path, name: str = "run") -> tuple[str, ...]:
    """A run of a recipe below `directory`, with a model of its own."""
    place = (f"tracking.directory={directory}", f"model.path={directory / 'model'}", f"name={name}")
    return (*place, "tracking.wandb=false", *_PATIENT)


def command(directory: Path, *words: str, config: Path = QUICKSTART) -> list[str]:
    return [sys.executable, "-m", "drpo_megatron.cli", "train", str(config), *settings(directory), *words]


def run(arguments: list[str], **environment: str) -> Outcome:
    """To its end; raises subprocess.TimeoutExpired."""
    done = subprocess.run(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=LIMIT_S,
        check=False,
    )
    return Outcome(done.returncode, done.stdout)


@contextlib.contextmanager
def started(arguments: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Both streams in one. Killed, if the test did not see it end."""
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        # As in a terminal: a background job of a shell ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def metrics(directory: Path, name: str = "run") -> list[dict[str, Any]]:
    """Of the steps that are logged so far."""
    path = directory / name / "metrics.jsonl"
    return read_lines(path) if path.exists() else []


def dump_path(directory: Path, step: int, name: str = "run") -> Path:
    return directory / name / "rollouts" / f"step_{step:06d}.jsonl"


def dump(directory: Path, step: int, name: str = "run") -> list[dict[str, Any]]:
    """The rollouts of a step."""
    return read_lines(dump_path(directory, step, name))


def without_times(steps: list[dict[str, Any]], *more: str) -> list[dict[str, Any]]:
    """What was computed. more: beginnings of other metrics to leave out."""
    return [{k: v for k, v in step.items() if not k.startswith((*MEASURED, *more))} for step in steps]


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def wait_for_steps(process: subprocess.Popen[str], directory: Path, steps: int) -> None:
    """Until that many are logged. Fails when the run ends before."""
    wait_for(lambda: len(metrics(directory)) >= steps or process.poll() is not None, f"step {steps}")
    assert process.poll() is None, process.stdout.read() if process.stdout else ""


def server_processes(directory: Path) -> list[psutil.Process]:
    """The rollout servers of the runs below `directory`, without their workers."""
    found = [
        p for p in started_with(str(directory)) if "drpo_megatron.platform.sglang_cpu" in " ".join(p.info["cmdline"])
    ]
    return [p for p in found if p.info["ppid"] not in {other.pid for other in found}]


def descendants(process: int) -> list[psutil.Process]:
    """With what they are in `info`. Those that end while they are looked at, as helpers of a start do, are left out."""
    wanted = {p.pid for p in psutil.Process(process).children(recursive=True)}
    return [p for p in psutil.process_iter(["name", "cmdline", "ppid"]) if p.pid in wanted and p.info["cmdline"]]


def left_over(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that go on running. One that ended and waits for its parent to notice does not run: in a container nobody
    may notice.
    """
    deadline = time.monotonic() + LIMIT_S / 2
    while (alive := [p for p in processes if _runs(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started_with(word: str) -> list[psutil.Process]:
    """Processes of this host with `word` in their command line, such as a directory of the test's own."""
    found = psutil.process_iter(["name", "cmdline", "ppid"])
    return [p for p in found if any(word in part for part in p.info["cmdline"] or [])]
