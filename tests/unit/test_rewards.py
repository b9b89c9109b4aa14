"""Verifiers, and the pool: time-outs that kill, errors that count, no process left behind."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from drpo_megatron.config.schema import DataConfig, RewardConfig
from drpo_megatron.data.examples import repeat_digit
from drpo_megatron.records import Prompt, Rollout
from drpo_megatron.rewards import RewardError, RewardPool
from drpo_megatron.rewards.examples import matching_characters
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier
from drpo_megatron.rewards.worker import ran_out_of_memory

FUNCTION_DATA = DataConfig.model_validate(
    {"source": {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit"}}
)


def rollout(text: str, answer: str | None = None, metadata: dict[str, Any] | None = None) -> Rollout:
    prompt = Prompt(id=f"p-{text[:12]}", token_ids=[1], text="", answer=answer, metadata=metadata or {})
    return Rollout(prompt, response_ids=[1], logmu=[0.0], weight_versions=[0], finish_reason="stop", text=text)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_pool_survives_everything(caplog: pytest.LogCaptureFixture) -> None:
    before = {p.pid for p in children()}
    config = RewardConfig(type="function", function="tests.support.misbehaving:behave", timeout_s=0.7, workers=2)
    bad = {
        "raise": "raised RuntimeError: bad sample",
        "python loop": "took longer than 0.7 s",
        "c call": "took longer than 0.7 s",
        "child": "took longer than 0.7 s",
        "exit": "exit code 7",
        "segfault": "SIGSEGV",
        "nan": "returned nan",
        "none": "returned NoneType",
    }
    with RewardPool(config, FUNCTION_DATA) as pool:
        # Good samples between the bad ones: a replaced process must score, and must not answer for an earlier sample.
        rollouts = [rollout(text) for name in bad for text in (name, "fine")]
        special = {name: rollout(name) for name in ("modules", "sigint ignored")}
        pool.score([*rollouts, *special.values()])
        for number, r in enumerate(rollouts):
            if number % 2:
                assert (r.reward, r.reward_error) == (0.5, None)
            else:
                assert r.reward == 0.0 and r.reward_error is not None and bad[r.text] in r.reward_error, r
        assert special["modules"].reward == 0.0 and special["modules"].reward_error is None
        assert special["sigint ignored"].reward == 1.0
        assert "prompt p-raise, sample 0: reward 0, the verifier raised RuntimeError: bad sample" in caplog.text
        assert 1 <= len([p for p in children() if p.pid not in before]) <= 2
    assert {p.pid for p in children()} <= before
    with pytest.raises(RewardError, match="closed"):
        pool.score(rollouts)


def test_a_cancelled_score_leaves_the_pool_alive() -> None:
    """As when a run stops, or a step does not wait for a group, while its samples are scored."""
    config = RewardConfig(type="function", function="tests.support.misbehaving:behave", timeout_s=0.7)

    async def cancel_one_and_score_another(pool: RewardPool) -> None:
        waits = asyncio.create_task(pool.score_async([rollout("python loop"), rollout("fine")]))
        await asyncio.sleep(0.3)
        waits.cancel()
        await asyncio.wait_for(pool.score_async([last]), timeout=60)

    last = rollout("fine")
    with RewardPool(config, FUNCTION_DATA) as pool:
        pool.score([rollout("fine")])
        asyncio.run(cancel_one_and_score_another(pool))
    assert last.reward == 0.5


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


def test_what_counts_as_out_of_memory() -> None:
    lost = SystemError("error return without exception set")
    hidden = ImportError("numpy: look at its sources")
    hidden.__cause__ = MemoryError()
    assert ran_out_of_memory(lost) and ran_out_of_memory(hidden) and not ran_out_of_memory(ImportError("no module"))


def test_no_limit_of_memory() -> None:
    config = RewardConfig(type="function", function="tests.support.misbehaving:behave", memory_mb=None)
    with RewardPool(config, FUNCTION_DATA) as pool:
        pool.score([own := rollout("address space")])
    assert own.reward == float(resource.getrlimit(resource.RLIMIT_AS)[1])


def test_verifier_that_cannot_start() -> None:
    config = RewardConfig(type="function", function="no_such_module:f")
    with RewardPool(config, FUNCTION_DATA) as pool, pytest.raises(RewardError, match="no_such_module"):
        pool.score([rollout("a")])


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
    gone, _ = psutil.wait_procs([worker], timeout=5)
    assert gone


def test_reasoning_gym_and_extraction() -> None:
    data = DataConfig.model_validate({"source": {"type": "reasoning_gym", "task": "basic_arithmetic", "size": 5}})
    entry = {"answer": "-4", "question": "", "metadata": {}}
    plain = make_verifier(RewardConfig(type="reasoning_gym"), data)
    assert plain(" -4 \n", None, {"entry": entry}) == 1.0
    extracting = make_verifier(RewardConfig(type="reasoning_gym", extract="<answer>(.*?)</answer>"), data)
    assert extracting("<answer>3</answer> no, <answer>-4</answer> yes", None, {"entry": entry}) == 1.0
    assert extracting("-4", None, {"entry": entry}) == 0.0
    assert checked_reward(plain, "-4", None, {})[1] == "the verifier raised KeyError: 'entry'"


def test_math_verify() -> None:
    verifier = make_verifier(RewardConfig(type="math_verify"), FUNCTION_DATA)
    for gold, text, expected in [
        ("\\frac{1}{2}", "The answer is $0.5$", 1.0),
        ("34", "so we get \\boxed{34}.", 1.0),
        ("34", "so we get \\boxed{35}.", 0.0),
        ("$x^2+2x+1$", "$(x+1)^2$", 1.0),
        ("34", "", 0.0),
    ]:
        assert checked_reward(verifier, text, gold, {}) == (expected, None), (gold, text)
    assert "no reference answer" in str(checked_reward(verifier, "1", None, {})[1])


def test_quickstart_example() -> None:
    assert repeat_digit(3, 1) == repeat_digit(3, 1)
    problems = [repeat_digit(i, 1) for i in range(100)]
    assert {p["prompt"][0] for p in problems} == set("0123456789")
    answer = next(p["answer"] for p in problems if p["prompt"][0] == "7")
    assert set(answer) == {"7"}
    half = len(answer) // 2
    rewards = [matching_characters(text, answer, {}) for text in (answer + "x", answer[:half] + "x" * half, "x", "")]
    assert rewards == [1.0, half / len(answer), 0.0, 0.0]
