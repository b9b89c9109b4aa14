"""Deaths of a fleet's servers and of its router that the fast tests leave out: `tests/server/test_fleet.py`."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from drpo_megatron.config.schema import RolloutConfig, ServerConfig
from drpo_megatron.platform.ports import free_port
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member, State
from drpo_megatron.rollout.server import ExternalServer, SGLangServer
from tests.support import tiny_models
from tests.support.fleets import KEY, PROMPTS, SAMPLING, Pair, started_pair, suspend, wait_for, watched_closely
from tests.support.server_pool import ServerPool
from tests.support.servers import LIMIT_S

pytestmark = pytest.mark.server


def test_hung_while_syncing(pair: Pair) -> None:
    victim = pair.members[0]
    hung = pair.processes(0)
    pair.weights.close(servers_alive=True)
    pair.weights = pair.way(timeout_s=60)  # that long the push waits for the one that hangs
    with watched_closely(pair.fleet, victim):
        suspend(hung)
        pair.push()
        assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}
        wait_for(lambda: victim.restarts >= 1, pair.fleet)
    assert psutil.wait_procs(hung, timeout=LIMIT_S)[1] == []
    pair.weights.close(servers_alive=True)
    pair.weights = pair.way()
    pair.whole()
    assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}


def test_started_again_elsewhere_at_its_address(servers: ServerPool, tmp_path: Path) -> None:
    """As a SLURM job's rollout group does it. The new process knows nothing of the way that weights went to the old
    one; and one that a failed push left paused is not started again by anybody.
    """
    model, key = tmp_path / "model", KEY
    written = tiny_models.write("qwen3", model)
    config = ServerConfig(port=free_port("127.0.0.1"), start_timeout_s=LIMIT_S)

    def started() -> SGLangServer:
        server = SGLangServer(config, model, "float32", 0, tmp_path / "server.log", api_key=key)
        server.launch = servers.launch
        server.start()
        server.wait_ready()
        return server

    server = started()
    external = ServerConfig(addresses=[server.url], start_timeout_s=LIMIT_S, health_timeout_s=LIMIT_S, max_restarts=2)
    try:
        with Fleet(external, [Member("elsewhere", ExternalServer(server.url, key))], None, key) as fleet:
            fleet.wait_all()
            config_of_run = RolloutConfig(prompts_per_step=4, samples_per_prompt=4, sampling=SAMPLING)
            driver = RolloutDriver(config_of_run, fleet, AutoTokenizer.from_pretrained(model))
            other = Pair(fleet, driver, written, model)
            other.push()
            server.stop()
            wait_for(lambda: fleet.serving() == 0, fleet)
            server = started()
            wait_for(lambda: bool(fleet.up()), fleet)
            other.push()
            assert fleet.restarts == 1
            other.admin(server.url).pause_generation("retract", LIMIT_S)
            fleet.report({server.url: "did not take a bucket"})
            wait_for(lambda: bool(fleet.up()), fleet)
            other.push()
            assert fleet.restarts == 2 and other.version == 3 and fleet.serving() == 1
            other.weights.close(servers_alive=False)
    finally:
        server.stop()


def test_router_killed(pair: Pair) -> None:
    router = pair.fleet._router
    assert router is not None and router._process is not None
    pid = router._process.pid
    url, restarts = router.url, router.restarts
    assert pair.checked(pair.during(pair.fleet.up()[0], lambda: os.kill(pid, signal.SIGKILL))) == {pair.version}
    assert router.restarts == restarts + 1 and router.url == url
    assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}


def test_given_up(servers: ServerPool, tmp_path: Path) -> None:
    """A server whose restarts are used up is left out, and the other goes on."""
    with started_pair(tmp_path, servers.launch) as pair:
        victim = pair.members[0]
        victim.restarts = pair.fleet._config.max_restarts
        pid = victim.server.pid
        assert pid is not None
        os.killpg(pid, signal.SIGKILL)
        wait_for(lambda: victim.state is State.LOST, pair.fleet)
        pair.push()
        assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}
        assert "given up" in pair.fleet.table()[0]
