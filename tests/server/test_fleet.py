"""Two real SGLang servers behind the real sglang-router, through what can happen to them.

More deaths are in `tests/slow/test_fleet_deaths.py`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import torch

from drpo_megatron.config.schema import ServerConfig
from drpo_megatron.rollout.errors import ServersFailed, ServerStartError
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Member, State
from drpo_megatron.rollout.server import ExternalServer, SGLangServer
from drpo_megatron.rollout.status_file import NAME
from tests.support.fleets import KEY, PROMPTS, Pair, suspend, wait_for, watched_closely
from tests.support.servers import LIMIT_S, wait_until_gone, when_it_generates

pytestmark = pytest.mark.server


def test_both_serve_the_pushed_weights(pair: Pair) -> None:
    assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}
    for member in pair.members:
        info = requests.get(f"{member.server.url}/server_info", headers={"Authorization": f"Bearer {KEY}"})
        counts = info.json()["internal_states"][0]
        assert counts["last_gen_throughput"] > 0, "the router must use both"
    assert [m.state for m in pair.members] == [State.SERVING] * 2
    assert f"serving, weight version {pair.version}, 0 restarts" in pair.fleet.table()[0]


def test_their_load_is_seen_from_outside(pair: Pair) -> None:
    seen: list[str] = []
    looking = [
        threading.Thread(target=when_it_generates, args=(url, lambda url=url: seen.append(url), KEY))
        for url in pair.fleet.up()
    ]
    for thread in looking:
        thread.start()
    while any(thread.is_alive() for thread in looking):
        pair.driver.generate(PROMPTS)
    assert sorted(seen) == sorted(pair.fleet.up())

    def rows() -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads((pair.path / NAME).read_text())["servers"]
        return found

    # After a check, at most five seconds later, the file says that nothing runs.
    wait_for(lambda: all(row["running"] == row["waiting"] == 0 for row in rows()), pair.fleet)
    assert [(row["name"], row["state"], row["version"]) for row in rows()] == [
        (f"server-{i}", "serving", pair.version) for i in range(2)
    ]


def test_without_the_key_nothing_is_answered(pair: Pair) -> None:
    for url in pair.fleet.up():
        for path in ("/generate", "/update_weights_from_disk", "/pause_generation"):
            assert requests.post(url + path, json={}).status_code == 401
        assert requests.get(f"{url}/server_info").status_code == 401
    # A fork has the name of its command, as far as there is room for it: what would be started is looked at as well.
    commands = [" ".join(p.cmdline()) for index in range(2) for p in pair.processes(index)]
    for server in pair.fleet.servers:
        assert isinstance(server, SGLangServer) and server._process is not None
        commands.append(" ".join(map(str, server._process.args)))
        assert "--weight-version" in commands[-1] and "--config" in commands[-1]
    assert not [c for c in commands if KEY in c], "every user of the host can read a command line"


def test_killed_while_generating(pair: Pair) -> None:
    victim = pair.members[0]
    pid, before = victim.server.pid, pair.version
    assert pid is not None
    groups = pair.during(victim.server.url, lambda: os.killpg(pid, signal.SIGKILL))
    assert pair.checked(groups) == {before}, "the other one takes over"
    assert pair.fleet.serving() == 1 and wait_until_gone(pid, LIMIT_S) == []
    # it comes back, with the weights of its start, and is not in traffic with them
    wait_for(lambda: len(pair.fleet.up()) == 2, pair.fleet)
    assert victim.state is State.WAITING and victim.restarts == 1
    assert pair.checked(pair.driver.generate(PROMPTS)) == {before}
    pair.whole()
    assert pair.checked(pair.driver.generate(PROMPTS)) == {before + 1}


def test_killed_while_syncing(pair: Pair) -> None:
    victim = pair.members[1]
    pid = victim.server.pid
    assert pid is not None
    state_dict = pair.model.state_dict

    produced = []

    def dies_in_the_middle() -> Iterator[tuple[str, torch.Tensor]]:
        for i, item in enumerate(state_dict().items()):
            if i == 20:
                os.killpg(pid, signal.SIGKILL)
            produced.append(item[0])
            yield item

    with pair.fleet.paused():
        pair.weights.connect(pair.fleet.up())
        with pytest.raises(ServersFailed) as caught:
            pair.weights.push(dies_in_the_middle(), pair.version + 1)
        assert list(caught.value.reasons) == [victim.server.url]
        assert produced == list(state_dict()), "ranks that produce the stream together must stay in step"
    pair.fleet.report(caught.value.reasons)
    pair.push()  # to the one that is left, which waits in the middle of an update
    assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}
    assert wait_until_gone(pid, LIMIT_S) == []
    pair.whole()
    assert victim.restarts == 1
    assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}


def test_hung_while_generating(pair: Pair) -> None:
    victim = pair.members[0]
    before = pair.version
    hung = pair.processes(0)
    with watched_closely(pair.fleet, victim):
        assert pair.checked(pair.during(victim.server.url, lambda: suspend(hung))) == {before}
        wait_for(lambda: victim.restarts == 1, pair.fleet)
    assert psutil.wait_procs(hung, timeout=LIMIT_S)[1] == []
    pair.whole()
    assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}


def test_restarted_by_somebody_else_with_its_old_weights(pair: Pair) -> None:
    """Its version says so: nothing it answers is used, and it is out of traffic until it has the weights."""
    victim = pair.members[1]
    pair.admin(victim.server.url).set_weight_version(0, LIMIT_S)
    groups = pair.driver.generate(PROMPTS)
    wait_for(lambda: victim.state is State.WAITING, pair.fleet)
    assert "has weight version 0 where the last push was" in victim.reason
    assert pair.checked(groups) <= {0, pair.version}
    assert pair.checked(pair.driver.generate(PROMPTS)) == {pair.version}
    pair.whole()
    assert pair.fleet.restarts == 0


def test_a_fleet_that_nobody_watches_is_an_error(pair: Pair, tmp_path: Path) -> None:
    """What ends the watching thread reaches the next push, though other servers are up."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServerConfig(port=taken.getsockname()[1])
        server = SGLangServer(config, tmp_path, "float32", 0, tmp_path / "server.log")
        up = Member("up", ExternalServer(pair.fleet.up()[0]), State.WAITING)
        with Fleet(config, [up, Member("server-0", server)], None, None) as fleet:
            wait_for(lambda: fleet._error is not None, fleet)
            up.state = State.WAITING
            with pytest.raises(ServerStartError, match="is in use"):
                fleet.wait_any()
