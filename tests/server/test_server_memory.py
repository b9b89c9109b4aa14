"""Two real SGLang servers that give their memory back and take it again: what waits meanwhile, and what they answer.

The tests share the fleet and run in the order of this file. On a CPU a server keeps the memory; what it may be asked,
and when, is the same.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoTokenizer, PreTrainedModel

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
from drpo_megatron.records import RolloutGroup
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServersFailed
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member, State
from drpo_megatron.rollout.memory import FleetMemory
from drpo_megatron.rollout.router import Router
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.rollout.server_args import with_delta_loader
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests.support import tiny_models
from tests.support.servers import largest_logprob_error, make_prompts, perturb

pytestmark = pytest.mark.server

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=24)
PROMPTS = make_prompts(4, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4
LIMIT_S = 240


@dataclass
class Setup:
    fleet: Fleet
    driver: RolloutDriver
    model: PreTrainedModel
    path: Path
    memory: FleetMemory
    transport: str = "distributed"
    version: int = 0

    def __post_init__(self) -> None:
        self.layout = ServerLayout.from_config(self.path, 1, torch.float32)
        self.use("distributed")

    def use(self, transport: str) -> None:
        config = SyncConfig(bucket_mb=0.05, timeout_s=60, transport=transport)
        self.weights = WeightSync(config, self.layout, self.path, self.path / "sync")

    def push(self) -> None:
        """As `Experience.push_weights` does it."""
        self.version += 1
        perturb(self.model, self.version)
        urls = self.fleet.up()
        self.weights.connect(urls)
        tensors = self.model.state_dict().items()
        assert self.weights.push(tensors, self.version, stay_paused=self.fleet.is_lent).verified
        self.fleet.admit(urls, self.version)

    def turn(self) -> None:
        """From training to generation."""
        self.memory.release("kv_cache", "weights")
        self.memory.resume_weights()
        self.push()
        self.memory.resume_all()
        assert not self.fleet.is_lent

    def check(self, groups: list[RolloutGroup]) -> None:
        """Tokens are of the last push, with its log-probs."""
        assert {v for g in groups for r in g.rollouts for v in r.weight_versions} == {self.version}
        assert largest_logprob_error(groups, self.model, SAMPLING.temperature) < TOLERANCE

    @property
    def lacking(self) -> list[frozenset[str]]:
        return list(self.memory.released.values())


def wait_for(condition: Callable[[], bool], fleet: Fleet) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "\n".join(fleet.table())
        time.sleep(0.05)


def kill(member: Member) -> None:
    assert member.server.pid is not None
    os.killpg(member.server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    path = tmp_path_factory.mktemp("qwen3")
    model = tiny_models.write("qwen3", path)
    server = with_delta_loader(ServerConfig(count=2, start_timeout_s=300))
    config = RolloutConfig(prompts_per_step=4, samples_per_prompt=2, sampling=SAMPLING, server=server)
    log = path / "log"
    servers = [
        SGLangServer(server, path, "float32", 0, log / f"{index}.log", index=index, colocated=True)
        for index in range(2)
    ]
    members = [Member(f"server-{index}", server) for index, server in enumerate(servers)]
    with Fleet(server, members, Router(config.router, log / "router.log", None), None) as fleet:
        fleet.wait_all()
        driver = RolloutDriver(config, fleet, AutoTokenizer.from_pretrained(path))
        made = Setup(fleet, driver, model, path, FleetMemory(fleet, timeout_s=60))
        yield made
        made.weights.close(servers_alive=False)


@pytest.mark.parametrize("transport", ["disk", "delta", "distributed"])
def test_the_turns_of_a_step(setup: Setup, transport: str) -> None:
    """Two steps, every verb said twice: only what is still to do is asked for, and the log-probs are the model's."""
    memory = setup.memory
    setup.use(transport)
    for _ in range(2):
        for _ in range(2):
            assert memory.release("kv_cache", "weights") == 2
        assert setup.lacking == [{"kv_cache", "weights"}] * 2
        for _ in range(2):
            memory.release("kv_cache")
            memory.resume_weights()
        assert setup.lacking == [{"kv_cache"}] * 2 and setup.fleet.is_lent
        setup.push()
        for _ in range(2):
            memory.resume_all()
        assert setup.lacking == [set()] * 2 and not setup.fleet.is_lent
        assert setup.fleet.serving() == 2
        setup.check(setup.driver.generate(PROMPTS))


