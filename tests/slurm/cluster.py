"""A real SLURM of four nodes on this machine: its own munge, controller and daemons, in a directory of its own.

Nothing is installed and root is not needed: Debian's packages are downloaded with apt and unpacked. The nodes have no
GPUs.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from drpo_megatron.platform.ports import free_port
from drpo_megatron.platform.process import killed_with_parent
from tests.support.debian import unpack_packages

NODES, CPUS, MEMORY_MB = 4, 16, 8000
_PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "libmunge2")
_LIBRARIES = ("usr/lib/x86_64-linux-gnu/slurm-wlm", "usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
START_LIMIT_S = 300.0
"""For daemons to come up: generous, because the machine may be busy with something else."""


def unpack_slurm(directory: Path) -> Path:
    """SLURM's packages with what they need, below `directory`. Raises Unavailable."""
    return unpack_packages(_PACKAGES, directory)


def _free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port("127.0.0.1"))
    return sorted(found)


def _node_of(process: psutil.Process) -> str | None:
    """The node that a job's process runs on."""
    try:
        return process.environ().get("SLURMD_NODENAME")
    except psutil.Error:
        return None


class Cluster:
    """Context manager: entering starts the daemons and waits for all nodes; leaving cancels all jobs and ends every
    process that was started.
    """

    def __init__(self, root: Path, directory: Path) -> None:
        self._root, self._directory = root.absolute(), directory.absolute()
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{self._root}/usr/bin:{self._root}/usr/sbin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": ":".join(f"{self._root}/{library}" for library in _LIBRARIES),
            "SLURM_CONF": str(self._directory / "slurm.conf"),
        }

    def __enter__(self) -> Self:
        for name in ("state", "log", "run", "munge", *(f"spool/node{i}" for i in range(1, NODES + 1))):
            (self._directory / name).mkdir(parents=True)
        self._directory.chmod(0o711)
        self._write_configuration()
        with contextlib.ExitStack() as started:
            started.callback(self._stop)
            self._start_munge()
            self._start(f"{self._root}/usr/sbin/slurmctld-wlm", "-D", "-c")
            for i in range(1, NODES + 1):
                self._start_daemon(i)
            self._wait_idle()
            self._stack = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """A command with this cluster's SLURM in its environment; returns its output. Raises CalledProcessError."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def logs(self) -> str:
        return "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in (self._directory / "log").glob("*.log"))

    def kill_node(self, number: int) -> None:
        """Everything that runs on the node ends at once, as when it loses its power."""
        name = f"node{number}"
        daemon = self._nodes.pop(number)
        tasks = [p for p in psutil.process_iter() if _node_of(p) == name and p.pid != daemon.pid]
        shepherds = [parent for task in tasks if (parent := task.parent()) and "slurmstepd" in parent.name()]
        for process in (daemon, *shepherds, *tasks):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        daemon.wait()
        self._daemons.remove(daemon)

    def start_node(self, number: int) -> None:
        """One that was killed comes back; returns when all nodes are idle."""
        self._start_daemon(number)
        self._wait_idle()

    def _start_daemon(self, number: int) -> None:
        stepd = f"{self._root}/usr/sbin/slurmstepd-wlm"
        self._start(f"{self._root}/usr/sbin/slurmd-wlm", "-D", "-N", f"node{number}", "-d", stepd)
        self._nodes[number] = self._daemons[-1]

    def _start_munge(self) -> None:
        munge = self._directory / "munge"
        key = munge / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._start(
            *(f"{self._root}/usr/sbin/munged", "--foreground", "--force", f"--key-file={key}"),
            f"--socket={munge / 'munge.socket'}",
            *(f"--pid-file={munge / 'munged.pid'}", f"--log-file={self._directory / 'log' / 'munged.log'}"),
            f"--seed-file={munge / 'munged.seed'}",
        )
        deadline = time.monotonic() + START_LIMIT_S
        while not (munge / "munge.socket").exists():
            assert time.monotonic() < deadline, "munged did not start"
            time.sleep(0.05)

    def _start(self, *command: str) -> None:
        with (self._directory / "log" / f"{Path(command[0]).name}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=killed_with_parent,
                )
            )

    def _wait_idle(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            done = subprocess.run(
                ["sinfo", "-h", "-t", "idle", "-o", "%D"], env=self.environment, capture_output=True, text=True
            )
            if done.stdout.strip() == str(NODES):
                return
            assert time.monotonic() < deadline, f"the nodes did not come up: {done.stdout}{done.stderr}\n{self.logs()}"
            time.sleep(0.2)

    def _stop(self) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(
                ["scancel", "-u", getpass.getuser()], env=self.environment, timeout=20, stderr=subprocess.DEVNULL
            )
            self._wait_for_no_job()
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _wait_for_no_job(self) -> None:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            done = subprocess.run(["squeue", "-h"], env=self.environment, capture_output=True, text=True, timeout=20)
            if not done.stdout.strip():
                return
            time.sleep(0.3)

    def _write_configuration(self) -> None:
        host, user, d = socket.gethostname().split(".")[0], getpass.getuser(), self._directory
        controller, *daemons = _free_ports(NODES + 1)
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            f"AuthInfo=socket={d}/munge/munge.socket,cred_expire=5",  # a requeue waits for it
            "CredType=cred/munge",
            f"PluginDir={self._root}/{_LIBRARIES[0]}",
            f"SlurmctldPort={controller}",
            f"SlurmctldPidFile={d}/run/slurmctld.pid",
            f"SlurmdPidFile={d}/run/slurmd.%n.pid",
            f"StateSaveLocation={d}/state",
            f"SlurmdSpoolDir={d}/spool/%n",
            f"SlurmctldLogFile={d}/log/slurmctld.log",
            f"SlurmdLogFile={d}/log/slurmd.%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "TCPTimeout=10",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,requeue_delay=1,bf_continue",
            "SlurmdParameters=config_overrides",
            "ReturnToService=2",
            "JobRequeue=1",
            "KillWait=5",
            "MinJobAge=3600",
            "InactiveLimit=0",
            "SlurmdTimeout=30",  # a node that does not answer is down, and a job may leave it
            "AccountingStorageType=accounting_storage/none",
            f"PartitionName=all Nodes=node[1-{NODES}] Default=YES MaxTime=1-0 State=UP",
        ]
        for i, port in enumerate(daemons, start=1):
            lines.append(
                f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Boards=1 "
                f"SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory={MEMORY_MB}"
            )
        (d / "slurm.conf").write_text("\n".join(lines) + "\n")
