"""The script of a job, how its nodes speak, and what is said about jobs: without SLURM."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config import RunConfig, load_config
from drpo_megatron.platform.layout import ParallelLayout
from launch import jobs, local
from launch.checks import (
    cluster_problems,
    layout_problems,
    option_problems,
    rollout_group_problems,
    time_problems,
)
from launch.cluster import ClusterConfig, load_cluster
from launch.node import KEY_VARIABLE, Node, train, with_servers
from launch.preflight import Report, node_problems, strangers
from launch.slurm import TEMPLATE, Job, render

ROOT = Path(__file__).parents[2]
NASTY = """a 'b' "c" $(touch pwned) `touch pwned` ; touch pwned # \\ ü"""


def cluster(**settings: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"partition": "all", "time_limit": "1-02:03:04"} | settings)


def run(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml", overrides)


def test_values_arrive_in_the_script_as_they_are(tmp_path: Path) -> None:
    """bash runs the rendered assignments: every value is what it was, and nothing in one is executed."""
    script = render(Job([run()], cluster(environment={"NASTY": NASTY}, nccl={"IB_HCA": NASTY}, modules=["cuda/13"])))
    assert "{{" not in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    exports = "\n".join(line for line in script.splitlines() if line.startswith("export NASTY") or "NCCL_" in line)
    command = f'{exports}\nprintf \'%s\\n%s\' "$NASTY" "$NCCL_IB_HCA"'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [NASTY, NASTY]
    assert not list(tmp_path.iterdir())
    assert "module load cuda/13" in script


def test_placeholders_of_the_template_are_those_that_are_given() -> None:
    """A forgotten one is a KeyError in `render`; one too many would be dead."""
    wanted = set(re.findall(r"\{\{(\w+)\}\}", TEMPLATE.read_text()))
    assert {"directives", "workdir", "runs", "python", "environment", "modules", "job_ids", "cpus"} <= wanted


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_directives_of_one_component() -> None:
    lines = directives(
        render(Job([run("name=x")], cluster(nodes=4, gpu_type="h100", memory_gb=0, exclude=["n1", "n2"])))
    )
    expected = (
        "--job-name=drpo-x",
        "--dependency=singleton",
        "--nodes=4",
        "--gpus-per-node=h100:8",
        "--mem=0",
        "--requeue",
    )
    assert set(expected) <= set(lines)
    assert "--signal=B:USR1@300" in lines and "--exclude=n1,n2" in lines and "hetjob" not in lines


def test_directives_of_two_components() -> None:
    """Not a singleton: the components have one name, and each would wait for the other."""
    lines = directives(render(Job([run()], cluster(rollout={"nodes": 3, "gpus_per_node": 4}))))
    middle = lines.index("hetjob")
    assert "--nodes=3" in lines[middle:] and "--gpus-per-node=4" in lines[middle:]
    assert not any("dependency" in line for line in lines)


def test_directives_of_an_array() -> None:
    script = render(Job([run("name=a"), run("name=b")], cluster()))
    assert "--array=0-1" in directives(script) and "/a " in script and "/b)" in script


def test_time_limit() -> None:
    assert cluster().seconds == ((24 + 2) * 60 + 3) * 60 + 4


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "clusters").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_cluster_file_loads(path: Path) -> None:
    assert load_cluster(path).seconds > 0


def test_ranks_follow_the_nodes() -> None:
    """One node keeps the launch that it has alone; several have fixed numbers."""
    layout = ParallelLayout(tensor=2, data=4)
    assert local.Place().torchrun(layout) == ["--standalone", "--nproc-per-node=8"]
    words = local.Place(4, 3, "10.0.0.1", 1234).torchrun(layout)
    assert words == [
        *("--nnodes=4", "--node-rank=3", "--master-addr=10.0.0.1", "--master-port=1234"),
        "--nproc-per-node=2",
    ]


def test_a_run_with_a_rollout_group() -> None:
    config = with_servers(run("rollout.server.port=30000"), ["http://10.0.0.2:1"], "10.0.0.1")
    server = config.rollout.server
    assert (server.addresses, server.api_key_env, server.port) == (["http://10.0.0.2:1"], KEY_VARIABLE, None)
    assert config.sync.address == "10.0.0.1"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node("n2", 1, {"n1": "10.0.0.1", "n2": "10.0.0.2"}, tmp_path, tmp_path)


def test_files_between_nodes(node: Node) -> None:
    """Complete or absent; the first cause stays; who waits in vain says for what."""
    with pytest.raises(TimeoutError, match=r"n2 waited 0 s in vain for the first node, n1"):
        node.meeting_point("train", 0)
    replace(node, name="n1", index=0, addresses={"n1": "127.0.0.1"}).meeting_point("train", 1)
    address, port = node.meeting_point("train", 1)
    assert address == "127.0.0.1" and port > 0
    node.outcome("cause", "it broke")
    node.outcome("cause", "because of that, this broke")
    assert (node.attempt / "cause").read_text() == "it broke\n"
    assert sorted(path.name for path in node.attempt.iterdir()) == ["cause", "meet-train.json"]


