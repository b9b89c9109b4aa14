"""Two real SGLang servers behind the real sglang-router, through what can happen to them.

The tests share the fleet and run in the order of this file; each leaves it whole.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
import torch
from transformers import AutoTokenizer, PreTrainedModel

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
from drpo_megatron.platform.ports import free_port
from drpo_megatron.records import RolloutGroup
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServersFailed, ServerStartError
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member, State
from drpo_megatron.rollout.router import Router
from drpo_megatron.rollout.server import ExternalServer, SGLangServer
from drpo_megatron.rollout.status_file import NAME, StatusFile
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests.support import tiny_models
from tests.support.servers import largest_logprob_error, make_prompts, members, perturb, wait_until_gone

pytestmark = pytest.mark.server

SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=120, ignore_eos=True)
PROMPTS = make_prompts(16, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4
LIMIT_S = 240
KEY_VARIABLE = "DRPO_TEST_KEY"


@dataclass
class Setup:
    fleet: Fleet
    driver: RolloutDriver
    weights: WeightSync
    model: PreTrainedModel
    weights_path: Path
    version: int = 0

    def push(self) -> None:
        """New weights for whoever is up, as `Experience.push_weights` does it, until nobody fails in it."""
        self.version += 1
        perturb(self.model, self.version)
        while True:
            with self.fleet.paused():
                self.fleet.wait_any()
                urls = self.fleet.up()
                try:
                    self.weights.connect(urls, self.fleet.comebacks)
                    self.weights.push(self.model.state_dict().items(), self.version)
                    break
                except ServersFailed as failure:
                    self.fleet.report(failure.reasons)
        self.fleet.admit(urls, self.version)

    def whole(self) -> None:
        """Wait until both are up, and push to both."""
        wait_for(lambda: len(self.fleet.up()) == 2, self.fleet)
        self.push()
        assert self.fleet.serving() == 2

    def checked(self, groups: list[RolloutGroup]) -> set[int]:
        """The groups are whole, in order and of the current weights; returns the versions of their tokens."""
        assert [g.prompt for g in groups] == PROMPTS and all(len(g.rollouts) == 4 for g in groups)
        assert largest_logprob_error(groups, self.model, 1.0) < TOLERANCE
        return {v for g in groups for r in g.rollouts for v in r.weight_versions}


def wait_for(condition: Callable[[], bool], fleet: Fleet) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "\n".join(fleet.table())
        time.sleep(0.1)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    path = tmp_path_factory.mktemp("qwen3")
    model = tiny_models.write("qwen3", path)
    key = os.environ[KEY_VARIABLE] = "a key: of this test # 12"
    server = ServerConfig(count=2, start_timeout_s=300, health_timeout_s=8, max_restarts=9, api_key_env=KEY_VARIABLE)
    config = RolloutConfig(
        prompts_per_step=4, samples_per_prompt=4, sampling=SAMPLING, server=server, request_timeout_s=120
    )
    log = path / "log"
    fleet = Fleet(
        server,
        [
            Member(
                f"server-{i}",
                SGLangServer(server, path, "float32", 0, log / f"server-{i}.log", index=i, api_key=key),
            )
            for i in range(2)
        ],
        Router(config.router, log / "router.log", key),
        key,
        StatusFile(path / NAME),
    )
    layout = ServerLayout.from_config(path, 1, torch.float32)
    weights = WeightSync(SyncConfig(bucket_mb=0.05, timeout_s=20), layout, path, path / "sync", key)
    with fleet:
        fleet.wait_all()
        made = Setup(fleet, RolloutDriver(config, fleet, AutoTokenizer.from_pretrained(path)), weights, model, path)
        made.push()
        yield made
        weights.close(servers_alive=False)
        pids = [m.server.pid for m in fleet._members]
    assert not [left for pid in pids if pid for left in wait_until_gone(pid, 10)]
    del os.environ[KEY_VARIABLE]


def processes(setup: Setup, index: int) -> list[psutil.Process]:
    pid = setup.fleet._members[index].server.pid
    assert pid is not None
    return [psutil.Process(member) for member in members(pid)]


def during(setup: Setup, act: Callable[[], None]) -> list[RolloutGroup]:
    """Groups whose generation is disturbed by `act`."""
    disturbed = threading.Timer(1.0, act)
    disturbed.start()
    groups = setup.driver.generate(PROMPTS)
    disturbed.join()
    return groups


def test_both_serve_the_pushed_weights(setup: Setup) -> None:
    assert setup.checked(setup.driver.generate(PROMPTS)) == {1}
    for member in setup.fleet._members:
        info = requests.get(
            f"{member.server.url}/server_info", headers={"Authorization": f"Bearer {os.environ[KEY_VARIABLE]}"}
        )
        counts = info.json()["internal_states"][0]
        assert counts["last_gen_throughput"] > 0, "the router must use both"
    assert [m.state for m in setup.fleet._members] == [State.SERVING] * 2
    assert "serving, weight version 1, 0 restarts" in setup.fleet.table()[0]


def test_their_load_is_seen_from_outside(setup: Setup) -> None:
    admins = [ServerAdmin(url, setup.fleet.api_key) for url in setup.fleet.up()]
    seen: list[list[tuple[int, int]]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            seen.append([admin.load(20) for admin in admins])

    looking = threading.Thread(target=look)
    looking.start()
    setup.driver.generate(PROMPTS)
    ended.set()
    looking.join()
    assert all(max(running for running, _ in of_server) > 0 for of_server in zip(*seen, strict=True)), seen

    def rows() -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads((setup.weights_path / NAME).read_text())["servers"]
        return found

    # After a check, at most five seconds later, the file says that nothing runs.
    wait_for(lambda: all(row["running"] == row["waiting"] == 0 for row in rows()), setup.fleet)
    assert [(row["name"], row["state"], row["version"]) for row in rows()] == [
        (f"server-{i}", "serving", setup.version) for i in range(2)
    ]


def test_without_the_key_nothing_is_answered(setup: Setup) -> None:
    for url in setup.fleet.up():
        for path in ("/generate", "/update_weights_from_disk", "/pause_generation"):
            assert requests.post(url + path, json={}).status_code == 401
        assert requests.get(f"{url}/server_info").status_code == 401
    key = os.environ[KEY_VARIABLE]
    commands = [" ".join(p.cmdline()) for index in range(2) for p in processes(setup, index)]
    assert commands and not [c for c in commands if key in c], "every user of the host can read a command line"


def test_killed_while_generating(setup: Setup) -> None:
    victim = setup.fleet._members[0]
    pid, before = victim.server.pid, setup.version
    assert pid is not None
    groups = during(setup, lambda: os.killpg(pid, signal.SIGKILL))
    assert setup.checked(groups) == {before}, "the other one takes over"
    assert setup.fleet.serving() == 1 and wait_until_gone(pid, 10) == []
    # it comes back, with the weights of its start, and is not in traffic with them
    wait_for(lambda: len(setup.fleet.up()) == 2, setup.fleet)
    assert victim.state is State.WAITING and victim.restarts == 1
    assert setup.checked(setup.driver.generate(PROMPTS)) == {before}
    setup.whole()
    assert setup.checked(setup.driver.generate(PROMPTS)) == {before + 1}


def test_killed_while_syncing(setup: Setup) -> None:
    victim = setup.fleet._members[1]
    pid = victim.server.pid
    assert pid is not None
    state_dict = setup.model.state_dict

    def dies_in_the_middle() -> Iterator[tuple[str, torch.Tensor]]:
        for i, item in enumerate(state_dict().items()):
            if i == 20:
                os.killpg(pid, signal.SIGKILL)
            yield item

    with setup.fleet.paused():
        setup.weights.connect(setup.fleet.up())
        with pytest.raises(ServersFailed) as caught:
            setup.weights.push(dies_in_the_middle(), setup.version + 1)
        assert list(caught.value.reasons) == [victim.server.url]
    setup.fleet.report(caught.value.reasons)
    setup.push()  # to the one that is left, which waits in the middle of an update
    assert setup.checked(setup.driver.generate(PROMPTS)) == {setup.version}
    setup.whole()


@pytest.mark.parametrize("when", ["generating", "syncing"])
def test_hung(setup: Setup, when: str) -> None:
    victim = setup.fleet._members[0]
    restarts, before = victim.restarts, setup.version
    hung = processes(setup, 0)

    def stop() -> None:
        for process in hung:
            process.suspend()

    if when == "generating":
        assert setup.checked(during(setup, stop)) == {before}
    else:
        stop()
        setup.push()
        assert setup.checked(setup.driver.generate(PROMPTS)) == {setup.version}
    wait_for(lambda: victim.restarts > restarts, setup.fleet)
    assert psutil.wait_procs(hung, timeout=10)[1] == []
    setup.whole()
    assert setup.checked(setup.driver.generate(PROMPTS)) == {setup.version}


def test_restarted_by_somebody_else_with_its_old_weights(setup: Setup) -> None:
    """Its version says so: nothing it answers is used, and it is out of traffic until it has the weights."""
    victim = setup.fleet._members[1]
    ServerAdmin(victim.server.url, os.environ[KEY_VARIABLE]).set_weight_version(0, 30)
    groups = setup.driver.generate(PROMPTS)
    wait_for(lambda: victim.state is State.WAITING, setup.fleet)
    assert "has weight version 0 where the last push was" in victim.reason
    assert setup.checked(groups) <= {0, setup.version}
    assert setup.checked(setup.driver.generate(PROMPTS)) == {setup.version}
    setup.whole()


def test_started_again_elsewhere_at_its_address(setup: Setup, tmp_path: Path) -> None:
    """As a SLURM job's rollout group does it. The new process knows nothing of the way that weights went to the old
    one; and one that a failed push left paused is not started again by anybody.
    """
    model, key = setup.weights_path, os.environ[KEY_VARIABLE]
    config = ServerConfig(port=free_port("127.0.0.1"), start_timeout_s=300)

    def started() -> SGLangServer:
        server = SGLangServer(config, model, "float32", 0, tmp_path / "server.log", api_key=key)
        server.start()
        server.wait_ready()
        return server

    server = started()
    external = ServerConfig(addresses=[server.url], start_timeout_s=120, health_timeout_s=4, max_restarts=2)
    layout = ServerLayout.from_config(model, 1, torch.float32)
    weights = WeightSync(SyncConfig(bucket_mb=0.05, timeout_s=20), layout, model, tmp_path / "sync", key)
    try:
        with Fleet(external, [Member("elsewhere", ExternalServer(server.url, key))], None, key) as fleet:
            fleet.wait_all()
            other = Setup(fleet, setup.driver, weights, copy.deepcopy(setup.model), model)
            other.push()
            server.stop()
            wait_for(lambda: fleet.serving() == 0, fleet)
            server = started()
            wait_for(lambda: bool(fleet.up()), fleet)
            other.push()
            assert fleet.restarts == 1
            ServerAdmin(server.url, key).pause_generation("retract", 30)
            fleet.report({server.url: "did not take a bucket"})
            wait_for(lambda: bool(fleet.up()), fleet)
            other.push()
            assert fleet.restarts == 2 and other.version == 3 and fleet.serving() == 1
    finally:
        weights.close(servers_alive=False)
        server.stop()


def test_router_killed(setup: Setup) -> None:
    router = setup.fleet._router
    assert router is not None and router._process is not None
    pid = router._process.pid
    url = router.url
    assert setup.checked(during(setup, lambda: os.kill(pid, signal.SIGKILL))) == {setup.version}
    assert router.restarts == 1 and router.url == url
    assert setup.checked(setup.driver.generate(PROMPTS)) == {setup.version}


def test_a_fleet_that_nobody_watches_is_an_error(setup: Setup, tmp_path: Path) -> None:
    """What ends the watching thread reaches the next push, though other servers are up."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(port=taken.getsockname()[1])
        server = SGLangServer(config, tmp_path, "float32", 0, tmp_path / "server.log")
        up = Member("up", ExternalServer(setup.fleet.up()[0]), State.WAITING)
        with Fleet(config, [up, Member("server-0", server)], None, None) as fleet:
            wait_for(lambda: fleet._error is not None, fleet)
            up.state = State.WAITING
            with pytest.raises(ServerStartError, match="is in use"):
                fleet.wait_any()


def test_given_up(setup: Setup, tmp_path: Path) -> None:
    """Last: a server whose restarts are used up is left out, and the other goes on."""
    victim = setup.fleet._members[0]
    victim.restarts = setup.fleet._config.max_restarts
    pid = victim.server.pid
    assert pid is not None
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: victim.state is State.LOST, setup.fleet)
    setup.push()
    assert setup.checked(setup.driver.generate(PROMPTS)) == {setup.version}
    assert "given up" in setup.fleet.table()[0]
