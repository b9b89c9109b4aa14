"""Start a run on this host: one `torchrun` with a process a rank, and take it down again, whatever happens."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from drpo_megatron.config import RunConfig, dump_config
from drpo_megatron.observability.watchdog import EXIT_STALLED, stalls
from drpo_megatron.platform import determinism
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.platform.process import HUGE_PAGES, die_with_parent, stop_group

SHUTDOWN_S = 45.0


def training_command(config: RunConfig, layout: ParallelLayout) -> list[str]:
    """The command line of the trainer: SPMD ranks under torchrun, each reading the resolved configuration of the
    run.
    """
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.world_size}"),
        *("-m", "drpo_megatron.training.main", str(config.run_directory / "config.yaml")),
    ]


def training_environment(config: RunConfig) -> dict[str, str]:
    """Variables that the ranks need besides the caller's own."""
    return {
        "OMP_NUM_THREADS": str(config.training.threads),
        **HUGE_PAGES,
        "TOKENIZERS_PARALLELISM": "false",  # ranks fork workers after the tokenizer was used
        "HF_HUB_OFFLINE": "1",  # models are directories: nothing is looked up on a hub
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps TP communication by the order of kernel launches
        **(determinism.environment() if config.training.deterministic else {}),
    }


@dataclass(frozen=True)
class Failure:
    """Why a run ended early: the first rank that said so, its message, and the exit code of `drpo train`."""

    rank: int
    message: str
    code: int


def prepare_run_directory(config: RunConfig) -> Path | None:
    """Make `runs/NAME` with the resolved configuration. An earlier run of that name is moved aside; returns where
    to.
    """
    directory = config.run_directory
    moved = None
    if directory.exists():
        moved = next(p for n in itertools.count(1) if not (p := directory.with_name(f"{directory.name}.{n}")).exists())
        directory.rename(moved)
    (directory / "log").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    return moved


def read_failure(config: RunConfig) -> Failure | None:
    """What a watchdog says, or else the earliest error that a rank recorded in the run's log directory.

    A rank that the watchdog ends breaks the connections of others, which may record that.
    """
    directory = config.run_directory / "log"
    for rank, message in stalls(directory):
        return Failure(rank, message, EXIT_STALLED)
    records = sorted(directory.glob("error_rank_*.txt"), key=lambda p: p.stat().st_mtime_ns)
    if not records:
        return None
    return Failure(int(records[0].stem.rsplit("_", 1)[1]), records[0].read_text().strip(), code=1)


def run(config: RunConfig, layout: ParallelLayout) -> int:
    """Run to the end; returns the exit code (130 after Ctrl-C). No process of the run is alive when this returns.

    Ctrl-C and SIGTERM become SIGTERM for torchrun, which passes it to the ranks; rank 0 stops the rollout server. What
    is still there after `SHUTDOWN_S` seconds is killed.
    """
    log = config.run_directory / "log" / "torchrun.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            training_command(config, layout),
            env={**os.environ, **training_environment(config)},
            stderr=sink,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        previous = signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 130
        finally:
            signal.signal(signal.SIGTERM, previous)
            stop_group(process, timeout_s=SHUTDOWN_S)


def coordinates(layout: ParallelLayout, rank: int) -> dict[str, int]:
    """Where a rank stands, in Megatron-Core's order of ranks (tensor fastest, pipeline slowest)."""
    at = {}
    for axis in ("tensor", "context", "data", "pipeline"):
        rank, at[axis] = divmod(rank, getattr(layout, axis))
    return at


def describe(config: RunConfig, layout: ParallelLayout, server_commands: list[list[str]]) -> str:
    """The process layout and the command lines of a run, for `drpo train --dry-run`."""
    lines = [f"ranks: {layout.world_size} (tensor × pipeline × context × data)"]
    for rank in range(layout.world_size):
        at = coordinates(layout, rank)
        lines.append(f"  rank {rank}: " + ", ".join(f"{axis} {index}" for axis, index in at.items()))
    environment = " ".join(f"{k}={v}" for k, v in training_environment(config).items())
    lines += ["trainer:", f"  {environment} {shlex.join(training_command(config, layout))}"]
    lines += ["rollout servers (started by rank 0):", *(f"  {shlex.join(command)}" for command in server_commands)]
    lines += [f"rollout server (started elsewhere): {url}" for url in config.rollout.server.addresses]
    return "\n".join(lines)
