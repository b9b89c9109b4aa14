"""What docs/extending.md adds, found by the processes of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from drpo_megatron.config.schema import DataConfig, RewardConfig
from drpo_megatron.records import Prompt, Rollout
from drpo_megatron.rewards import RewardPool
from tests.unit import test_extending
from tests.unit.test_extending import ROOT, blocks

working_directory = test_extending.working_directory  # the fixture, of every test here


def test_the_reward_scores_in_the_pools_processes() -> None:
    data = DataConfig.model_validate({"source": {"type": "function", "function": "my_data:products"}})
    texts = {"12": 1.0, "= 12": 1.0, "so 12": 1 - 0.5 / 4, "so we get 12": 0.1, "13": 0.0, "": 0.0}
    rollouts = [
        Rollout(Prompt("p", [1], "3 * 4 =", "12", {"characters": 4}), [1], [0.0], [0], "stop", text=text)
        for text in texts
    ]
    broken = Rollout(Prompt("q", [1], "3 * 4 =", "12", {}), [1], [0.0], [0], "stop", text="12")
    with RewardPool(RewardConfig(type="function", function="my_rewards:short_and_right"), data) as pool:
        pool.score([*rollouts, broken])
    assert [r.reward for r in rollouts] == pytest.approx(list(texts.values()))
    assert broken.reward == 0 and "KeyError" in (broken.reward_error or "")


def test_a_run_takes_all_of_them_from_the_working_directory(working_directory: Path) -> None:
    """`drpo train --dry-run` of the quickstart with the page's settings, started where the modules lie."""
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for block in blocks("yaml"):
        for section, values in yaml.safe_load(block).items():
            settings[section] |= values
    (working_directory / "mine.yaml").write_text(yaml.safe_dump(settings))
    # -P: the console script does not have the working directory in its path either
    command = [sys.executable, "-P", "-m", "drpo_megatron.cli", "train", "mine.yaml", "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=working_directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("my_losses:drpo_two_sided", "my_rewards:short_and_right", "my_data:products", "my_rollouts:try_again"):
        assert name in done.stdout
