"""Start a run's ranks on this host: one `torchrun` with a process a rank, and take it down again, whatever happens.

A run on one host starts all of them; in a job, `launch/node.py` does the same on each node.
"""

from __future__ import annotations

import contextlib
import itertools
import json
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
from drpo_megatron.platform.process import HUGE_PAGES, children, die_with_parent, stop_group
from drpo_megatron.platform.versions import versions
from drpo_megatron.training.stop import RECORD

SHUTDOWN_S = 45.0
MOST_RANKS = 1024  # that a dry run lists
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Place:
    """This host among the `nodes` of a run, which share its ranks equally and in order. The first one's `address` and
    `port` are where the ranks of several nodes meet.
    """

    nodes: int = 1
    index: int = 0
    address: str = ""
    port: int = 0

    def torchrun(self, layout: ParallelLayout) -> list[str]:
        """torchrun's options. Its own rendezvous would number the nodes as they come."""
        ranks = f"--nproc-per-node={layout.world_size // self.nodes}"
        if self.nodes == 1:
            return ["--standalone", ranks]
        meet = [f"--master-addr={self.address}", f"--master-port={self.port}"]
        return [f"--nnodes={self.nodes}", f"--node-rank={self.index}", *meet, ranks]


def training_command(config: RunConfig, layout: ParallelLayout, place: Place) -> list[str]:
    """The command line of the trainer: SPMD ranks under torchrun, each reading the resolved configuration of the
    run.
    """
    return [
        sys.executable,
        *("-m", "torch.distributed.run", *place.torchrun(layout)),
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
        # SGLang's servers turn it off where it is not set, and the ranks of a communicator must agree.
        "NCCL_CUMEM_ENABLE": os.environ.get("NCCL_CUMEM_ENABLE", "0"),
        **(determinism.environment() if config.training.deterministic else {}),
    }


@dataclass(frozen=True)
class Failure:
    """Why a run ended early: the first rank that said so, its message, and the exit code of `drpo train`."""

    rank: int
    message: str
    code: int


def prepare_run_directory(config: RunConfig, keep: bool = False) -> Path | None:
    """Make `runs/NAME` with the resolved configuration and the packages' versions. An earlier run of that name is moved
    aside; returns where to. With save.resume, or to `keep` it, only its configuration, versions and logs are, inside
    the directory.
    """
    directory = config.run_directory
    moved = None
    if directory.exists() and (config.save.resume or keep):
        for path in (directory / "config.yaml", directory / "versions.json", directory / "log"):
            if path.exists():
                move_aside(path)
    elif directory.exists():
        moved = move_aside(directory)
    (directory / "log").mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(config))
    (directory / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    return moved


def move_aside(path: Path) -> Path:
    """To the first free one of NAME.1, NAME.2 …"""
    moved = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{n}")).exists())
    return path.rename(moved)


def read_stop(config: RunConfig) -> str | None:
    """What a run that stopped with a checkpoint, because it was told to, says of it."""
    return stop_in(config.run_directory / "log")


def stop_in(log_directory: Path) -> str | None:
    record = log_directory / RECORD
    return record.read_text().strip() if record.exists() else None


def read_failure(config: RunConfig) -> Failure | None:
    """What a watchdog says, or else the earliest error that a rank recorded in the run's log directory.

    A rank that the watchdog ends breaks the connections of others, which may record that.
    """
    return failure_in(config.run_directory / "log")


def failure_in(log_directory: Path) -> Failure | None:
    for rank, message in stalls(log_directory):
        return Failure(rank, message, EXIT_STALLED)
    records = sorted(log_directory.glob("error_rank_*.txt"), key=lambda p: p.stat().st_mtime_ns)
    if not records:
        return None
    return Failure(int(records[0].stem.rsplit("_", 1)[1]), records[0].read_text().strip(), code=1)


def run(config: RunConfig, layout: ParallelLayout, place: Place = Place()) -> int:
    """Run to the end; returns the exit code (130 after Ctrl-C). No process of it is alive on this host when this
    returns.

    Ctrl-C and SIGTERM become SIGTERM for torchrun, which passes it to the ranks; rank 0 stops the rollout servers. What
    is still there after `SHUTDOWN_S` seconds is killed. A run with checkpoints is first told to save one and stop, on
    SIGUSR1 too, and has save.deadline_s for it; a second Ctrl-C ends the wait.
    """
    log = config.run_directory / "log" / (f"torchrun-{place.index}.log" if place.index else "torchrun.log")
    with log.open("wb") as sink:
        process = subprocess.Popen(
            training_command(config, layout, place),
            env={**os.environ, **training_environment(config)},
            stderr=sink,
            start_new_session=True,
            preexec_fn=_trainer_process,
        )
        saves = config.save.every is not None
        handled = (signal.SIGTERM, signal.SIGUSR1) if saves else (signal.SIGTERM,)
        previous = {number: signal.signal(number, _raise_told) for number in handled}
        try:
            return process.wait()
        except (_Told, KeyboardInterrupt) as told:
            if saves:
                number = told.number if isinstance(told, _Told) else signal.SIGINT
                _wait_for_checkpoint(process, None if number == signal.SIGUSR1 else config.save.deadline_s)
            return EXIT_INTERRUPTED
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            stop_group(process, timeout_s=SHUTDOWN_S)


class _Told(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def _raise_told(number: int, _: object) -> None:
    raise _Told(number)


def _trainer_process() -> None:
    die_with_parent()
    # A scheduler may warn every process of a job; torchrun would die of it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _wait_for_checkpoint(process: subprocess.Popen[bytes], seconds: float | None) -> None:
    """Tell the ranks to save and stop, and wait for it."""
    print("stopping: the run saves a checkpoint first; Ctrl-C ends it at once", file=sys.stderr, flush=True)
    for rank in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGUSR1)
    try:
        process.wait(timeout=seconds)
    except _Told:  # after SIGUSR1 the scheduler now means it
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=SHUTDOWN_S / 2)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        print("stopped without a checkpoint of the last steps", file=sys.stderr, flush=True)


def coordinates(layout: ParallelLayout, rank: int) -> dict[str, int]:
    """Where a rank stands, in Megatron-Core's order of ranks (tensor fastest, pipeline slowest)."""
    at = {}
    for axis in ("tensor", "context", "data", "pipeline"):
        rank, at[axis] = divmod(rank, getattr(layout, axis))
    return at


def describe(config: RunConfig, layout: ParallelLayout, server_commands: list[list[str]]) -> str:
    """The process layout and the command lines of a run, for `drpo train --dry-run`."""
    lines = [f"ranks: {layout.world_size} (tensor × pipeline × context × data)"]
    for rank in range(min(layout.world_size, MOST_RANKS)):
        at = coordinates(layout, rank)
        lines.append(f"  rank {rank}: " + ", ".join(f"{axis} {index}" for axis, index in at.items()))
    if layout.world_size > MOST_RANKS:
        lines.append(f"  … and {layout.world_size - MOST_RANKS} more in the same order")
    environment = " ".join(f"{k}={v}" for k, v in training_environment(config).items())
    lines += ["trainer:", f"  {environment} {shlex.join(training_command(config, layout, Place()))}"]
    if config.rollout.from_dump is not None:
        return "\n".join([*lines, f"no rollout servers: rollouts are read from {config.rollout.from_dump}"])
    lines += ["rollout servers (started by rank 0):", *(f"  {shlex.join(command)}" for command in server_commands)]
    lines += [f"rollout server (started elsewhere): {url}" for url in config.rollout.server.addresses]
    return "\n".join(lines)
