"""Two real SGLang servers that give their memory back and take it again: what waits meanwhile, and what they answer.

On a CPU a server keeps the memory; what it may be asked, and when, is the same. With deaths in between:
`tests/slow/test_memory_deaths.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from drpo_megatron.config.schema import SamplingConfig
from drpo_megatron.records import RolloutGroup
from tests.support.fleets import Pair, wait_for
from tests.support.servers import LIMIT_S
from tests.support.turns import PROMPTS, Turns, turns_of

pytestmark = pytest.mark.server


@pytest.fixture
def setup(pair: Pair) -> Iterator[Turns]:
    with turns_of(pair) as turns:
        yield turns


@pytest.mark.parametrize("transport", ["disk", "delta", "distributed"])
def test_the_turns_of_a_step(pair: Pair, transport: str) -> None:
    """Two steps, every verb said twice: only what is still to do is asked for, and the log-probs are the model's."""
    with turns_of(pair, transport) as setup:
        memory = setup.memory
        for _ in range(2):
            for _ in range(2):
                assert memory.release("kv_cache", "weights") == 2
            assert setup.lacking == [{"kv_cache", "weights"}] * 2
            for _ in range(2):
                memory.release("kv_cache")
                memory.resume_weights()
            assert setup.lacking == [{"kv_cache"}] * 2 and setup.pair.fleet.is_lent
            setup.push()
            for _ in range(2):
                memory.resume_all()
            assert setup.lacking == [set()] * 2 and not setup.pair.fleet.is_lent
            assert setup.pair.fleet.serving() == 2
            setup.check(setup.generate())


def test_a_server_that_lacks_memory_is_not_a_sick_one(setup: Turns) -> None:
    members = setup.pair.members
    setup.memory.release("kv_cache")
    wait_for(lambda: all(m.check is None for m in members), setup.pair.fleet)  # checks that were under way
    setup.pair.fleet.check_soon()
    time.sleep(1)
    assert [m.check for m in members] == [None, None]
    setup.memory.resume_all()
    setup.pair.fleet.check_soon()
    wait_for(lambda: any(m.check is not None for m in members), setup.pair.fleet)
    setup.check(setup.generate())
    assert [m.restarts for m in members] == [0, 0]


def test_a_request_that_comes_meanwhile_waits_for_the_new_weights(setup: Turns) -> None:
    memory = setup.memory
    memory.release("kv_cache", "weights")
    answers: list[list[RolloutGroup]] = []
    asking = threading.Thread(target=lambda: answers.append(setup.generate()))
    asking.start()
    time.sleep(1)  # for the request to come; one that is not held is answered in less, and the test then fails
    memory.resume_weights()
    setup.push()
    time.sleep(1)
    assert asking.is_alive() and not answers, "neither a release nor a push may let it run"
    memory.resume_all()
    asking.join(timeout=LIMIT_S)
    (groups,) = answers
    setup.check(groups)


def test_a_request_that_runs_waits_and_goes_on(setup: Turns) -> None:
    """Nothing is lost: the request has tokens of both weights, each with its version."""
    long = SamplingConfig(temperature=0.7, max_new_tokens=400, ignore_eos=True)
    answers: list[list[RolloutGroup]] = []
    asking = threading.Thread(target=lambda: answers.append(setup.pair.driver.generate(PROMPTS[:1], 2, long)))
    asking.start()
    wait_for(lambda: any(setup.pair.admin(url).load(LIMIT_S)[0] for url in setup.pair.fleet.up()), setup.pair.fleet)
    before = setup.pair.version
    setup.turn()
    asking.join(timeout=LIMIT_S)
    ((group,),) = answers
    for rollout in group.rollouts:
        assert len(rollout.response_ids) == 400
        assert set(rollout.weight_versions) <= {before, before + 1} and rollout.weight_versions[-1] == before + 1
        assert rollout.weight_versions == sorted(rollout.weight_versions)
    assert any(before in rollout.weight_versions for rollout in group.rollouts)
