"""What the job's script does with what its steps leave behind, run by bash with stand-ins for srun and scontrol.

With SLURM itself: tests/slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from drpo_megatron.config import load_config
from launch.cluster import ClusterConfig
from launch.slurm import Job, render

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0
_SRUN = """#!/bin/bash
what="${@: -1}"
echo "$*" >>"$CALLS"
case $what in %s esac
"""
_SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
case "$*" in
  *"show hostnames"*) echo "${@: -1}" ;;
  *"show node"*) echo "NodeName=n1 Arch=x NodeAddr=10.0.0.1 NodeHostName=n1 OS=y" ;;
  *"show job"*) echo "JobId=7 JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
esac
"""


@dataclass
class Outcome:
    code: int
    log: list[str]
    calls: str
    path: Path
    session: int

    def read_at_the_end(self) -> str:
        """The log, once nothing of the script lives that could write into it."""
        deadline = time.monotonic() + LIMIT_S
        while any(_session(pid) == self.session for pid in psutil.pids()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.path.read_text()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.fixture
def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the script with a bash `case` of what each step does; $A is the attempt's directory."""

    def run(
        steps: str, *, chained: bool = False, told: bool = False, job_state: str = "RUNNING", **cluster: Any
    ) -> Outcome:
        config = load_config(ROOT / "configs" / "quickstart.yaml", [f"tracking.directory={tmp_path}", "name=run"])
        state = tmp_path / "run" / "slurm"
        state.mkdir(parents=True, exist_ok=True)
        settings = ClusterConfig.model_validate(
            {"partition": "all", "time_limit": "01:00:00", "requeue_limit": 2} | cluster
        )
        (state / "job.sbatch").write_text(render(Job([config], settings, chained=chained)))
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        scripts = {
            "srun": _SRUN % steps.replace("$A", "$DRPO_ATTEMPT"),
            "scontrol": _SCONTROL,
            "sleep": "#!/bin/bash\nexit 75\n",
        }
        for name, text in scripts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "CALLS": str(tmp_path / "calls")}
        if settings.rollout:
            of_groups = {f"SLURM_JOB_NODELIST_HET_GROUP_{g}": f"n{g}" for g in (0, 1)}
            of_groups |= {f"SLURM_JOB_ID_HET_GROUP_{g}": str(7 + g) for g in (0, 1)}
            variables |= of_groups | {"SLURM_HET_SIZE": "2"}
        environment = os.environ | variables | {"PATH": f"{tools}:{os.environ['PATH']}", "JOB_STATE": job_state}
        process = subprocess.Popen(["bash", str(state / "job.sbatch")], env=environment, start_new_session=True)
        try:
            if told:
                (tmp_path / "training").unlink(missing_ok=True)
                deadline = time.monotonic() + LIMIT_S
                while not (tmp_path / "training").exists():
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
                process.send_signal(signal.SIGUSR1)
            code = process.wait(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        calls = tmp_path / "calls"
        log = state / "job.log"
        return Outcome(
            code, log.read_text().splitlines(), calls.read_text() if calls.exists() else "", log, process.pid
        )

    return run


Run = Callable[..., Outcome]


def test_done_and_nothing_left_to_do(run_script: Run) -> None:
    done = run_script("train) touch $A/done ;;")
    assert done.code == 0 and done.log[-1].endswith(" done")
    assert "--nodes=1 --ntasks=1" in done.calls and "requeue" not in done.calls
    again = run_script("*) exit 9 ;;")
    assert again.code == 0 and "nothing is left for job 7" in again.log[-1]


def test_the_first_cause_is_in_the_last_line(run_script: Run) -> None:
    failed = run_script("train) echo 'n1: rank 3: it broke' >$A/cause; exit 1 ;;")
    assert failed.code == 1 and "requeue" not in failed.calls
    assert failed.log[-1].strip().endswith(" failed: srun of the trainer ended with code 1: n1: rank 3: it broke")


def test_servers_that_end_take_the_trainer_along(run_script: Run) -> None:
    """The trainer would wait for them; its srun is ended and says no more."""
    late = "for i in $(seq 20); do command -p sleep 0.1; done; echo late"
    steps = f"serve) echo 'n1: no server' >$A/cause; exit 3 ;; train) {late} ;;"
    failed = run_script(steps, rollout={"nodes": 1})
    assert "late" not in failed.read_at_the_end()
    assert failed.code == 1 and "srun of the servers ended with code 3: n1: no server" in failed.log[-1]
    assert "--het-group=1" in failed.calls and "--het-group=0" in failed.calls


def test_a_bad_node_is_excluded_in_every_component(run_script: Run) -> None:
    steps = "check) mkdir -p $A/bad; echo 'it has 7 GPUs of 8' >$A/bad/n1; exit 1 ;;"
    queued = run_script(steps, rollout={"nodes": 1}, exclude=["n9"])
    assert queued.code == 75
    assert any("node n1 is not well: it has 7 GPUs of 8" in line for line in queued.log)
    assert "requeued, 1 of 2: without n1" in queued.log[-1]
    calls = queued.calls.splitlines()
    requeue = calls.index("scontrol requeue 7")
    assert calls[requeue + 1 :] == [f"scontrol update JobId={job} ExcNodeList=n1,n9" for job in (7, 8)]
    assert "train" not in queued.calls


@pytest.mark.parametrize("what", ["train", "check"])
def test_a_node_that_died(run_script: Run, what: str) -> None:
    """It takes the run with it, which goes on without it. The other one answers."""
    lost = 'true) [[ "$*" == *--het-group=0* ]] ;;'
    queued = run_script(f"{what}) exit 1 ;; {lost}", rollout={"nodes": 1})
    assert queued.code == 75 and "requeued, 1 of 2: without n1, which no longer answers; " in queued.log[-1]
    assert "ExcNodeList=n1" in queued.calls.splitlines()[-1]


def test_a_look_that_fails_without_a_bad_node(run_script: Run) -> None:
    failed = run_script("reach) exit 4 ;;")
    assert failed.code == 1 and "the reach of the nodes ended with code 4" in failed.log[-1]


def test_the_time_limit(run_script: Run, tmp_path: Path) -> None:
    """USR1 reaches the trainer's srun, which goes on; then the job is queued again, as often as the limit says."""
    wait = f"touch {tmp_path}/training; for i in $(seq 3000); do command -p sleep 0.1; done"
    steps = f"train) trap 'echo saved >$A/again; exit 0' USR1; {wait}; exit 5 ;;"
    for number in (1, 2):
        queued = run_script(steps, told=True)
        assert queued.code == 75 and f"requeued, {number} of 2: saved" in queued.log[-1]
    refused = run_script(steps, told=True)
    assert refused.code == 1 and "requeue_limit = 2 is used up; saved" in refused.log[-1]
    assert refused.calls.count("scontrol requeue 7") == 2


def test_a_link_of_a_chain_leaves_it_to_the_next(run_script: Run) -> None:
    stopped = run_script("train) echo saved >$A/again ;;", chained=True)
    assert stopped.code == 75 and "requeue" not in stopped.calls
    assert stopped.log[-1].endswith("the next job of the chain goes on: saved")


def test_a_cancelled_run_does_not_come_back(run_script: Run, tmp_path: Path) -> None:
    ended = run_script(f"train) touch {tmp_path}/run/slurm/cancelled; echo saved >$A/again ;;")
    assert ended.code == 1 and "requeue" not in ended.calls and "cancelled" in ended.log[-1]


def test_a_job_that_was_ended_from_outside_does_not_come_back(run_script: Run) -> None:
    ended = run_script("train) echo saved >$A/again ;;", job_state="CANCELLED")
    assert ended.code == 1 and "scontrol requeue" not in ended.calls and "ended from outside; saved" in ended.log[-1]
