"""A run that is stopped and goes on, with the real server: equal to one that was never stopped, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.report.parting import MEASURED
from tests.e2e.test_train import LIMIT_S, command, descendants, left_over, metrics, wait_for

pytestmark = [pytest.mark.server, pytest.mark.distributed]

SETTINGS = (
    "training.deterministic=true",
    "training.steps=6",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "save.every=2",
    "save.hf_every=4",
)


def without_times(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in step.items() if not k.startswith(MEASURED)} for step in steps]


def train(directory: Path, *arguments: str) -> None:
    done = subprocess.run(command(directory, *arguments), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def stop(directory: Path, number: signal.Signals, *arguments: str) -> str:
    """Run until two steps are done, tell it to stop, and return what it printed."""
    with subprocess.Popen(
        command(directory, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(lambda: len(metrics(directory)) > 1 or process.poll() is not None, "the second step")
        family = descendants(process.pid)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert process.returncode == 75, output
    assert not alive
    return output


def test_stopped_and_gone_on(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, *SETTINGS)
    output = stop(parts, signal.SIGUSR1, *SETTINGS)
    assert "holds a checkpoint" in output and "drpo train --resume" in output
    done = len(metrics(parts))
    assert 2 <= done < 6
    train(parts, *SETTINGS, "--resume")
    assert without_times(metrics(parts)) == without_times(metrics(whole))
    for name in ("hf/model.safetensors", "exports/step_000004/model.safetensors"):
        assert (parts / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    for step in range(6):
        dumps = [(path / "run" / "rollouts" / f"step_{step:06d}.jsonl").read_text() for path in (whole, parts)]
        assert dumps[0] == dumps[1]
    kept = sorted(path.name for path in (parts / "run" / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"]

    # Two steps more, in another layout, without determinism, asynchronous.
    more = [s for s in SETTINGS if "deterministic" not in s and "steps=" not in s]
    other = ("training.steps=8", "parallel.tensor=1", "parallel.data=2", "rollout.schedule=one_step_off")
    train(parts, *more, *other, "--resume")
    steps = metrics(parts)
    assert [s["step"] for s in steps] == list(range(8))
    assert without_times(steps[:6]) == without_times(metrics(whole))
    manifest = json.loads((parts / "run" / "checkpoints" / "step_000008" / "manifest.json").read_text())
    assert manifest["layout"]["data"] == 2 and manifest["version"] == 16


def test_a_scheduler_ends_the_whole_job(tmp_path: Path) -> None:
    """SIGTERM reaches every process, the server too: the checkpoint is written all the same."""
    settings = (*(s for s in SETTINGS if "deterministic" not in s), "rollout.schedule=asynchronous")
    settings = (*settings, "rollout.max_staleness=4", "training.steps=200")
    with subprocess.Popen(
        command(tmp_path, *settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(lambda: len(metrics(tmp_path)) > 1 or process.poll() is not None, "the second step")
        family = descendants(process.pid)
        for victim in [*family, process]:
            victim.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert process.returncode == 75, output
    assert not alive
    done = len(metrics(tmp_path))
    assert (tmp_path / "run" / "checkpoints" / f"step_{done:06d}" / "manifest.json").exists()
    train(tmp_path, *settings[:-1], f"training.steps={done + 1}", "--resume")
    assert [s["step"] for s in metrics(tmp_path)] == list(range(done + 1))
