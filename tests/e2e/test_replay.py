"""`drpo train --rollouts` gives the run again whose rollouts it reads, and `drpo rollout` makes such rollouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from drpo_megatron.report.parting import MEASURED

pytestmark = [pytest.mark.server, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
STEPS = 3
# Of servers, of the clock, and of the process: not functions of the rollouts.
ELSEWHERE = (*MEASURED, "sync/", "rollout/")


def drpo(verb: str, directory: Path, name: str, *words: str) -> str:
    settings = [
        f"tracking.directory={directory}",
        f"model.path={directory / 'model'}",
        f"name={name}",
        *("tracking.wandb=false", "tracking.tensorboard=false", "training.deterministic=true"),
        *("rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", f"training.steps={STEPS}"),
        # At the quickstart's size a step in three has no reward above 0, and nothing to learn.
        *("reward.function=tests.e2e.test_replay:odd_characters",),
    ]
    command = [sys.executable, "-m", "drpo_megatron.cli", verb, str(ROOT / "configs" / "quickstart.yaml")]
    done = subprocess.run([*command, *settings, *words], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def odd_characters(text: str, answer: str | None, metadata: dict[str, Any]) -> float:
    return sum(ord(character) % 2 for character in text) / 4


def metrics(directory: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(ELSEWHERE)} for row in rows]


def rollouts(directory: Path, name: str, step: int) -> list[dict[str, Any]]:
    path = directory / name / "rollouts" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_replay_is_the_run_again(tmp_path: Path) -> None:
    drpo("train", tmp_path, "run")
    drpo("train", tmp_path, "replay", "--rollouts", str(tmp_path / "run"))
    drpo("train", tmp_path, "again", "--rollouts", str(tmp_path / "replay" / "rollouts"))
    first = metrics(tmp_path, "run")
    assert len(first) == STEPS and all(row["grad_norm"] > 0 for row in first)
    assert {"loss/mean", "mismatch/k3", "policy/entropy", "reward/mean", "staleness/max"} <= first[0].keys()
    assert metrics(tmp_path, "replay") == first == metrics(tmp_path, "again")
    weights = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("run", "replay", "again")]
    assert weights[0] == weights[1] == weights[2] != (tmp_path / "model" / "model.safetensors").read_bytes()
    for step in range(STEPS):
        assert rollouts(tmp_path, "run", step) == rollouts(tmp_path, "again", step)
    logs = (path.name for path in (tmp_path / "replay" / "log").iterdir())
    assert not [name for name in logs if name.startswith("server")]

    said = drpo("rollout", tmp_path, "sampled", "--steps", "1")
    assert "32 samples of 4.0 tokens" in said and f"step 1/1  reward {first[0]['reward/mean']:.4f}" in said
    # The same seeds and weights; nobody has computed advantages, or trained.
    sampled = [r | {"advantage": 0.0, "logp": [], "loss_weight": []} for r in rollouts(tmp_path, "run", 0)]
    assert rollouts(tmp_path, "sampled", 0) == sampled
    about = [json.loads((tmp_path / name / "rollouts" / "about.json").read_text()) for name in ("run", "sampled")]
    assert about[1] == about[0] | {"run": "sampled"}
    started = str(tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(started in word for word in p.info["cmdline"] or [])]
