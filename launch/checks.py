"""What a login node can find in a job before it waits in a queue. Each function yields one line a problem:
`setting: problem; what to do`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from drpo_megatron.config import ConfigError, RunConfig, check_config
from drpo_megatron.config.schema import FileData
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.advice import verdicts
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import DEVICES
from drpo_megatron.plan.run_plan import make_plan
from drpo_megatron.platform import as_seen_on
from launch.cluster import ClusterConfig, is_plain, is_variable
from launch.node import KEY_VARIABLE, with_servers
from launch.slurm import Job, SlurmError, own_options, slurm

_CAPABILITY = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}


def check_job(job: Job) -> None:
    """Raise ConfigError with every problem. Memory and SLURM are asked when there is none before."""
    cluster = job.cluster
    problems = [*cluster_problems(cluster), *option_problems(job)]
    for run in job.runs:
        problems += layout_problems(run, cluster)
        problems += rollout_group_problems(run, cluster)
        problems += time_problems(run, cluster)
        problems += path_problems(run, cluster)
        problems += run_problems(run, cluster)
    if not problems:
        problems += [problem for run in job.runs for problem in plan_problems(run, cluster)]
        problems += slurm_problems(cluster)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def cluster_problems(cluster: ClusterConfig) -> Iterator[str]:
    """The cluster file against itself."""
    for name in cluster.environment:
        if not is_variable(name) or name.startswith("SLURM_"):
            yield f"environment.{name}: is not a variable that a job can set; use another name"
    for name in cluster.nccl:
        if name.startswith("NCCL_"):
            yield f"nccl.{name}: is written without NCCL_ here; write {name.removeprefix('NCCL_')}"
        elif not is_variable(name):
            yield f"nccl.{name}: is not the name of a variable; correct it"
    for name in cluster.exclude:
        if not is_plain(name):
            yield f"exclude: {name!r} is not the name of a node; correct it"
    for module in cluster.modules:
        if not is_plain(module):
            yield f"modules: {module!r} is not the name of a module; correct it"
    if cluster.gpu_type and not cluster.gpus_per_node:
        yield "gpu_type: has no effect with gpus_per_node = 0; remove one of them"
    if cluster.device and not cluster.gpus_per_node:
        yield "device: has no effect with gpus_per_node = 0; remove one of them"
    if cluster.rollout and bool(cluster.rollout.gpus_per_node) != bool(cluster.gpus_per_node):
        yield (
            f"rollout.gpus_per_node: is {cluster.rollout.gpus_per_node} where the trainer's nodes have "
            f"{cluster.gpus_per_node}: weights go between GPUs, or between hosts without; give both GPUs, or neither"
        )


def option_problems(job: Job) -> Iterator[str]:
    """Further options of sbatch."""
    own = {*own_options(job), "array", "dependency", "error", "no-requeue", "ntasks", "chdir", "wrap", "parsable"}
    for name, value in job.cluster.options.items():
        if name in own:
            yield f"options.{name}: is decided by `drpo submit`; remove it, and use the setting of that purpose"
        elif not re.fullmatch(r"[a-z][a-z-]*", name):
            yield f"options.{name}: is not a long name of an option of sbatch without its dashes; correct it"
        elif value and not is_plain(value):
            yield (
                f"options.{name}: {value!r} has a character that an #SBATCH line cannot hold; use letters, digits and "
                "._-+@:,/="
            )


def layout_problems(run: RunConfig, cluster: ClusterConfig) -> Iterator[str]:
    """Ranks and servers over nodes and GPUs."""
    try:
        layout = run.layout
    except ValueError:
        return  # one of run_problems
    server, gpus = run.rollout.server, cluster.gpus_per_node
    if layout.world_size % cluster.nodes:
        yield (
            f"nodes: {cluster.nodes} nodes do not share the layout's {layout.world_size} ranks (tensor × pipeline × "
            "context × data) equally; change nodes, or parallel.data"
        )
        return
    ranks = layout.world_size // cluster.nodes
    if gpus and layout.tensor > gpus:
        yield (
            f"gpus_per_node: a node has {gpus} GPUs, and the {layout.tensor} ranks of parallel.tensor must be on one; "
            "lower parallel.tensor"
        )
    elif ranks % layout.tensor:
        yield (
            f"parallel.tensor: groups of {layout.tensor} ranks do not fit whole into nodes of {ranks} ranks; choose a "
            "divisor, or other nodes"
        )
    elif gpus and ranks > gpus:
        yield (
            f"nodes: {layout.world_size} ranks on {cluster.nodes} nodes are {ranks} a node, which has {gpus} GPUs; set "
            f"nodes to {-(-layout.world_size // gpus)} or more"
        )
    if cluster.rollout or server.addresses or not gpus or ranks > gpus:
        return
    serving = server.count * server.tensor_parallel
    if run.rollout.placement == "colocated":
        if serving > ranks:
            yield (
                f"rollout.server.count: {server.count} servers of {server.tensor_parallel} GPUs share those of the "
                f"first node's {ranks} ranks; lower it, or give the cluster file a rollout group"
            )
    elif ranks + serving > gpus:
        yield (
            f"gpus_per_node: the first node's {ranks} ranks and {serving} GPUs of servers are more than its {gpus}; "
            "use more nodes, a rollout group in the cluster file, or rollout.placement=colocated"
        )


def rollout_group_problems(run: RunConfig, cluster: ClusterConfig) -> Iterator[str]:
    """A heterogeneous job."""
    group, server = cluster.rollout, run.rollout.server
    if group is None:
        return
    size = server.tensor_parallel
    if group.gpus_per_node and group.gpus_per_node < size:
        yield (
            f"rollout.gpus_per_node: a server of rollout.server.tensor_parallel = {size} does not fit on "
            f"{group.gpus_per_node} GPUs; raise the first or lower the second"
        )
    elif group.gpus_per_node % size:
        yield (
            f"rollout.gpus_per_node: servers of {size} GPUs leave {group.gpus_per_node % size} of "
            f"{group.gpus_per_node} idle on each node; choose a multiple"
        )
    if server.addresses:
        yield "rollout.server.addresses: names servers, and the cluster file starts some; remove one of them"
    if server.count > 1:
        yield (
            f"rollout.server.count: is {server.count}, and the cluster file's rollout group decides it: "
            f"{group.nodes * cluster.servers(size)} servers; remove it"
        )
    if server.api_key_env is not None:
        yield "rollout.server.api_key_env: the job makes a key of its own for its servers; remove it"
    if run.rollout.placement == "colocated":
        yield (
            "rollout.placement: is colocated, and the cluster file gives the servers nodes of their own; remove one of "
            "them"
        )
    if run.fp8.rollout:
        yield (
            "fp8.rollout: servers of a rollout group start before the trainer writes their FP8 model; set it to false, "
            "or remove the rollout group"
        )


def time_problems(run: RunConfig, cluster: ClusterConfig) -> Iterator[str]:
    if cluster.seconds <= cluster.signal_lead_s + 60:
        yield (
            f"time_limit: {cluster.time_limit} leaves no time before the signal to save, signal_lead_s = "
            f"{cluster.signal_lead_s} s; raise the first or lower the second"
        )
    if run.save.every is None and cluster.requeue_limit:
        yield (
            "save.every: is null, and a run that is requeued would start anew; set it, or requeue_limit of the cluster "
            "file to 0"
        )


def path_problems(run: RunConfig, cluster: ClusterConfig) -> Iterator[str]:
    directory = run.run_directory.absolute()
    if not is_plain(str(directory).lstrip("/")):
        yield (
            f"tracking.directory: {directory} has a character that an #SBATCH line cannot hold; choose a path of "
            "letters, digits and ._-+@:,/="
        )
    parent = directory
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        yield (
            f"tracking.directory: {parent} cannot be written to by you; choose another, on a file system that "
            "the nodes share"
        )
    container = cluster.container
    if container is None:
        return
    if container.image.startswith(("/", ".")) and not Path(container.image).is_file():
        yield f"container.image: {container.image} does not exist; give the path of a squashfs file, or HOST#NAME:TAG"
    mounted = [Path.cwd()]
    for mount in container.mounts:
        source = Path(mount.split(":")[0])
        if ":" not in mount or any(c in mount for c in ", "):
            yield f"container.mounts: {mount!r} is not HOST_PATH:PATH; correct it"
        elif not source.exists():
            yield f"container.mounts: {source} does not exist; correct it, or remove the mount"
        elif mount.split(":")[1] == str(source):
            mounted.append(source)
    needed = {"model.path": run.model.path, "tracking.directory": directory, "save.directory": run.save.directory}
    if isinstance(run.data.source, FileData):
        needed["data.source.path"] = run.data.source.path
    for setting, path in needed.items():
        if path is not None and not any(path.absolute().is_relative_to(place) for place in mounted):
            yield f"{setting}: {path} is not in the container; mount a directory above it in container.mounts"


def run_problems(run: RunConfig, cluster: ClusterConfig) -> Iterator[str]:
    """What `drpo train` would refuse on a node of the cluster."""
    known = os.environ.get(KEY_VARIABLE)
    if cluster.rollout:
        run = with_servers(run, ["http://a.node.of.the.job:1"], "a.node.of.the.job")
        os.environ[KEY_VARIABLE] = "made when it is submitted"
    capability = _CAPABILITY[cluster.device or "h100"] if cluster.gpus_per_node else None
    try:
        with as_seen_on(capability):
            check_config(run)
    except ConfigError as error:
        for problem in error.problems:
            if cluster.container is None or "which is not installed" not in problem:
                yield problem
    finally:
        if cluster.rollout and known is None:
            del os.environ[KEY_VARIABLE]


def plan_problems(run: RunConfig, cluster: ClusterConfig) -> Iterator[str]:
    """Memory, where the cluster file says what the GPUs are."""
    if cluster.device is None:
        return
    hf = HFModelConfig.load(run.model.path)
    plan = make_plan(run, hf, DEVICES[cluster.device], Assumptions.of(run))
    for fits, sentence in zip((plan.trainer_fits, plan.server_fits), verdicts(plan, hf), strict=True):
        if not fits:
            yield f"device: {sentence}"


def slurm_problems(cluster: ClusterConfig) -> Iterator[str]:
    """What SLURM says of partition, QoS and time, where it is on this machine."""
    if shutil.which("scontrol") is None:
        return
    groups = [(cluster.partition, "nodes", cluster.nodes)]
    if cluster.rollout:
        groups.append((cluster.rollout.partition or cluster.partition, "rollout.nodes", cluster.rollout.nodes))
    for partition, setting, nodes in groups:
        try:
            described = slurm("scontrol", "-o", "show", "partition", partition)
        except SlurmError:
            yield f"partition: SLURM has no {partition}; it has {', '.join(_partitions())}"
            continue
        fields = dict(word.split("=", 1) for word in described.split() if "=" in word)
        if fields["TotalNodes"].isdigit() and nodes > int(fields["TotalNodes"]):
            yield f"{setting}: {nodes} is more than the {fields['TotalNodes']} nodes of partition {partition}; lower it"
        longest = _seconds(fields["MaxTime"])
        if longest is not None and cluster.seconds > longest:
            yield (
                f"time_limit: {cluster.time_limit} is above the {fields['MaxTime']} of partition {partition}; lower "
                "it, and let the job be requeued, or use --chain"
            )
        allowed = fields.get("AllowQos", "ALL")
        if cluster.qos and allowed not in ("ALL", "N/A") and cluster.qos not in allowed.split(","):
            yield f"qos: partition {partition} does not take {cluster.qos}; it takes {allowed}"
    yield from _qos_problems(cluster)


def _partitions() -> list[str]:
    return sorted({line.rstrip("*") for line in slurm("sinfo", "-h", "-o", "%P").split()})


def _qos_problems(cluster: ClusterConfig) -> Iterator[str]:
    """The names are in SLURM's accounting, which a cluster may lack."""
    if cluster.qos is None or shutil.which("sacctmgr") is None:
        return
    try:
        names = slurm("sacctmgr", "-n", "-P", "show", "qos", "format=name").split()
    except SlurmError:
        return
    if names and cluster.qos not in names:
        yield f"qos: SLURM has no {cluster.qos}; it has {', '.join(names)}"


def _seconds(limit: str) -> int | None:
    """Of SLURM's [DAYS-]HOURS:MINUTES:SECONDS; None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
