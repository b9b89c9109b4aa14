"""Jobs on a real SLURM, with the real training: a node that is not well, a requeue in the middle with servers
on another node, a killed srun, a chain and an array. The nodes are daemons on this machine.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from drpo_megatron.models.recipes import ensure_model
from tests.slurm.cluster import Cluster, unpack_slurm
from tests.support.debian import Unavailable

pytestmark = [pytest.mark.server, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
LIMIT_S = 300
SMALL = (
    "tracking.wandb=false",
    "tracking.tensorboard=false",
    "training.export=false",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "save.every=1",
)


class Site:
    """The cluster, and `drpo` on its login node."""

    def __init__(self, cluster: Cluster, directory: Path, model: Path) -> None:
        self.cluster, self.directory, self.model = cluster, directory, model

    def drpo(self, *arguments: str) -> str:
        environment = self.cluster.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "drpo_megatron.cli", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, name: str, settings: tuple[str, ...], options: tuple[str, ...] = (), **cluster: Any) -> list[str]:
        """Returns the ids of the jobs."""
        raw = yaml.safe_load((ROOT / "configs" / "clusters" / "cpu.yaml").read_text()) | cluster
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        places = (f"name={name}", f"tracking.directory={self.directory}", f"model.path={self.model}")
        config = str(ROOT / "configs" / "quickstart.yaml")
        printed = self.drpo("submit", config, "--cluster", str(path), *options, *places, *SMALL, *settings)
        return [
            job.strip(",")
            for line in printed.splitlines()
            if line.startswith("job ")
            for job in line[4:].split(": ")[0].split(", ")
        ]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def state(self, job: str) -> str:
        words = self.cluster.run("scontrol", "-o", "show", "job", job).split()
        return next(word.split("=")[1] for word in words if word.startswith("JobState="))

    def log(self, name: str) -> str:
        path = self.directory / name / "slurm" / "job.log"
        return path.read_text() if path.exists() else ""

    def wait(self, condition: Callable[[], bool], name: str, what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            # Backfill, which alone starts heterogeneous jobs, looks once a minute where nothing changes.
            self.cluster.run("scontrol", "update", "NodeName=node1", f"Comment={time.monotonic():.0f}")
            if time.monotonic() > deadline:
                logs = [self.log(name), *(p.read_text()[-1500:] for p in (self.directory / name).rglob("*.log"))]
                pytest.fail("\n".join([f"waited in vain for {what}", *logs, self.cluster.run("squeue")]))
            time.sleep(0.5)

    def wait_for_end(self, job: str, name: str) -> str:
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait(lambda: self.state(job) in states, name, f"the end of job {job}")
        return self.state(job)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    # The sockets' paths must be short, and munge wants no directory above them that others may write to.
    with tempfile.TemporaryDirectory(prefix="drpo") as place:
        try:
            root = unpack_slurm(Path(place) / "packages")
        except Unavailable as reason:
            pytest.skip(str(reason))
        directory = tmp_path_factory.mktemp("runs")
        model = ensure_model("tiny_qwen3", directory / "model")
        with Cluster(root, Path(place) / "cluster") as cluster:
            yield Site(cluster, directory, model)


def test_a_bad_node_and_a_requeue_in_the_middle(site: Site) -> None:
    """Two nodes that train and one that serves, of four. The first fails its check: the job goes to the others, is told
    to stop in the middle, is queued again by itself, and ends with every step once.
    """
    layout = ("parallel.tensor=1", "parallel.data=2", "training.steps=40")
    group = {"nodes": 1, "gpus_per_node": 0, "cpus_per_node": 2}
    (job,) = site.submit("requeued", layout, rollout=group, check_command='[ "$SLURMD_NODENAME" != node1 ]')
    site.wait(lambda: len(site.metrics("requeued")) > 1, "requeued", "the second step")
    assert "NodeList=node[2-3]" in site.cluster.run("scontrol", "show", "job", job)
    key = site.directory / "requeued" / "slurm" / "api_key"
    assert key.stat().st_mode & 0o777 == 0o600 and re.fullmatch(r"[0-9a-f]{64}\n", key.read_text())
    config = yaml.safe_load((site.directory / "requeued" / "config.yaml").read_text())
    assert len(config["rollout"]["server"]["addresses"]) == 1
    assert job in site.drpo("status", str(site.directory / "requeued"))
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert site.wait_for_end(job, "requeued") == "COMPLETED", site.log("requeued")
    log = site.log("requeued")
    assert [step["step"] for step in site.metrics("requeued")] == list(range(40)), log
    assert "node node1 is not well: check_command ended with code 1" in log
    assert "requeued, 1 of 20: without node1" in log and "requeued, 2 of 20: stopped as it was told to, after" in log
    assert log.splitlines()[-1].endswith(" done")
    run = site.directory / "requeued"
    assert all((run / log / "torchrun-1.log").exists() for log in ("log", "log.1"))
    assert "checkpoints/step_000001" in (run / "log.1" / "rank_0.log").read_text()
    assert (
        "checkpoints/step_000001" not in (run / "log" / "rank_0.log").read_text()
    )  # it went on, and did not start anew
    assert key.read_text().strip() not in log
    _nothing_is_left(site)


def test_a_killed_srun_and_a_chain(site: Site) -> None:
    """A job of two nodes whose srun is killed ends at once, says so in its last line, and the next of the chain
    goes on.
    """
    settings = ("parallel.tensor=1", "parallel.data=2", "training.steps=40")
    first, second = site.submit("chained", settings, ("--chain", "2"))
    site.wait(lambda: len(site.metrics("chained")) > 1, "chained", "the second step")
    victims = [p for p in psutil.process_iter(["cmdline"]) if _is_srun_of(p, site, "train")]
    assert victims
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    assert site.wait_for_end(first, "chained") == "FAILED", site.log("chained")
    of_first = site.log("chained").split(f" job {second},")[0].splitlines()
    assert "failed: srun of the trainer ended with code 137" in of_first[-2]  # and -1 is the time of the next
    assert site.wait_for_end(second, "chained") == "COMPLETED", site.log("chained")
    assert [step["step"] for step in site.metrics("chained")] == list(range(40))
    _nothing_is_left(site)


def test_a_node_dies(site: Site) -> None:
    """One of two nodes that train is gone from one moment to the next: the run goes on on others."""
    settings = ("parallel.tensor=1", "parallel.data=2", "training.steps=40")
    (job,) = site.submit("bereft", settings)
    site.wait(lambda: len(site.metrics("bereft")) > 2, "bereft", "the third step")
    assert "NodeList=node[1-2]" in site.cluster.run("scontrol", "show", "job", job)
    done = len(site.metrics("bereft"))
    site.cluster.kill_node(2)
    assert site.wait_for_end(job, "bereft") == "COMPLETED", site.log("bereft")
    log = site.log("bereft")
    assert [step["step"] for step in site.metrics("bereft")] == list(range(40)), log
    of_second = log.split("restart 1, on ")[1].splitlines()
    assert "2" not in of_second[0], log
    went_on = re.findall(r"schedule of \S+/step_(\d+)", (site.directory / "bereft" / "log" / "rank_0.log").read_text())
    # A step's metrics are written while its checkpoint may still be on its way, and steps go on until the node is gone.
    assert len(went_on) == 1 and done - 1 <= int(went_on[0]) < 40, (done, went_on)
    _nothing_is_left(site)
    site.cluster.start_node(2)


def test_an_array(site: Site) -> None:
    """A run for each seed, in tasks of one job."""
    settings = ("parallel.tensor=1", "training.steps=2")
    jobs = site.submit("swept", settings, ("--sweep", "seed=3,4,5"), nodes=1)
    assert [job[-2:] for job in jobs] == ["_0", "_1", "_2"]
    for index, job in enumerate(jobs):
        name = f"swept-{index}"
        assert site.wait_for_end(job, name) == "COMPLETED", site.log(name)
        assert len(site.metrics(name)) == 2
        assert yaml.safe_load((site.directory / name / "config.yaml").read_text())["seed"] == 3 + index
    _nothing_is_left(site)


def test_cancel(site: Site) -> None:
    """A job that is cancelled does not come back, though its run saves when it is told to end."""
    (job,) = site.submit("cancelled", ("parallel.tensor=1", "training.steps=200"), nodes=1)
    site.wait(lambda: len(site.metrics("cancelled")) > 0, "cancelled", "the first step")
    run = str(site.directory / "cancelled")
    assert job in site.drpo("cancel", run)
    assert site.wait_for_end(job, "cancelled") == "CANCELLED"
    assert "cancelled" in site.drpo("status", run)
    assert "restart 0" in site.drpo("logs", run)
    _nothing_is_left(site)


def _is_srun_of(process: psutil.Process, site: Site, what: str) -> bool:
    line = process.info["cmdline"] or []
    return "launch.node" in line and what in line and Path(line[0]).name == "srun"


def _nothing_is_left(site: Site) -> None:
    """No process of a run lives once its job has ended."""
    mark = str(site.directory)

    def alive() -> list[str]:
        lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"]) if p.pid != os.getpid()]
        return [
            " ".join(line) for line in lines if any(mark in word for word in line) and "pytest" not in " ".join(line)
        ]

    deadline = time.monotonic() + LIMIT_S
    while left := alive():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
