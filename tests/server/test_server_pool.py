"""Servers that tests share are given back as they were: what a test may leave is undone, what it may not fails it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerRequestError
from tests.support import server_pool
from tests.support.server_pool import Launch, Loans, PooledServer, ServerPool
from tests.support.servers import LIMIT_S, perturb

pytestmark = pytest.mark.server


def test_weights_and_version_are_restored(borrow: Loans) -> None:
    pooled = borrow("plain")
    model, admin = pooled.reference(), ServerAdmin(pooled.url)
    perturb(model, 1)
    weights = pooled.sync(transport="disk")
    weights.push(model.state_dict().items(), 5)
    weights.close()
    assert admin.weight_checksums(LIMIT_S) != pooled.checksums
    assert admin.model_info(LIMIT_S)["weight_version"] == "5"
    server_pool.restore(pooled)
    assert admin.weight_checksums(LIMIT_S) == pooled.checksums
    assert admin.model_info(LIMIT_S)["weight_version"] == "0"


def test_a_pause_is_found(borrow: Loans, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = borrow("plain")
    admin = ServerAdmin(pooled.url)
    admin.pause_generation("retract", LIMIT_S)
    with monkeypatch.context() as impatient, pytest.raises(ServerRequestError, match="did not answer"):
        impatient.setattr(server_pool, "IDLE_S", 1.0)
        server_pool.restore(pooled)
    admin.continue_generation(LIMIT_S)


def test_requests_and_other_weights_are_found(borrow: Loans, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = borrow("plain")
    other = [dict.fromkeys(rank, "0") for rank in pooled.checksums]
    with pytest.raises(AssertionError, match="does not take its first weights back"):
        server_pool.restore(dataclasses.replace(pooled, checksums=other))
    with monkeypatch.context() as busy, pytest.raises(AssertionError, match="0 requests run in it and 1 wait"):
        busy.setattr(ServerAdmin, "load", lambda *_: (0, 1))
        busy.setattr(ServerAdmin, "score", lambda *_, **__: {})
        busy.setattr(server_pool, "IDLE_S", 0.0)
        server_pool.restore(pooled)


class _Server:
    """Of which a test sees no more than that it runs."""

    url, tensor_parallel = "http://127.0.0.1:9", 1

    def __init__(self, number: int) -> None:
        self.pid: int | None = number

    def start(self) -> None:
        pass

    def ended(self) -> str | None:
        return None if self.pid else "ended with status -9"

    def stop(self) -> None:
        self.pid = None

    def log_tail(self) -> str:
        return "end of the log"


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerPool:
    """A pool of servers that are none. They are well as long as they run."""
    numbers = iter(range(1, 9))

    def launch(directory: Path) -> Launch:
        server: Any = _Server(next(numbers))
        return Launch(server, directory)

    def ready(kind: str, launch: Launch) -> PooledServer:
        assert launch.server.pid
        return PooledServer(kind, launch.server, launch.model, launch.model, torch.float32, None, launch.server.pid, [])

    monkeypatch.setattr(server_pool, "KINDS", {"stub": launch})
    monkeypatch.setattr(server_pool, "ready", ready)
    monkeypatch.setattr(server_pool, "wait_until_idle", lambda admin: None)
    monkeypatch.setattr(ServerAdmin, "weight_checksums", lambda *_: [])
    monkeypatch.setattr(ServerAdmin, "set_weight_version", lambda *_: None)
    monkeypatch.setattr(server_pool.requests, "post", lambda *_, **__: mock.Mock(status_code=200))
    monkeypatch.setattr(server_pool, "ServerForks", mock.Mock())
    return ServerPool(tmp_path)


def test_a_server_serves_test_after_test(stubs: ServerPool) -> None:
    for _ in range(3):
        loans = Loans(stubs)
        assert loans("stub") is loans("stub") and loans("stub").pid == 1
        loans.give_back()


@pytest.mark.parametrize("another", [None, 99], ids=["killed", "restarted"])
def test_one_that_a_test_broke_is_replaced(stubs: ServerPool, another: int | None) -> None:
    loans = Loans(stubs)
    server: Any = loans("stub").server
    server.pid = another
    with pytest.raises(AssertionError, match=r"the test broke the stub server: it (ended with|was restarted)"):
        loans.give_back()
    assert server.pid is None, "it is ended"
    assert Loans(stubs)("stub").pid == 2


def test_one_that_ends_by_itself_is_nobodys_fault(stubs: ServerPool) -> None:
    server: Any = stubs.get("stub").server
    server.pid = None
    with pytest.raises(AssertionError, match="ended with status -9 while no test had it"):
        stubs.get("stub")
    assert stubs.get("stub").pid == 2
