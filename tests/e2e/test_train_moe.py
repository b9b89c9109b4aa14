"""`drpo train` of a mixture of experts against the real server: weights in step, experts followed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.server, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
MOE_LAYERS, EXPERTS_A_TOKEN = 2, 2


def train(directory: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of each step of the recipe's run."""
    arguments = [sys.executable, "-m", "drpo_megatron.cli", "train", str(ROOT / "configs" / "tiny-qwen3-moe.yaml")]
    settings = [f"tracking.directory={directory}", f"model.path={directory / 'model'}", "tracking.wandb=false"]
    small = ["name=run", "training.steps=3", "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4"]
    done = subprocess.run([*arguments, *settings, *small, *overrides], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def test_the_trainer_follows_the_servers_experts(tmp_path: Path) -> None:
    steps = train(tmp_path)
    assert [s["step"] for s in steps] == [0, 1, 2]
    for step in steps:
        assert step["mismatch/router_disagreement"] == 0
        # The two engines' routers agree in float32 but for near ties, of which a short run has hardly any.
        assert step["router/own_disagreement"] < 0.02
        assert step["mismatch/abs_dlogp_max"] < 1e-3
        assert step["sync/verified_parameters"] > 0
        assert step["sync/probe_abs_dlogp_max"] < 1e-3
        assert 1 <= step["moe/aux_loss"] < 8
        assert step["train/skipped_updates"] == 0
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000002.jsonl").open()]
    for rollout in rollouts:
        positions = len(rollout["prompt"]["token_ids"]) + len(rollout["response_ids"]) - 1
        assert rollout["left_out"] == {"routed_experts": [positions, MOE_LAYERS, EXPERTS_A_TOKEN]}
    assert {v for r in rollouts for v in r["weight_versions"]} == {4}  # two updates in each of the steps before


def test_engines_that_differ_stop_the_run(tmp_path: Path) -> None:
    """They always differ by more than this; the message tells that the weights do not."""
    arguments = [sys.executable, "-m", "drpo_megatron.cli", "train", str(ROOT / "configs" / "tiny-qwen3-moe.yaml")]
    settings = [f"tracking.directory={tmp_path}", f"model.path={tmp_path / 'model'}", "tracking.wandb=false"]
    one = ["name=run", "training.steps=1", "sync.probe_tolerance=1e-12"]
    done = subprocess.run([*arguments, *settings, *one], capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    said = (tmp_path / "run" / "log" / "error_rank_0.txt").read_text()
    assert said.startswith("ProbeMismatch: trainer and rollout server http://127.0.0.1:")
    assert "sync.probe_tolerance is 1e-12; no tensor differs: the engines compute differently" in said
    assert said.removeprefix("ProbeMismatch: ").strip() in done.stdout + done.stderr
