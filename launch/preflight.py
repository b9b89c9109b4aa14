"""Is a node well? Looked at before a job starts on it: what it is by itself, and what the nodes are to each other."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from drpo_megatron.doctor.host import space_problem
from drpo_megatron.platform.versions import versions
from launch.cluster import ClusterConfig

if TYPE_CHECKING:
    import torch.distributed as dist

    from launch.node import Node

_COMMAND_S = 120.0
_MEET_S = 120.0
_MESSAGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Report:
    """What a node says of itself. `time`: seconds of its clock, when all nodes had met."""

    time: float
    versions: Mapping[str, str]


def check(node: Node, cluster: ClusterConfig) -> int:
    """This node alone. Returns 1, with its sentence published, when it is not well."""
    problems = list(node_problems(node, cluster))
    if problems:
        node.is_bad(node.name, "; ".join(problems))
    return int(bool(problems))


def node_problems(node: Node, cluster: ClusterConfig) -> Iterator[str]:
    gpus = cluster.gpus_per_node
    if gpus and (found := count_gpus()) < gpus:
        yield f"it has {found} GPUs of {gpus}"
    if problem := space_problem(node.run, cluster.min_free_disk_gb, "min_free_disk_gb"):
        yield problem
    if not os.access(node.attempt, os.W_OK | os.X_OK):
        yield f"{node.attempt} cannot be written to"
    if cluster.check_command:
        yield from _command_problems(cluster.check_command)


def _command_problems(command: str) -> Iterator[str]:
    try:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=_COMMAND_S)
    except subprocess.TimeoutExpired:
        yield f"check_command did not end within {_COMMAND_S:g} s"
        return
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        yield f"check_command ended with code {done.returncode}" + "".join(f": {line}" for line in said)


def count_gpus() -> int:
    """As the driver sees them, in this step. 0 where it does not answer."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_COMMAND_S)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def reach(node: Node, cluster: ClusterConfig) -> int:
    """The nodes of a component together: all come, have the same packages and the same time, and add up right.

    Returns 1 when the first node has published who is not well. Raises what the collectives raise.
    """
    if len(node.names) == 1:
        return 0
    import torch.distributed as dist

    address, port = node.meeting_point(f"reach-{os.environ.get('SLURM_HET_GROUP_ID', '0')}-{node.names[0]}", _MEET_S)
    world, first = len(node.names), node.index == 0
    limit = timedelta(seconds=_MEET_S)
    store = dist.TCPStore(address, port, world, is_master=first, wait_for_workers=False, timeout=limit)
    store.set(f"came/{node.index}", "yes")
    if first:
        deadline = time.monotonic() + _MEET_S / 2
        absent = [name for index, name in enumerate(node.names) if not _came(store, index, deadline)]
        if absent:
            # The one whom most others do not reach is the one to leave out.
            for name in absent if 2 * len(absent) <= world else node.names[:1]:
                node.is_bad(name, f"it did not reach {node.names[0]} at {address}:{port} within {_MEET_S:g} s")
        store.set("all", json.dumps(not absent))
    if not json.loads(store.get("all")):
        return 1
    from drpo_megatron import platform

    dist.init_process_group(platform.backend(), store=store, rank=node.index, world_size=world, timeout=limit)
    try:
        control = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(control, dist.ProcessGroup), "every node is in it"
        dist.barrier(control)
        mine = Report(time.time(), versions())
        reports: list[Report | None] = [None] * world
        dist.all_gather_object(reports, mine, group=control)
        rate = _all_reduce_rate()
        strange = strangers(dict(zip(node.names, [r for r in reports if r], strict=True)), cluster.max_clock_skew_s)
        if first:
            print(f"all-reduce over {world} nodes: {rate / 1e9:.2f} GB/s on {platform.backend()}", flush=True)
            for name, why in strange.items():
                node.is_bad(name, why)
        dist.barrier(control)
    finally:
        dist.destroy_process_group()
    return int(bool(strange))


def _came(store: dist.Store, index: int, deadline: float) -> bool:
    try:
        store.wait([f"came/{index}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
    except RuntimeError:
        return False
    return True


def strangers(reports: Mapping[str, Report], max_skew_s: float) -> dict[str, str]:
    """Why a node is not like the others, by its name: its clock is far from the median, or its packages are not those
    that most have (of two that differ, those of the first).
    """
    middle = statistics.median_low(report.time for report in reports.values())
    common = Counter(tuple(sorted(report.versions.items())) for report in reports.values()).most_common(1)[0][0]
    found: dict[str, list[str]] = {}
    for name, report in reports.items():
        skew = report.time - middle
        if abs(skew) > max_skew_s:
            found.setdefault(name, []).append(f"its clock is {skew:+.1f} s from the others'")
        differ = [f"{p} {v} where others have {w}" for p, w in common if (v := report.versions.get(p)) != w]
        if differ:
            found.setdefault(name, []).append(f"it has {', '.join(differ)}")
    return {name: "; ".join(sentences) for name, sentences in found.items()}


def _all_reduce_rate() -> float:
    """Bytes a second of an all-reduce between one process a node, as NCCL's tests count them. Raises RuntimeError when
    the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    from drpo_megatron import platform

    world = dist.get_world_size()
    seconds = []
    for _ in range(3):
        values = torch.full((_MESSAGE_BYTES // 4,), float(dist.get_rank() + 1), device=platform.device())
        begin = time.perf_counter()
        dist.all_reduce(values)
        expected = world * (world + 1) / 2
        if values.min().item() != expected or values.max().item() != expected:
            raise RuntimeError(f"an all-reduce over the nodes gave {values.min().item()}, and {expected} is right")
        seconds.append(time.perf_counter() - begin)
    return 2 * (world - 1) / world * _MESSAGE_BYTES / min(seconds)
