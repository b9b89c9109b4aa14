"""tools/fp8_stability.py as a user runs it: two cells with the real server, a kill in the middle, what is written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import held_rewards
from tests.support.runs import LIMIT_S

pytestmark = [pytest.mark.server, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]


def command(directory: Path) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tools" / "fp8_stability.py"),
        *("--losses", "drpo", "pg", "--precisions", "bf16", "--staleness", "4", "--seeds", "0", "--no-deltas"),
        *(
            "--updates",
            "12",
            "--workers",
            "1",
            "--out",
            str(directory / "out"),
            "--scratch",
            str(directory / "scratch"),
        ),
        *("--set", f"model.path={directory / 'model'}", held_rewards.PATIENT),
        "reward.function=tests.support.held_rewards:odd_characters",
    ]


def records(directory: Path) -> dict[str, Any]:
    files = sorted((directory / "out" / "fp8-stability").glob("runs-*.jsonl"))
    return {file.stem: json.loads(line) for file in files for line in file.read_text().splitlines()}


def test_a_killed_study_makes_only_what_is_missing(tmp_path: Path) -> None:
    second = tmp_path / "scratch" / "pg-bf16-4-0"
    metrics = second / "metrics.jsonl"
    # The second run is held after its first step, or it could be over before it is seen.
    held = os.environ | held_rewards.after_steps(second, 1)
    study = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True, env=held)
    deadline = time.monotonic() + LIMIT_S
    while not (records(tmp_path) and metrics.exists() and metrics.read_text().endswith("\n")):
        assert study.poll() is None and time.monotonic() < deadline, "the second run did not begin"
        time.sleep(0.05)
    family = psutil.Process(study.pid).children(recursive=True)
    study.kill()
    study.wait()
    first = records(tmp_path)
    assert list(first) == ["runs-drpo"]
    # Two engines in bf16 with the same weights, though the server held those of another run before.
    assert 0 < json.loads(metrics.read_text().splitlines()[0])["mismatch/k3"] < 1e-3
    # The kernel ends the worker, its run and its server.
    assert not psutil.wait_procs(family, timeout=LIMIT_S)[1]

    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "2 runs, 1 of them to be made" in done.stdout
    both = records(tmp_path)
    assert both.keys() == {"runs-drpo", "runs-pg"} and both["runs-drpo"] == first["runs-drpo"]
    for run in both.values():
        assert run["status"] == "done" and len(run["metrics"]["reward/mean"]) == 3
        assert all(0 < k3 < 1e-3 for k3 in run["metrics"]["mismatch/k3"])
        assert run["metrics"]["staleness/max"] == [3, 3, 3]
    assert not list((tmp_path / "scratch").glob("*bf16*")), "a run that is recorded leaves nothing"
    assert "2 runs in 2 cells" in (tmp_path / "out" / "fp8-stability.md").read_text()
    assert (tmp_path / "out" / "fp8-stability" / "fp8-stability.html").exists()
    # The page has the command that makes its runs: that of above, but for where and by how many.
    (line,) = [x for x in (tmp_path / "out" / "fp8-stability.md").read_text().splitlines() if "# goes on" in x]
    own, theirs = (shlex.split(text, comments=True) for text in (shlex.join(command(tmp_path)[2:]), line))
    for option in ("--workers", "--out", "--scratch"):
        del own[own.index(option) : own.index(option) + 2]
    assert theirs == ["python", "tools/fp8_stability.py", *own]