def test_a_server_that_lacks_memory_is_not_a_sick_one(setup: Setup) -> None:
    members = setup.fleet._members
    setup.memory.release("kv_cache")
    wait_for(lambda: all(m.check is None for m in members), setup.fleet)  # checks that were under way
    setup.fleet.check_soon()
    time.sleep(1)
    assert [m.check for m in members] == [None, None]
    setup.memory.resume_all()
    setup.fleet.check_soon()
    wait_for(lambda: any(m.check is not None for m in members), setup.fleet)
    setup.check(setup.driver.generate(PROMPTS))
    assert setup.fleet.restarts == 0


def test_a_request_that_comes_meanwhile_waits_for_the_new_weights(setup: Setup) -> None:
    memory = setup.memory
    memory.release("kv_cache", "weights")
    answers: list[list[RolloutGroup]] = []
    asking = threading.Thread(target=lambda: answers.append(setup.driver.generate(PROMPTS)))
    asking.start()
    time.sleep(3)  # the request takes a fraction of this when it is not held
    memory.resume_weights()
    setup.push()
    time.sleep(1)
    assert asking.is_alive() and not answers, "neither a release nor a push may let it run"
    memory.resume_all()
    asking.join(timeout=120)
    (groups,) = answers
    setup.check(groups)


def test_a_request_that_runs_waits_and_goes_on(setup: Setup) -> None:
    """Nothing is lost: the request has tokens of both weights, each with its version."""
    long = SamplingConfig(temperature=0.7, max_new_tokens=400, ignore_eos=True)
    answers: list[list[RolloutGroup]] = []
    asking = threading.Thread(target=lambda: answers.append(setup.driver.generate(PROMPTS[:1], 2, long)))
    asking.start()
    wait_for(lambda: any(map(_running, setup.fleet.up())), setup.fleet)
    before = setup.version
    setup.turn()
    asking.join(timeout=300)
    ((group,),) = answers
    for rollout in group.rollouts:
        assert len(rollout.response_ids) == 400
        assert set(rollout.weight_versions) <= {before, before + 1} and rollout.weight_versions[-1] == before + 1
        assert rollout.weight_versions == sorted(rollout.weight_versions)
    assert any(before in rollout.weight_versions for rollout in group.rollouts)


def _running(url: str) -> int:
    loads = requests.get(f"{url}/v1/loads", timeout=30).json()["loads"]
    return sum(load["num_running_reqs"] for load in loads)


def test_no_server_starts_while_the_trainer_has_the_devices(setup: Setup) -> None:
    """One is killed; the other ends because it is asked for what it has, which is why FleetMemory counts. When none is
    left the trainer makes room, and both come back.
    """
    fleet, memory = setup.fleet, setup.memory
    killed, failing = fleet._members
    memory.release("kv_cache", "weights")
    with pytest.raises(RuntimeError, match="no sync followed"):
        memory.resume_all()
    kill(killed)
    wait_for(lambda: killed.state is State.RESTING and time.monotonic() > killed.at + 1, fleet)
    memory.resume_weights()
    setup.push()
    assert setup.lacking == [{"kv_cache"}] and fleet.serving() == 1

    assert memory.release("kv_cache", "weights") == 1
    ServerAdmin(failing.server.url).resume_memory(["weights"], 60)
    memory.resume_weights()
    assert (killed.state, failing.state) == (State.RESTING, State.RESTING) and fleet.is_lent
    with pytest.raises(ServersFailed):
        fleet.wait_any()  # a push that finds none: it cannot wait for what does not start
    assert memory.release("kv_cache") == 0
    time.sleep(2)
    assert fleet.restarts == 0, "it would take the memory that the trainer has"

    memory.wait_any()
    assert not fleet.is_lent and fleet.up()
    # waits for the other one, and takes its memory too
    assert memory.release("kv_cache", "weights") == 2
    assert setup.lacking == [{"kv_cache", "weights"}] * 2
    memory.resume_weights()
    setup.push()
    memory.resume_all()
    assert fleet.serving() == 2 and (killed.restarts, failing.restarts) == (1, 1)
    setup.check(setup.driver.generate(PROMPTS))
