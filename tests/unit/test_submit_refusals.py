"""Jobs that cannot run are refused by `drpo submit` on the login node: a sentence that says what to do, exit code 2,
and nothing written or submitted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.models.recipes import ensure_model
from launch import checks

ROOT = Path(__file__).parents[2]
CLUSTER: dict[str, Any] = {
    "partition": "h100",
    "time_limit": "04:00:00",
    "nodes": 2,
    "gpus_per_node": 8,
    "device": "h100",
}
GROUP = {"nodes": 1, "gpus_per_node": 8}
# Sixteen ranks on two nodes leave no GPU for the servers; eight do.
RUN = ("parallel.tensor=2", "parallel.data=4", "save.every=5")


@dataclass(frozen=True)
class Refusal:
    """`cluster` over CLUSTER without `missing`, `overrides` over quickstart.yaml and RUN, `options` of the command: the
    message has `words`.
    """

    name: str
    words: tuple[str, ...]
    cluster: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


REFUSALS = [
    # The cluster file
    Refusal("unknown key", ("partitoin", "did you mean 'partition'"), {"partitoin": "x"}),
    Refusal("no partition", ("partition: is required",), missing=("partition",)),
    Refusal("shell in the partition", ("partition", "does not match"), {"partition": "h100; rm -rf /"}),
    Refusal("shell in the account", ("account", "does not match"), {"account": "$(id)"}),
    Refusal("second line in the qos", ("qos", "does not match"), {"qos": "high\n#SBATCH --uid=0"}),
    Refusal("constraint with a blank", ("constraint", "does not match"), {"constraint": "a b"}),
    Refusal("time in words", ("time_limit", "does not match"), {"time_limit": "4 hours"}),
    Refusal("time as a number", ("time_limit", "string"), {"time_limit": 14400}),
    Refusal("no nodes", ("nodes", "greater than 0"), {"nodes": 0}),
    Refusal("short lead", ("signal_lead_s", "60"), {"signal_lead_s": 5}),
    Refusal("unknown device", ("device", "'h100'"), {"device": "h1000"}),
    Refusal("unknown key of a group", ("rollout.node", "did you mean 'nodes'"), {"rollout": {"node": 1}}),
    Refusal("device without GPUs", ("device: has no effect",), {"gpus_per_node": 0}),
    Refusal(
        "GPU type without GPUs", ("gpu_type: has no effect",), {"gpus_per_node": 0, "gpu_type": "h100", "device": None}
    ),
    Refusal("variable with a dash", ("environment.A-B",), {"environment": {"A-B": "1"}}),
    Refusal("variable of SLURM", ("environment.SLURM_JOB_ID",), {"environment": {"SLURM_JOB_ID": "1"}}),
    Refusal("NCCL twice", ("nccl.NCCL_DEBUG", "write DEBUG"), {"nccl": {"NCCL_DEBUG": "INFO"}}),
    Refusal("shell in a module", ("modules", "`id`"), {"modules": ["`id`"]}),
    Refusal("shell in a node", ("exclude", "n1;id"), {"exclude": ["n1;id"]}),
    Refusal("option that is ours", ("options.job-name", "decided by"), {"options": {"job-name": "x"}}),
    Refusal("option with dashes", ("options.--mail-type",), {"options": {"--mail-type": "FAIL"}}),
    Refusal("shell in an option", ("options.comment", "#SBATCH"), {"options": {"comment": "a; id"}}),
    # Layouts
    Refusal(
        "7 GPUs and TP 8",
        ("7 GPUs", "8 ranks of parallel.tensor"),
        {"gpus_per_node": 7, "nodes": 1},
        ("parallel.tensor=8",),
    ),
    Refusal("ranks over nodes", ("3 nodes", "8 ranks"), {"nodes": 3}),
    Refusal("tensor over nodes", ("groups of 2", "nodes of 1"), {"nodes": 8}),
    Refusal("more ranks than GPUs", ("16 ranks", "set nodes to 2"), {"nodes": 1}, ("parallel.data=8",)),
    Refusal("no GPU for the server", ("8 ranks and 1 GPUs", "rollout group"), {"nodes": 1}),
    Refusal(
        "colocated beside a group",
        ("rollout.placement: is colocated",),
        {"rollout": GROUP},
        ("rollout.placement=colocated",),
    ),
    Refusal(
        "colocated over nodes",
        ("4 servers of 2", "first node's 4 ranks"),
        {},
        ("rollout.placement=colocated", "rollout.server.count=4", "rollout.server.tensor_parallel=2"),
    ),
    Refusal(
        "server above its node",
        ("does not fit on 2",),
        {"rollout": {"nodes": 1, "gpus_per_node": 2}},
        ("rollout.server.tensor_parallel=4",),
    ),
    Refusal(
        "idle GPUs",
        ("leave 1 of 5",),
        {"rollout": {"nodes": 1, "gpus_per_node": 5}},
        ("rollout.server.tensor_parallel=2",),
    ),
    Refusal("group without GPUs", ("rollout.gpus_per_node: is 0",), {"rollout": {"nodes": 1, "gpus_per_node": 0}}),
    Refusal(
        "count beside a group",
        ("rollout.server.count: is 3", "8 servers"),
        {"rollout": GROUP},
        ("rollout.server.count=3",),
    ),
    Refusal(
        "addresses beside a group",
        ("remove one of them",),
        {"rollout": GROUP},
        ("rollout.server.addresses=[http://127.0.0.1:1]",),
    ),
    Refusal(
        "own key beside a group", ("makes a key of its own",), {"rollout": GROUP}, ("rollout.server.api_key_env=HOME",)
    ),
    Refusal(
        "shared memory between hosts",
        ("sync.transport: shared_memory",),
        {"rollout": GROUP},
        ("sync.transport=shared_memory",),
    ),
    Refusal("disk between hosts", ("sync.directory: is required",), {"rollout": GROUP}, ("sync.transport=disk",)),
    Refusal(
        "FP8 model before the trainer",
        ("fp8.rollout: servers of a rollout group",),
        {"rollout": GROUP},
        ("fp8.rollout=true", "model.dtype=bfloat16"),
    ),
    Refusal("heads over tensor", ("4 attention heads",), {"nodes": 1}, ("parallel.tensor=3", "parallel.data=1")),
    # Time, memory, paths
    Refusal("time for nothing", ("time_limit: 00:05:00 leaves no time",), {"time_limit": "00:05:00"}),
    Refusal("requeue without checkpoints", ("save.every: is null", "start anew"), {}, ("save.every=null",)),
    Refusal(
        "memory of the trainer",
        ("the trainer does not fit", "80 GB"),
        {},
        ("sync.bucket_mb=60000",),
    ),
    Refusal(
        "directory without permission",
        ("locked cannot be written to",),
        {},
        ("tracking.directory=locked/runs",),
    ),
    Refusal("directory that is a file", ("written to",), {}, ("tracking.directory=/etc/hostname/runs",)),
    Refusal("shell in a directory", ("tracking.directory", "#SBATCH line"), {}, ("tracking.directory=runs;id",)),
    Refusal("shell in a name", ("name", "does not match"), {}, ("name=$(id)",)),
    Refusal(
        "image that is not there", ("container.image: /no/image.sqsh",), {"container": {"image": "/no/image.sqsh"}}
    ),
    Refusal("shell in an image", ("container.image", "does not match"), {"container": {"image": "a b;id"}}),
    Refusal(
        "mount that is not there",
        ("container.mounts: /no/place",),
        {"container": {"image": "h#i:1", "mounts": ["/no/place:/x"]}},
    ),
    Refusal("model outside the container", ("model.path", "not in the container"), {"container": {"image": "h#i:1"}}),
    Refusal("model that is not there", ("model.path", "is not a directory"), {}, ("model.path=/no/model",)),
    # The command
    Refusal("sweep of nothing", ("--sweep", "seed=0,1,2"), {}, (), ("--sweep", "seed")),
    Refusal("sweep of an unknown key", ("sed: unknown key",), {}, (), ("--sweep", "sed=1,2")),
    Refusal(
        "sweep of a layout",
        ("3 ranks of parallel.tensor", "2 GPUs"),
        {"gpus_per_node": 2, "nodes": 4},
        (),
        ("--sweep", "parallel.tensor=1,3"),
    ),
    Refusal(
        "sweep of a heterogeneous job",
        ("no arrays of heterogeneous jobs",),
        {"rollout": GROUP},
        (),
        ("--sweep", "seed=1,2"),
    ),
    Refusal("chain of nothing", ("--chain",), {}, (), ("--chain", "0")),
    Refusal(
        "chain without checkpoints",
        ("save.every", "chain"),
        {"requeue_limit": 0},
        ("save.every=null",),
        ("--chain", "2"),
    ),
    Refusal("chain of a sweep", ("--chain", "--sweep"), {}, (), ("--chain", "2", "--sweep", "seed=1,2")),
    Refusal("no SLURM here", ("sbatch is not on this machine", "login node"), {}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_model("tiny_qwen3", tmp_path_factory.mktemp("models") / "tiny")


def submit(directory: Path, model: Path, refusal: Refusal, *options: str) -> None:
    raw = {key: value for key, value in (CLUSTER | dict(refusal.cluster)).items() if key not in refusal.missing}
    path = directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(raw))
    config = str(ROOT / "configs" / "quickstart.yaml")
    places = [f"model.path={model}", "model.recipe=null", f"tracking.directory={directory / 'runs'}"]
    overrides = [*places, *RUN, *refusal.overrides]
    cli.main(["submit", config, "--cluster", str(path), *refusal.options, *options, *overrides])


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: r.name)
def test_refused(
    refusal: Refusal,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    Path("locked").mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))  # for root
    with pytest.raises(SystemExit) as exit_info:
        submit(tmp_path, model, refusal)
    message = capsys.readouterr().err
    assert exit_info.value.code == EXIT_REFUSED, message
    assert all(word in message for word in refusal.words), message
    assert "\ndrpo: " in f"\n{message}" and "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_the_base_of_all_refusals_is_accepted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as exit_info:
        submit(tmp_path, model, Refusal("none", ()), "--dry-run")
    printed = capsys.readouterr()
    assert exit_info.value.code == 0, printed.err
    assert "#SBATCH --partition=h100" in printed.out and "#SBATCH --gpus-per-node=8" in printed.out


PARTITION = "PartitionName=h100 AllowQos=high MaxTime=02:00:00 TotalNodes=1 State=UP"


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"partition": "h200"}, ("SLURM has no h200", "cpu, h100")),
        ({}, ("nodes: 2 is more than the 1 nodes of partition h100",)),
        ({}, ("time_limit: 04:00:00 is above the 02:00:00",)),
        ({"qos": "low"}, ("partition h100 does not take low", "high")),
        ({"qos": "low"}, ("SLURM has no low; it has normal, high",)),
    ],
)
def test_what_slurm_knows(
    cluster: dict[str, Any], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that answer as SLURM's do."""
    answers = {
        "scontrol": f'[ "$4" = h100 ] && echo "{PARTITION}" || {{ echo "Partition $4 not found" >&2; exit 1; }}',
        "sinfo": "printf 'h100*\\ncpu\\n'",
        "sacctmgr": "printf 'normal\\nhigh\\n'",
    }
    for name, script in answers.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = "\n".join(checks.slurm_problems(checks.ClusterConfig.model_validate(CLUSTER | cluster)))
    assert all(word in found for word in words), found


def test_there_are_forty() -> None:
    assert len({json.dumps([r.cluster, r.overrides, r.options, r.missing], default=str) for r in REFUSALS}) >= 40
