"""One real SGLang server that gives its memory back and takes it again: what waits meanwhile, and what it then answers.

The tests share one server and run in the order of this file; the last one leaves the server dead. On a CPU the server
keeps the memory; what it may be asked, and when, is the same.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
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
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.rollout.memory import ServerMemory
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests import tiny_models
from tests.rollout.helpers import largest_logprob_error, make_prompts, perturb

pytestmark = pytest.mark.server

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=24)
PROMPTS = make_prompts(4, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4


@dataclass
class Setup:
    server: SGLangServer
    driver: RolloutDriver
    weights: WeightSync
    model: PreTrainedModel
    memory: ServerMemory

    def push(self, version: int) -> None:
        perturb(self.model, version)
        tensors = self.model.state_dict().items()
        assert self.weights.push(tensors, version, stay_paused=bool(self.memory.released)).verified

    def logprob_error(self, groups: list[RolloutGroup]) -> float:
        return largest_logprob_error(groups, self.model, SAMPLING.temperature)


@pytest.fixture(scope="module", params=["distributed", "disk"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    path: Path = tmp_path_factory.mktemp("qwen3")
    model = tiny_models.write("qwen3", path)
    config = RolloutConfig(
        prompts_per_step=4, samples_per_prompt=2, sampling=SAMPLING, server=ServerConfig(start_timeout_s=300)
    )
    server = SGLangServer(config.server, path, "float32", 0, path / "log" / "server.log", colocated=True)
    with server:
        url = server.wait_ready()
        sync = SyncConfig(bucket_mb=0.05, timeout_s=60, transport=request.param)
        weights = WeightSync(url, sync, ServerLayout.from_config(path, 1, torch.float32), path, path / "sync")
        driver = RolloutDriver(config, server, AutoTokenizer.from_pretrained(path))
        yield Setup(server, driver, weights, model, ServerMemory(timeout_s=60))
        weights.close(server_alive=False)


def test_the_turns_of_a_step(setup: Setup) -> None:
    """Twice, with every verb said twice: only what is still to do is asked for, and the log-probs are the model's."""
    url, memory = setup.server.url, setup.memory
    for version in (1, 2):
        for _ in range(2):
            memory.release(url, "kv_cache", "weights")
        assert memory.released == {"kv_cache", "weights"}
        for _ in range(2):
            memory.release(url, "kv_cache")
            memory.resume(url, "weights")
        assert memory.released == {"kv_cache"}
        setup.push(version)
        for _ in range(2):
            memory.resume(url, "kv_cache")
        assert not memory.released
        groups = setup.driver.generate(PROMPTS)
        assert {v for g in groups for r in g.rollouts for v in r.weight_versions} == {version}
        assert setup.logprob_error(groups) < TOLERANCE


def test_a_request_that_comes_meanwhile_waits_for_the_new_weights(setup: Setup) -> None:
    url, memory = setup.server.url, setup.memory
    memory.release(url, "kv_cache", "weights")
    answers: list[list[RolloutGroup]] = []
    asking = threading.Thread(target=lambda: answers.append(setup.driver.generate(PROMPTS)))
    asking.start()
    time.sleep(3)  # the request takes a fraction of this when it is not held
    memory.resume(url, "weights")
    setup.push(3)
    time.sleep(1)
    assert asking.is_alive() and not answers, "neither a release nor a push may let it run"
    memory.resume(url, "kv_cache")
    asking.join(timeout=120)
    (groups,) = answers
    assert {v for g in groups for r in g.rollouts for v in r.weight_versions} == {3}
    assert setup.logprob_error(groups) < TOLERANCE


def test_a_request_that_runs_waits_and_goes_on(setup: Setup) -> None:
    """Nothing is lost: the request has tokens of both weights, each with its version."""
    url, memory = setup.server.url, setup.memory
    long = SamplingConfig(temperature=0.7, max_new_tokens=400, ignore_eos=True)
    answers: list[list[RolloutGroup]] = []
    asking = threading.Thread(target=lambda: answers.append(setup.driver.generate(PROMPTS[:1], 2, long)))
    asking.start()
    while not _running(url):
        time.sleep(0.01)
    memory.release(url, "kv_cache", "weights")
    memory.resume(url, "weights")
    setup.push(4)
    memory.resume(url, "kv_cache")
    asking.join(timeout=300)
    ((group,),) = answers
    for rollout in group.rollouts:
        assert len(rollout.response_ids) == 400
        assert set(rollout.weight_versions) <= {3, 4} and rollout.weight_versions[-1] == 4
        assert rollout.weight_versions == sorted(rollout.weight_versions)
    assert any(3 in rollout.weight_versions for rollout in group.rollouts)


def _running(url: str) -> int:
    loads = requests.get(f"{url}/v1/loads", timeout=30).json()["loads"]
    return sum(load["num_running_reqs"] for load in loads)


def test_memory_that_was_not_given_back_ends_the_server(setup: Setup) -> None:
    """Why ServerMemory counts, and why it forgets at a restart: a fresh server holds everything."""
    with pytest.raises(ServerError):
        ServerAdmin(setup.server.url).resume_memory(["kv_cache"], 60)
    deadline = time.monotonic() + 60
    while setup.server.alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not setup.server.alive()


def test_a_restarted_server(setup: Setup) -> None:
    """After a death in the middle of a turn: it holds everything, gives up its KV cache, and learns the weights."""
    memory, server = setup.memory, setup.server
    setup.weights.reconnect(setup.driver.restart_server())
    memory.restarted()
    memory.release(server.url, "kv_cache", "weights")
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(ServerError):
        memory.resume(server.url, "weights")
    setup.weights.reconnect(setup.driver.restart_server())
    memory.restarted()
    assert not memory.released
    memory.release(server.url, "kv_cache")
    memory.resume(server.url, "weights")
    setup.push(5)
    memory.resume(server.url, "kv_cache")
    assert setup.logprob_error(setup.driver.generate(PROMPTS)) < TOLERANCE
