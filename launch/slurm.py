"""The sbatch script of a job, and SLURM's commands. A value reaches the script quoted by `shlex`, or, in an #SBATCH
line, where nothing can be quoted, only when it needs no quoting.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from drpo_megatron.config import ConfigError, RunConfig
from launch.cluster import ClusterConfig, is_plain

TEMPLATE = Path(__file__).with_name("job.sbatch")
STATE = "slurm"
"""In the run's directory: what the job and the commands about it write and read."""
_COMMAND_S = 60.0


class SlurmError(Exception):
    """A command of SLURM failed, or is not there. The message is its own."""


@dataclass(frozen=True)
class Job:
    """What one sbatch script runs: a run, or one for each task of an array. chained: another job goes on after it."""

    runs: Sequence[RunConfig]
    cluster: ClusterConfig
    chained: bool = False

    @property
    def name(self) -> str:
        return f"drpo-{self.runs[0].name}"


def render(job: Job) -> str:
    """The sbatch script. Raises ConfigError for a value that cannot stand in an #SBATCH line."""
    cluster = job.cluster
    components = [_trainer_options(job)] + ([_rollout_options(job)] if cluster.rollout else [])
    nodes = [cluster.nodes] + ([cluster.rollout.nodes] if cluster.rollout else [])
    cpus = [cluster.cpus_per_node] + ([cluster.rollout.cpus_per_node] if cluster.rollout else [])
    python = cluster.container.python if cluster.container else sys.executable
    ids = "$SLURM_JOB_ID" if len(nodes) == 1 else "$SLURM_JOB_ID_HET_GROUP_0 $SLURM_JOB_ID_HET_GROUP_1"
    values = {
        "directives": "\n#SBATCH hetjob\n".join(_directives(options) for options in components),
        "workdir": shlex.quote(str(Path.cwd())),
        "runs": shlex.join(str(run.run_directory.absolute()) for run in job.runs),
        "python": shlex.quote(python),
        "requeue_limit": str(cluster.requeue_limit),
        "requeue_when_stopped": str(not job.chained).lower(),
        "groups": " ".join(str(group) for group in range(len(nodes))),
        "tasks": " ".join(map(str, nodes)),
        "excluded": shlex.quote(",".join(cluster.exclude)),
        "cpus": " ".join(str(n or 0) for n in cpus),
        "srun": shlex.join(_srun_options(cluster)),
        "modules": "\n".join(
            f"module load {shlex.quote(m)} || fail module load {shlex.quote(m)}" for m in cluster.modules
        ),
        "environment": "\n".join(f"export {name}={shlex.quote(value)}" for name, value in cluster.variables.items()),
        "job_ids": ids,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text())


def _trainer_options(job: Job) -> dict[str, str]:
    cluster = job.cluster
    return _given(own_options(job) | cluster.options)


def own_options(job: Job) -> dict[str, str | None]:
    """What the cluster file's settings and the run decide. None is left out."""
    cluster, run = job.cluster, job.runs[0]
    options: dict[str, str | None] = {
        "job-name": job.name,
        "time": cluster.time_limit,
        # Output goes to job.log of the run. This is for what comes before that.
        "output": f"{run.run_directory.absolute()}/{STATE}/sbatch-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{cluster.signal_lead_s}",
        "requeue": "",
        "account": cluster.account,
        "qos": cluster.qos,
        "exclude": ",".join(cluster.exclude) or None,
        "partition": cluster.partition,
        "constraint": cluster.constraint,
        **_node_options(cluster.nodes, cluster.gpus_per_node, cluster.cpus_per_node, cluster.memory_gb, cluster),
    }
    if len(job.runs) > 1:
        return options | {"array": f"0-{len(job.runs) - 1}"}
    # SLURM makes the components of a heterogeneous job wait for each other then, for ever.
    return options | {"dependency": None if cluster.rollout else "singleton"}


def _given(options: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}


def _rollout_options(job: Job) -> dict[str, str]:
    cluster, group = job.cluster, job.cluster.rollout
    assert group is not None
    options: dict[str, str | None] = {
        "partition": group.partition or cluster.partition,
        "constraint": group.constraint,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time_limit,
        "exclude": ",".join(cluster.exclude) or None,
        **_node_options(group.nodes, group.gpus_per_node, group.cpus_per_node, group.memory_gb, cluster),
    }
    return _given(options)


def _node_options(
    nodes: int, gpus: int, cpus: int | None, memory_gb: int | None, cluster: ClusterConfig
) -> dict[str, str | None]:
    gpu_type = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    return {
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cpus) if cpus else None,
        "gpus-per-node": f"{gpu_type}{gpus}" if gpus else None,
        "mem": None if memory_gb is None else f"{memory_gb}G" if memory_gb else "0",
        "exclusive": "" if cluster.exclusive else None,
    }


def _directives(options: Mapping[str, str]) -> str:
    lines = []
    for name, value in options.items():
        if not is_plain(name) or (value and not re.fullmatch(r"[A-Za-z0-9._+@:,/=&|*\[\]%-]+", value)):
            raise ConfigError(
                [
                    f"--{name}={value}: has a character that an #SBATCH line cannot hold; use letters, digits and "
                    "._-+@:,/ only, also in the names of directories"
                ]
            )
        lines.append(f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}")
    return "\n".join(lines)


def _srun_options(cluster: ClusterConfig) -> list[str]:
    if cluster.container is None:
        return []
    here = Path.cwd()
    return [
        f"--container-image={cluster.container.image}",
        f"--container-mounts={','.join([f'{here}:{here}', *cluster.container.mounts])}",
        f"--container-workdir={here}",
    ]


def slurm(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a command of SLURM; returns what it prints. Raises SlurmError."""
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on this machine: run this on a login node of the cluster")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, env=environment)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {_COMMAND_S:g} s; try again") from error
    if done.returncode:
        raise SlurmError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def submit(script: Path, dependency: str | None = None) -> str:
    """Hand the script to SLURM; returns the id of the job. `dependency`: in place of the script's.

    The environment that submits goes along (sbatch --export=ALL), without the marks of a job that it may be in.
    """
    options = [f"--dependency={dependency}"] if dependency else []
    marks = ("SLURM_", "SBATCH_", "SRUN_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(marks) or k == "SLURM_CONF"}
    return slurm("sbatch", "--parsable", *options, str(script), environment=environment).split(";")[0]