def test_a_node_that_is_not_well(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = node.attempt / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6; do echo GPU $i: H100; done\n")
    (tools / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    settings = {"check_command": "echo ECC errors >&2; exit 3", "min_free_disk_gb": 1e9}
    found = "\n".join(node_problems(node, cluster(**settings)))
    assert "it has 7 GPUs of 8" in found
    assert "check_command ended with code 3: ECC errors" in found
    assert "below min_free_disk_gb" in found
    assert list(node_problems(node, cluster(gpus_per_node=7, min_free_disk_gb=0))) == []


def test_a_node_that_is_not_like_the_others() -> None:
    same = {"torch": "2.14.1", "sglang": "0.5.23"}
    reports = {name: Report(1000.0 + i / 10, same) for i, name in enumerate("abcd")}
    assert strangers(reports, 5.0) == {}
    reports |= {"b": Report(1000.0, same | {"torch": "2.13.0"}), "d": Report(940.0, same)}
    found = strangers(reports, 5.0)
    assert found.keys() == {"b", "d"}
    assert "torch 2.13.0 where others have 2.14.1" in found["b"] and "-60.0 s" in found["d"]


JOB_LINE = (
    "JobId={job} JobName=drpo-x JobState={state} Reason=None Restarts=1 TimeLimit=01:00:00 NodeList=n[1-2] ExitCode=0:0"
)


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with two jobs; commands that answer as SLURM's do. 7 runs, 8 is forgotten."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / jobs.RECORD).write_text(json.dumps({"jobs": ["7", "8"]}))
    (tmp_path / "slurm" / "job.log").write_text("one\ntwo\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "reward/mean": 0.5}) + "\n")
    running = JOB_LINE.format(job=7, state="RUNNING")
    unknown = "slurm_load_jobs error: Invalid job id specified"
    tools = {
        "scontrol": f"""[ "$4" = 7 ] && echo "{running}" || {{ echo "{unknown}" >&2; exit 1; }}""",
        "sacct": "echo COMPLETED",
        "scancel": f'echo "$@" > {tmp_path}/scancelled',
    }
    for name, script in tools.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def test_status(submitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.status(argparse.Namespace(run=submitted))
    printed = capsys.readouterr().out
    assert "job 7: running, nodes n[1-2], limit 01:00:00, restarts 1" in printed
    assert "job 8: completed" in printed
    assert "steps done: 5, reward 0.500" in printed and "log: two" in printed


def test_cancel(submitted: Path) -> None:
    """Jobs that have ended are left alone, and the mark is there before scancel."""
    jobs.cancel(argparse.Namespace(run=submitted))
    assert (submitted / "scancelled").read_text() == "7\n"
    assert (submitted / "slurm" / "cancelled").exists()


def test_a_directory_without_a_job(tmp_path: Path) -> None:
    assert jobs.active_jobs(tmp_path) == []
    with pytest.raises(ValueError, match="drpo submit"):
        jobs.status(argparse.Namespace(run=tmp_path))


def test_the_example_takes_a_70b_model() -> None:
    """The cluster file in the documentation's first command, without the files that it names."""
    config, example = run70b(), load_cluster(ROOT / "configs" / "clusters" / "example.yaml")
    problems = [*layout_problems(config, example), *rollout_group_problems(config, example)]
    problems += [*time_problems(config, example), *cluster_problems(example), *option_problems(Job([config], example))]
    assert problems == []
    assert example.servers(config.rollout.server.tensor_parallel) == 1


def run70b() -> RunConfig:
    return load_config(ROOT / "configs" / "llama3-70b.yaml", ["save.every=10"])


@pytest.mark.parametrize(
    ("index", "code", "records", "outcome", "returned"),
    [
        (0, 0, {}, ("done", "done"), 0),
        (1, 0, {}, None, 0),
        (0, 130, {"stopped.txt": "stopped after 3 steps"}, ("again", "stopped after 3 steps"), 0),
        (1, 130, {}, None, 0),
        (0, 130, {}, ("cause", "n1: torchrun ended with code 130"), 1),
        (1, 1, {"error_rank_3.txt": "ValueError: no"}, ("cause", "n2: rank 3: ValueError: no"), 1),
        (1, 1, {}, ("cause", "n2: torchrun ended with code 1"), 1),
        (0, 1, {"error_rank_0.txt": "Stalled: step 3\nexit code 75: a scheduler may"}, ("again", "Stalled: step 3"), 1),
    ],
)
def test_what_became_of_the_run(
    index: int,
    code: int,
    records: dict[str, str],
    outcome: tuple[str, str] | None,
    returned: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the exit code of this node's torchrun, and the records that ranks left; the first node answers for the run."""
    config = run(f"tracking.directory={tmp_path}", "save.every=1", "save.resume=true")
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    names = {"n1": "127.0.0.1", "n2": "127.0.0.1"}
    here = Node(list(names)[index], index, names, config.run_directory, attempt)
    if index:
        replace(here, index=0).publish("meet-train.json", ["127.0.0.1", 1])
        (config.run_directory / "log").mkdir(parents=True)

    def ranks(config: RunConfig, layout: ParallelLayout, place: local.Place) -> int:
        assert (place.nodes, place.index) == (2, index)
        for name, text in records.items():
            (config.run_directory / "log" / name).write_text(text + "\n")
        return code

    monkeypatch.setattr(local, "run", ranks)
    previous = signal.getsignal(signal.SIGUSR1)
    try:
        assert train(here, config, cluster(nodes=2)) == returned
    finally:
        signal.signal(signal.SIGUSR1, previous)
    written = {path.name: path.read_text().strip() for path in attempt.iterdir() if path.suffix != ".json"}
    assert written == (dict([outcome]) if outcome else {})


def test_nodes_are_numbered_as_slurm_numbers_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol show node` lists them in another order than SLURM_NODEID counts."""
    variables = {"DRPO_ADDRESSES": "n1=10.0.0.1 n2=10.0.0.2 ", "DRPO_NODES": "n2 n1 ", "SLURMD_NODENAME": "n1"}
    variables |= {"SLURM_NODEID": "1", "DRPO_RUN": str(tmp_path), "DRPO_ATTEMPT": str(tmp_path)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    here = Node.here()
    assert here.names[here.index] == here.name == "n1" and here.address == "10.0.0.1"
