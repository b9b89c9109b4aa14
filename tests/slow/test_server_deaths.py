"""The only server of a trainer dies: in a rollout, in a sync, and while a producer waits for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServerDied, ServersFailed
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests.support import tiny_models
from tests.support.schedules import PROMPTS, TOLERANCE, Schedule, rollouts_of, settings
from tests.support.server_pool import ServerPool
from tests.support.servers import LIMIT_S, OneServer, make_prompts, wait_until_gone, when_it_generates

pytestmark = pytest.mark.server


@pytest.fixture
def server(servers: ServerPool, tmp_path: Path) -> SGLangServer:
    """Of the test's own, not started, with the model in `tmp_path / "model"`."""
    tiny_models.write("qwen3", tmp_path / "model")
    server = SGLangServer(ServerConfig(start_timeout_s=LIMIT_S), tmp_path / "model", "float32", 0, tmp_path / "log")
    server.launch = servers.launch
    return server


def way_to(path: Path) -> WeightSync:
    layout = ServerLayout.from_config(path, 1, torch.float32)
    return WeightSync(SyncConfig(bucket_mb=0.05, timeout_s=LIMIT_S), layout, path, path / "sync")


def test_death_in_a_rollout_and_in_a_sync(server: SGLangServer, tmp_path: Path) -> None:
    path = tmp_path / "model"
    model = tiny_models.write("qwen3", tmp_path / "copy")
    weights = way_to(path)
    with server:
        server.wait_ready()
        config = RolloutConfig(
            prompts_per_step=4, samples_per_prompt=8, sampling=SamplingConfig(max_new_tokens=400, ignore_eos=True)
        )
        driver = RolloutDriver(config, OneServer(server), AutoTokenizer.from_pretrained(path))
        first_pid = server.pid
        assert first_pid is not None
        killer = threading.Thread(
            target=when_it_generates, args=(server.url, lambda: os.kill(first_pid, signal.SIGKILL))
        )
        killer.start()
        with pytest.raises(ServerDied):
            while killer.is_alive() or server.alive():
                driver.generate(make_prompts(4, tiny_models.VOCAB_SIZE), 64)
            driver.generate(make_prompts(4, tiny_models.VOCAB_SIZE), 64)
        killer.join()
        assert wait_until_gone(first_pid, LIMIT_S) == [], "the workers of a killed server must end"

        server.stop()
        server.start()
        second_pid = server.pid
        assert second_pid is not None
        weights.connect([server.wait_ready()])
        produced = []

        def kill_in_the_middle() -> Iterator[tuple[str, torch.Tensor]]:
            for i, item in enumerate(model.state_dict().items()):
                if i == 20:
                    os.kill(second_pid, signal.SIGKILL)
                produced.append(item[0])
                yield item

        with pytest.raises(ServersFailed) as caught:
            weights.push(kill_in_the_middle(), 6)
        assert list(caught.value.reasons) == [server.url]
        assert produced == list(model.state_dict()), "ranks that produce the stream together must stay in step"
        assert wait_until_gone(second_pid, LIMIT_S) == []


@pytest.fixture
def setup(server: SGLangServer, tmp_path: Path) -> Iterator[Schedule]:
    weights = way_to(tmp_path / "model")
    settings = ServerConfig(start_timeout_s=LIMIT_S, health_timeout_s=LIMIT_S)
    with Fleet(settings, [Member("server-0", server)], None, None) as fleet:
        fleet.wait_all()
        made = Schedule(fleet, weights, tmp_path / "model", {0: tiny_models.write("qwen3", tmp_path / "copy")})
        made.push()
        yield made
        weights.close(servers_alive=False)


def test_a_death_is_waited_out(setup: Schedule) -> None:
    """With the only server gone nothing is lost: it comes back, gets the weights, and everything is sampled."""
    (member,) = setup.fleet._members
    pid = member.server.pid
    assert pid is not None
    config = settings(schedule="asynchronous", max_staleness=2)
    taken: list[str] = []
    with setup.producer(config) as producer:
        producer.synced(setup.version)
        taken += [group.prompt.id for group in producer.take()]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ServerDied):
            for _ in range(4):  # what was complete before is taken first
                taken += [group.prompt.id for group in producer.take()]
        setup.fleet.wait_any()
        assert member.restarts == 1
        setup.push()
        producer.synced(setup.version)
        groups = producer.take()
        taken += [group.prompt.id for group in groups]
        begun = [ticket["number"] for ticket in producer.state()["begun"]]
    assert sorted(taken + [PROMPTS[n].id for n in begun]) == sorted(p.id for p in PROMPTS[: len(taken) + len(begun)])
    assert setup.largest_error(rollouts_of(groups)) < TOLERANCE
