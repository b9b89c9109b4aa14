"""The watchdog: who stands where, how the process ends, and what it tells the launcher. A child process a case."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import yaml

from drpo_megatron.config import load_config
from drpo_megatron.platform.process import processes
from launch import local
from tests.unit.test_config import MINIMAL


def test_what_the_launcher_reads(tmp_path: Path) -> None:
    """A watchdog's record comes before the errors of ranks whose connections it broke, whichever was first."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = load_config(path, [f"tracking.directory={tmp_path}"])
    log = config.run_directory / "log"
    log.mkdir(parents=True)
    assert local.read_failure(config) is None
    (log / "error_rank_1.txt").write_text("RuntimeError: Connection closed by peer\n")
    failure = local.read_failure(config)
    assert failure is not None and (failure.rank, failure.code) == (1, 1)
    (log / "stacks_rank_2.txt").write_text("rank 2, step 3, train\nTimeout (0:00:15)!\nThread 0x1\n")
    failure = local.read_failure(config)
    assert failure is not None and (failure.rank, failure.code) == (2, 75)
    (log / "error_rank_0.txt").write_text("Stalled: step 3\nexit code 75: a scheduler may start the job again\n")
    failure = local.read_failure(config)
    assert failure is not None and (failure.rank, failure.code) == (0, 75) and "step 3" in failure.message


def test_processes_as_psutil_sees_them() -> None:
    own = next(p for p in processes() if p.pid == os.getpid())
    reference = psutil.Process()
    assert (own.parent, own.group, own.state) == (reference.ppid(), os.getpgid(0), "R")
    assert reference.name().startswith(own.name)
