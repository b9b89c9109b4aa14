"""The machine without its libraries: disk, shared memory, clock, limits, memory pages, ports."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from drpo_megatron.config.load import ConfigError
from drpo_megatron.config.rollout_checks import port_problems
from drpo_megatron.doctor import FAIL, OK, SKIPPED, Finding
from drpo_megatron.platform.ports import free_port

if TYPE_CHECKING:
    from drpo_megatron.config.schema import RunConfig

SHARED_MEMORY = Path("/dev/shm")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_LEAST_DISK = 10**9
_LEAST_SHARED_MEMORY = 2**28  # NCCL and SGLang's ranks talk through it; containers come with 64 MiB
_LEAST_FILES = 1024
_LEAST_PROCESSES = 2048
_FILES_BESIDE_REQUESTS = 512  # logs, sockets of the ranks, libraries
_FSYNC_S = 5.0
_TICK_S = 0.1
_RELEASED = 1_700_000_000.0  # no clock that is right shows an earlier time


def examine(config: RunConfig | None) -> Iterator[Finding]:
    directory = config.run_directory if config else Path("runs")
    yield disk(directory, disk_needed(config) if config else _LEAST_DISK)
    if config and config.save.every and config.save.directory:
        yield disk(config.save.directory, checkpoint_bytes(config), name="checkpoints")
    if config and config.sync.directory:
        yield disk(config.sync.directory, _parameters(config) * _parameter_bytes(config), name="sync directory")
    yield shared_memory(config)
    yield clock()
    yield open_files(config)
    yield processes()
    yield huge_pages()
    yield ports(config)


def disk(directory: Path, least_bytes: int, name: str = "run directory") -> Finding:
    """Writes a small file where `directory` is or will be, waits until it is on the disk, and removes it."""
    place = nearest(directory)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(b"well?")
            file.flush()
            begin = time.monotonic()
            os.fsync(file.fileno())
            seconds = time.monotonic() - begin
    except OSError as error:
        return Finding(
            name,
            FAIL,
            f"{place} cannot be written to ({error.strerror}): choose another directory (tracking.directory, "
            "save.directory), or change its permissions",
        )
    if problem := space_problem(place, least_bytes / 1e9, "what the run is going to write"):
        return Finding(name, FAIL, f"{problem}: free some, or choose another directory")
    if seconds > _FSYNC_S:
        return Finding(
            name,
            FAIL,
            f"fsync of a small file at {place} took {seconds:.1f} s: checkpoints would hang; use another disk",
        )
    return Finding(
        name, OK, f"{place} is writable, {free_gb(place):.1f} GB are free, fsync takes {seconds * 1e3:.0f} ms"
    )


def nearest(directory: Path) -> Path:
    """The nearest directory that exists, in which `directory` will be made."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return place


