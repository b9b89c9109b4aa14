"""`drpo status`, `drpo logs` and `drpo cancel`: the jobs of a run, by the record in its directory.

`scontrol` knows a job until some minutes after its end; `sacct` longer, where the cluster has accounting.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drpo_megatron.config import ConfigError
from launch.slurm import STATE, SlurmError, slurm

RECORD = "job.json"
_OVER = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)


@dataclass(frozen=True)
class JobState:
    """As SLURM says it. state: its own word, or `unknown` when it does not know the job any more."""

    job: str
    state: str
    fields: Mapping[str, str]

    @property
    def active(self) -> bool:
        return self.state != "unknown" and not self.state.startswith(_OVER)

    def row(self) -> str:
        shown = {
            "nodes": self.fields.get("NodeList"),
            "since": self.fields.get("StartTime"),
            "limit": self.fields.get("TimeLimit"),
            "restarts": self.fields.get("Restarts"),
            "reason": self.fields.get("Reason"),
            "exit": self.fields.get("ExitCode"),
        }
        told = [
            f"{name} {value}" for name, value in shown.items() if value not in (None, "", "(null)", "None", "Unknown")
        ]
        return f"job {self.job}: {self.state.lower()}" + "".join(f", {word}" for word in told)


def jobs_of(run: Path) -> list[str]:
    """Ids of the jobs of a run, in their order. Raises ConfigError for a directory that no job was submitted for."""
    record = run / STATE / RECORD
    if not record.is_file():
        raise ConfigError(
            [f"{run}: holds no {STATE}/{RECORD}; give the directory of a run that `drpo submit` submitted"]
        )
    return [str(job) for job in json.loads(record.read_text())["jobs"]]


def job_state(job: str) -> JobState:
    """Raises SlurmError when neither command is there."""
    try:
        text = slurm("scontrol", "-o", "show", "job", job)
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return JobState(job, _accounted(job), {})
    line = text.splitlines()[0]
    fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return JobState(job, fields["JobState"], fields)


def _accounted(job: str) -> str:
    if shutil.which("sacct") is None:
        return "unknown"
    try:
        lines = slurm("sacct", "-n", "-X", "-P", "-j", job, "-o", "State").splitlines()
    except SlurmError:
        return "unknown"
    return lines[0] if lines else "unknown"


def active_jobs(run: Path) -> list[str]:
    """Those that wait or run. None where no job was submitted."""
    if not (run / STATE / RECORD).is_file():
        return []
    return [job for job in jobs_of(run) if job_state(job).active]


def status(parsed: argparse.Namespace) -> int:
    run: Path = parsed.run
    for job in jobs_of(run):
        print(_asked(job).row())
    metrics = run / "metrics.jsonl"
    if metrics.is_file() and (lines := metrics.read_text().splitlines()):
        last = json.loads(lines[-1])
        reward = f", reward {last['reward/mean']:.3f}" if "reward/mean" in last else ""
        print(f"steps done: {last['step'] + 1}{reward}")
    checkpoints = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    if checkpoints:
        print(f"checkpoints: {', '.join(checkpoints)}")
    requeues = run / STATE / "requeues"
    if requeues.is_file():
        print(f"requeued: {len(requeues.read_text().splitlines())} times")
    if last_line := _tail(run / STATE / "job.log", 1):
        print(f"log: {last_line[0]}")
    return 0


def _asked(job: str) -> JobState:
    try:
        return job_state(job)
    except SlurmError as error:
        raise ConfigError([str(error)]) from error


def logs(parsed: argparse.Namespace) -> int:
    run: Path = parsed.run
    jobs_of(run)
    wanted = [run / STATE / "job.log"]
    if parsed.all:
        wanted += sorted((run / "log").glob("*.log")) + sorted((run / STATE).glob("attempt-*/*.log"))
    for path in wanted:
        if len(wanted) > 1:
            print(f"== {path}")
        print("\n".join(_tail(path, parsed.lines)))
    return 0


def cancel(parsed: argparse.Namespace) -> int:
    run: Path = parsed.run
    jobs = jobs_of(run)
    active = [job for job in jobs if _asked(job).active]
    if not active:
        print(f"no job of {run} is waiting or running")
        return 0
    (run / STATE / "cancelled").touch()  # first: a job that is about to be queued again must see it
    try:
        slurm("scancel", *active)
    except SlurmError as error:
        raise ConfigError([str(error)]) from error
    print(f"cancelled: job {', '.join(active)}")
    return 0


def _tail(path: Path, lines: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:] if path.is_file() else []
