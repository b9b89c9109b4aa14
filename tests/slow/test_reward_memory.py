"""Limits of a verifier's memory, each in processes that reach it, and the death of the trainer that started them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from drpo_megatron.config.schema import DataConfig, RewardConfig
from drpo_megatron.rewards import RewardError, RewardPool
from tests.unit.test_rewards import FUNCTION_DATA, rollout


def test_a_verifier_that_eats_memory(caplog: pytest.LogCaptureFixture) -> None:
    """It costs its own reward, whether Python or C asks for the memory; what a process kept goes with it."""
    config = RewardConfig(
        type="function", function="tests.support.misbehaving:behave", timeout_s=60, workers=1, memory_mb=512
    )
    bad = {
        "memory": "ran out of memory (reward.memory_mb is 512)",
        "small objects": "ran out of memory (reward.memory_mb is 512)",
        "memory in a cycle": "ran out of memory (reward.memory_mb is 512)",
        "memory in C": "ran out of memory (reward.memory_mb is 512)",
        "memory kept": "ran out of memory (reward.memory_mb is 512)",
        "abort": "SIGABRT",
    }
    with RewardPool(config, FUNCTION_DATA) as pool:
        rollouts = [rollout(text) for _ in range(2) for name in bad for text in (name, "some memory", "address space")]
        pool.score(rollouts)
        expected = {"some memory": 2.0**27, "address space": 512.0 * 2**20}
        for r in rollouts:
            if r.text in expected:
                assert (r.reward, r.reward_error) == (expected[r.text], None)
            else:
                assert r.reward == 0.0 and r.reward_error is not None and bad[r.text] in r.reward_error, r
    assert "prompt p-memory, sample 0: reward 0, the verifier ran out of memory" in caplog.text


def test_verifiers_of_the_package_fit_into_a_small_part_of_the_default() -> None:
    default = RewardConfig.model_fields["memory_mb"].default
    memory_mb = default // 8
    math = RewardConfig(type="math_verify", memory_mb=memory_mb)
    with RewardPool(math, FUNCTION_DATA) as pool:
        right, wrong = rollout("$(x+1)^2$", "$x^2+2x+1$"), rollout("$(x+1)^3$", "$x^2+2x+1$")
        pool.score([right, wrong])
    assert (right.reward, wrong.reward) == (1.0, 0.0) and right.reward_error is wrong.reward_error is None
    data = DataConfig.model_validate({"source": {"type": "reasoning_gym", "task": "basic_arithmetic", "size": 5}})
    with RewardPool(RewardConfig(type="reasoning_gym", memory_mb=memory_mb), data) as pool:
        gym = rollout("-4", metadata={"entry": {"answer": "-4", "question": "", "metadata": {}}})
        pool.score([gym])
    assert (gym.reward, gym.reward_error) == (1.0, None)


@pytest.mark.parametrize("memory_mb", [20, 60, 100])
def test_a_limit_below_what_the_verifier_takes_is_named(memory_mb: int) -> None:
    """They fail in Python's allocator or in the dynamic loader; numpy turns that into an error about its sources."""
    config = RewardConfig(type="reasoning_gym", memory_mb=memory_mb)
    data = DataConfig.model_validate({"source": {"type": "reasoning_gym", "task": "basic_arithmetic", "size": 5}})
    with (
        RewardPool(config, data) as pool,
        pytest.raises(RewardError, match=f"does not fit into reward.memory_mb = {memory_mb}:"),
    ):
        pool.score([rollout("-4", metadata={"entry": {}})])


def test_no_limit_of_memory() -> None:
    config = RewardConfig(type="function", function="tests.support.misbehaving:behave", memory_mb=None)
    with RewardPool(config, FUNCTION_DATA) as pool:
        pool.score([own := rollout("address space")])
    assert own.reward == float(resource.getrlimit(resource.RLIMIT_AS)[1])


def test_workers_die_with_the_trainer(tmp_path: Path) -> None:
    """The trainer is killed with SIGKILL while a verifier hangs."""
    script = textwrap.dedent("""
        from drpo_megatron.config.schema import RewardConfig
        from drpo_megatron.rewards import RewardPool
        from tests.unit.test_rewards import FUNCTION_DATA, rollout
        config = RewardConfig(type="function", function="tests.support.misbehaving:behave", timeout_s=600)
        pool = RewardPool(config, FUNCTION_DATA)
        pool.score([rollout("fine")])
        print(pool._feeders[0]._process.pid, flush=True)
        pool.score([rollout("c call")])
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        assert trainer.stdout is not None
        worker = psutil.Process(int(trainer.stdout.readline()))
        time.sleep(0.3)
        assert worker.is_running()
        trainer.kill()
    # The kernel's signal, not the end of the connection: the hung process reads nothing.
    gone, _ = psutil.wait_procs([worker], timeout=300)
    assert gone
