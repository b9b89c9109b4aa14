"""The pool of verifier processes: time-outs that kill, errors that count, no process left behind."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from drpo_megatron.config.schema import RewardConfig
from drpo_megatron.rewards import RewardError, RewardPool
from tests.unit.test_rewards import FUNCTION_DATA, rollout


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
        await asyncio.wait_for(pool.score_async([last]), timeout=300)

    last = rollout("fine")
    with RewardPool(config, FUNCTION_DATA) as pool:
        pool.score([rollout("fine")])
        asyncio.run(cancel_one_and_score_another(pool))
    assert last.reward == 0.5


def test_verifier_that_cannot_start() -> None:
    config = RewardConfig(type="function", function="no_such_module:f")
    with RewardPool(config, FUNCTION_DATA) as pool, pytest.raises(RewardError, match="no_such_module"):
        pool.score([rollout("a")])
