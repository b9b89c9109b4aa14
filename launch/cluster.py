"""The cluster file of `drpo submit`, typed: where a job runs and what it may use. The help text of a setting is the
string under it; an unknown key is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from drpo_megatron.config.load import load_section
from drpo_megatron.config.schema import Section

# What stands in an #SBATCH line is split at blanks and not unquoted like shell words, so that no quoting is safe there.
_PLAIN = r"^[A-Za-z0-9][A-Za-z0-9._+@:,/=&|*\[\]-]*$"
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"


class Container(Section):
    """Pyxis and enroot."""

    image: str = Field(pattern=r"^[A-Za-z0-9._+@:,/#-]+$")
    """A squashfs file by path, or an image of a registry as pyxis writes it, HOST#NAME:TAG."""
    mounts: list[str] = Field(default_factory=list)
    """HOST_PATH:PATH, each. The working directory is mounted where it is."""
    python: str = "python3"
    """Of the image, with this package installed."""


class RolloutGroup(Section):
    """Nodes of a heterogeneous job that serve, beside those that train."""

    nodes: int = Field(gt=0)
    """Nodes of the group."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of each: `gpus_per_node / rollout.server.tensor_parallel` servers. 0: nodes without GPUs, a server each."""
    cpus_per_node: int | None = Field(None, gt=0)
    """CPUs of each. null: what the partition gives."""
    memory_gb: int | None = Field(None, ge=0)
    """Host memory of each, in GB. 0: all of it. null: what the partition gives."""
    partition: str | None = Field(None, pattern=_PLAIN)
    """null: the trainer's."""
    constraint: str | None = Field(None, pattern=_PLAIN)
    """Features of the nodes. null: none."""


class ClusterConfig(Section):
    partition: str = Field(pattern=_PLAIN)
    """Partition of the job."""
    account: str | None = Field(None, pattern=_PLAIN)
    """Account that is charged. null: yours."""
    qos: str | None = Field(None, pattern=_PLAIN)
    """Quality of service. null: the default."""
    constraint: str | None = Field(None, pattern=_PLAIN)
    """Features of the trainer's nodes. null: none."""
    time_limit: str = Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    """Of one job, as HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS. A longer run is requeued, or a chain."""
    nodes: int = Field(1, gt=0)
    """Nodes of the trainer; each has as many of its ranks."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of each. 0: nodes without GPUs, where the trainer runs on gloo."""
    gpu_type: str | None = Field(None, pattern=_PLAIN)
    """SLURM's name of the GPU, where a partition has several. null: any."""
    device: Literal["a100", "h100", "h200", "b200"] | None = None
    """What `drpo plan` knows the GPU as. The job is refused when the plan does not fit. null: not checked."""
    cpus_per_node: int | None = Field(None, gt=0)
    """CPUs of each node. null: what the partition gives."""
    memory_gb: int | None = Field(None, ge=0)
    """Host memory of each node, in GB. 0: all of it. null: what the partition gives."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    container: Container | None = None
    """null: the Python that submits, from a file system that the nodes share."""
    modules: list[str] = Field(default_factory=list)
    """Environment modules that are loaded, in this order."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables of all processes of the job."""
    nccl: dict[str, str] = Field(default_factory=dict)
    """NCCL's settings without their prefix, for example {SOCKET_IFNAME: bond0, IB_HCA: mlx5}."""
    rollout: RolloutGroup | None = None
    """Nodes for the rollout servers: the job is heterogeneous. null: the servers run on the trainer's first node."""
    signal_lead_s: int = Field(300, ge=60, le=65535)
    """Seconds before the time limit at which the run is told to save and stop. More than the longest step and a
    checkpoint take. SLURM may be a minute early."""
    requeue_limit: int = Field(20, ge=0)
    """How often a run is requeued, in all: at the time limit, after a stall, and without a node that is not well."""
    check_command: str | None = None
    """Shell command that each node runs before the job starts there; a node where it fails is excluded. null: none."""
    min_free_disk_gb: float = Field(10.0, ge=0)
    """Space that the run's directory must have, seen from each node."""
    max_clock_skew_s: float = Field(5.0, gt=0)
    """By how much the clocks of two nodes may differ."""
    exclude: list[str] = Field(default_factory=list)
    """Nodes that the job never takes."""
    options: dict[str, str] = Field(default_factory=dict)
    """Further options of sbatch by their long names without the dashes, for example {mail-type: FAIL}."""

    @property
    def seconds(self) -> int:
        """The time limit."""
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment, NCCL's among them."""
        return self.environment | {f"NCCL_{name}": value for name, value in self.nccl.items()}

    def servers(self, tensor_parallel: int) -> int:
        """On each node of the rollout group."""
        if self.rollout is None:
            return 0
        return self.rollout.gpus_per_node // tensor_parallel if self.rollout.gpus_per_node else 1


def load_cluster(path: Path) -> ClusterConfig:
    """Raises ConfigError with every problem."""
    return load_section(ClusterConfig, path)


def is_plain(value: str) -> bool:
    """Whether it can stand in an #SBATCH line."""
    return re.match(_PLAIN, value) is not None


def is_variable(name: str) -> bool:
    return re.match(_VARIABLE, name) is not None