def free_gb(path: Path) -> float:
    """Space for this user on the file system of `path`, GB."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize / 1e9


def space_problem(path: Path, least_gb: float, what: str) -> str | None:
    """A sentence when fewer than `least_gb` are free at `path`. what: that which needs them."""
    if (free := free_gb(path)) >= least_gb:
        return None
    return f"{free:.1f} GB are free at {path}, below {what} = {least_gb:g}"


def disk_needed(config: RunConfig) -> int:
    """Bytes that the run directory will hold: checkpoints, if they are there, and exports; at least 1 GB."""
    needed = 0 if config.save.directory else checkpoint_bytes(config)
    exports = config.training.export + (config.training.steps // config.save.hf_every if config.save.hf_every else 0)
    return max(_LEAST_DISK, needed + exports * _parameters(config) * _parameter_bytes(config))


def checkpoint_bytes(config: RunConfig) -> int:
    """Of all checkpoints that are kept, and the one that is written before the oldest goes."""
    from drpo_megatron.models.memory import state_memory

    if not config.save.every:
        return 0
    # Moments and main weights are float32 in the files, whatever `optimizer.moments_dtype` is.
    of_one = state_memory(_parameters(config), _parameter_bytes(config), shards=1)
    return (config.save.keep + config.save.keep_best + 1) * (of_one.weights + of_one.optimizer)


def _parameter_bytes(config: RunConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.model.dtype]


def _parameters(config: RunConfig) -> int:
    """Of the whole model; 0 while a recipe has not made it. Raises ConfigError for a model that cannot be read."""
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.plan.parameters import rank_parameters, stages_of
    from drpo_megatron.platform.layout import ParallelLayout

    if not (config.model.path / "config.json").exists():
        return 0
    try:
        hf, alone = HFModelConfig.load(config.model.path), ParallelLayout()
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.path: {error}"]) from error
    return sum(rank_parameters(hf, alone, stages_of(hf, alone)[0]).values())


def shared_memory(config: RunConfig | None) -> Finding:
    name = "shared memory"
    if not SHARED_MEMORY.is_dir():
        return Finding(name, FAIL, f"{SHARED_MEMORY} does not exist: mount a tmpfs there")
    status = os.statvfs(SHARED_MEMORY)
    free, least, of_what = status.f_bavail * status.f_frsize, _LEAST_SHARED_MEMORY, "that processes of a run share"
    if config and config.sync.transport == "shared_memory":
        # Two buckets are in use: one is filled while the servers load the other.
        least += int(2 * config.sync.bucket_mb * 2**20)
        of_what += f", with two buckets of sync.bucket_mb = {config.sync.bucket_mb:g}"
    if free < least:
        return Finding(
            name,
            FAIL,
            f"{free / 2**20:.0f} MiB are free at {SHARED_MEMORY}, below the {least / 2**20:.0f} MiB {of_what}: remount "
            "it larger (a container: --shm-size), or lower sync.bucket_mb",
        )
    return Finding(name, OK, f"{free / 2**20:.0f} MiB are free at {SHARED_MEMORY}")


def clock() -> Finding:
    """Of this machine alone. Clocks of several nodes are compared by the job's own check (launch/preflight.py)."""
    name = "clock"
    real, steady = time.time(), time.monotonic()
    time.sleep(_TICK_S)
    by_real, by_steady = time.time() - real, time.monotonic() - steady
    synchronize = "synchronize it (chrony, systemd-timesyncd)"
    if real < _RELEASED:
        return Finding(name, FAIL, f"it shows {time.strftime('%Y-%m-%d', time.gmtime(real))}: {synchronize}")
    if abs(by_real - by_steady) > _TICK_S / 2:
        return Finding(
            name, FAIL, f"it went {by_real:.2f} s while {by_steady:.2f} s passed: something sets it; {synchronize} once"
        )
    return Finding(name, OK, time.strftime("%Y-%m-%d %H:%M:%S UTC, as steady as the monotonic one", time.gmtime(real)))


def open_files(config: RunConfig | None) -> Finding:
    """Rank 0 has a connection for each request in flight, and a server one for each that it serves."""
    least = max(_LEAST_FILES, config.rollout.concurrency + _FILES_BESIDE_REQUESTS if config else 0)
    return _limit("open files", resource.RLIMIT_NOFILE, least, "ulimit -n", "or lower rollout.concurrency")


def processes() -> Finding:
    return _limit("processes", resource.RLIMIT_NPROC, _LEAST_PROCESSES, "ulimit -u", "threads count too")


def _limit(name: str, which: int, least: int, command: str, further: str) -> Finding:
    soft, hard = resource.getrlimit(which)
    if soft != resource.RLIM_INFINITY and soft < least:
        raisable = hard == resource.RLIM_INFINITY or hard >= least
        how = f"`{command} {least}` raises it" if raisable else f"let an administrator raise the hard limit of {hard}"
        return Finding(name, FAIL, f"the limit of {soft} is below {least}: {how}, {further}")
    return Finding(name, OK, "no limit" if soft == resource.RLIM_INFINITY else f"a limit of {soft}")


def huge_pages() -> Finding:
    """Large tensors in host memory ask for them; see `platform.process.HUGE_PAGES`."""
    name = "huge pages"
    try:
        modes = HUGE_PAGES.read_text()
    except OSError:
        return Finding(name, SKIPPED, f"{HUGE_PAGES} cannot be read: this kernel has none to give")
    if "[never]" in modes:
        return Finding(
            name,
            SKIPPED,
            "off, and passes over large host tensors take about a tenth longer; "
            f"`echo madvise | sudo tee {HUGE_PAGES}` turns them on for who asks",
        )
    return Finding(name, OK, "given to who asks" if "[madvise]" in modes else "given to everyone")


def ports(config: RunConfig | None) -> Finding:
    """Those that the configuration names; otherwise that there is a free one."""
    name = "ports"
    if config and config.rollout.server.addresses:
        return Finding(name, SKIPPED, "the servers were started elsewhere: rollout.server.addresses")
    if config and (first := config.rollout.server.port):
        if problems := list(port_problems(config)):
            return Finding(name, FAIL, "; ".join(problems))
        last = first + config.rollout.server.count - 1
        return Finding(name, OK, f"{first}{f' to {last}' if last > first else ''} can be used")
    try:
        free_port("127.0.0.1")
    except OSError as error:
        return Finding(name, FAIL, str(error))
    return Finding(name, OK, "servers find free ones on 127.0.0.1")
