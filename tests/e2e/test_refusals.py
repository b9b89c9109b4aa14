"""A user looks before the run, and a run that must not go on does not."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.support.runs import QUICKSTART, SMALL, settings
from tests.support.server_pool import Loans
from tests.support.trainer import drpo, train

pytestmark = [pytest.mark.server, pytest.mark.distributed]


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    before = set(psutil.pids())
    done = drpo("train", QUICKSTART, *settings(tmp_path), "--dry-run").done().output
    assert "rank 1: tensor 1" in done
    assert "torch.distributed.run" in done and "--nproc-per-node=2" in done
    assert "sglang" in done
    assert "updates_per_batch: 2" in done
    assert not (tmp_path / "run").exists()
    assert not [p for p in psutil.process_iter(["ppid"]) if p.pid not in before and p.info["ppid"] == os.getpid()]


def test_engines_that_differ_stop_the_run(borrow: Loans, tmp_path: Path) -> None:
    """They always differ by more than this; the message tells that the weights do not."""
    server = f"rollout.server.addresses=[{borrow('deterministic').url}]"
    words = (*SMALL, "training.deterministic=true", "training.steps=1", "sync.probe_tolerance=1e-12", server)
    outcome = train(QUICKSTART, *settings(tmp_path), *words)
    assert outcome.code == 1
    said = (tmp_path / "run" / "log" / "error_rank_0.txt").read_text()
    assert said.startswith("ProbeMismatch: trainer and rollout server http://127.0.0.1:")
    assert "sync.probe_tolerance is 1e-12; no tensor differs: the engines compute differently" in said
    assert said.removeprefix("ProbeMismatch: ").strip() in outcome.output
    assert f"logs: {tmp_path / 'run' / 'log'}" in outcome.output
