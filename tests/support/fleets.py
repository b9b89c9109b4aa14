"""Two real servers behind the real router, with an API key: for tests of what can happen to a fleet.

Tests share one, by the fixture `pair` of `tests/conftest.py`. They may kill its servers. Each must leave it whole, with
both servers back in traffic, and that is proven before the next test gets it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from transformers import AutoTokenizer, PreTrainedModel

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
from drpo_megatron.records import RolloutGroup
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServersFailed
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.member import Fault, Member
from drpo_megatron.rollout.router import Router
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.rollout.server_args import with_delta_loader
from drpo_megatron.rollout.status_file import NAME, StatusFile
from drpo_megatron.sync.push import WeightSync
from drpo_megatron.sync.verify import ServerLayout
from tests.support import tiny_models
from tests.support.server_pool import wait_until_idle
from tests.support.servers import (
    LIMIT_S,
    largest_logprob_error,
    make_prompts,
    members,
    perturb,
    wait_until_gone,
    when_it_generates,
)

SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=120, ignore_eos=True)
PROMPTS = make_prompts(16, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4
KEY = "a key: of this test # 12"


def wait_for(condition: Callable[[], bool], fleet: Fleet) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "\n".join(fleet.table())
        time.sleep(0.05)


def suspend(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.suspend()


@contextlib.contextmanager
def watched_closely(fleet: Fleet, victim: Member) -> Iterator[None]:
    """Checks of this server, until it is restarted, give it four seconds: one that hangs never answers, and the others,
    on a busy machine, may take as long as they need.
    """
    examine, restarts = victim.examine, victim.restarts

    def impatient(limit_s: float, api_key: str | None) -> Fault | None:
        return examine(4.0 if victim.restarts == restarts else limit_s, api_key)

    with mock.patch.object(victim, "examine", impatient):
        wait_for(lambda: victim.check is None, fleet)  # one that was under way has the patience of the others
        yield


@dataclass
class Pair:
    """The fleet, and the trainer's side of it: model is what the last push brought. path: the model's directory."""

    fleet: Fleet
    driver: RolloutDriver
    model: PreTrainedModel
    path: Path
    version: int = 0
    checksums: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first = copy.deepcopy(self.model.state_dict())
        self.weights = self.way()

    def way(self, **settings: Any) -> WeightSync:
        """For weights to the servers, not connected."""
        config = SyncConfig(bucket_mb=0.05, timeout_s=LIMIT_S).model_copy(update=settings)
        layout = ServerLayout.from_config(self.path, 1, torch.float32)
        return WeightSync(config, layout, self.path, self.path / "sync", self.fleet.api_key)

    @property
    def members(self) -> list[Member]:
        return self.fleet._members

    def admin(self, url: str) -> ServerAdmin:
        return ServerAdmin(url, self.fleet.api_key)

    def push(self) -> None:
        """New weights for whoever is up."""
        perturb(self.model, self.version)
        self.push_these()

    def push_these(self) -> None:
        """As `Experience.push_weights` does it, until nobody fails in it."""
        self.version += 1
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

    def restore(self) -> None:
        """Make it what it was before the first test, and prove it: both servers generate, are idle and in traffic, with
        the first weights. Only the version goes on.
        """
        wait_for(lambda: len(self.fleet.up()) == 2, self.fleet)
        assert not self.fleet.is_lent, "the trainer has the servers' memory"
        for url in self.fleet.up():
            wait_until_idle(self.admin(url))
        self.model.load_state_dict(self._first)
        self.push_these()
        assert self.fleet.serving() == 2, "\n".join(self.fleet.table())
        sums = [self.admin(url).weight_checksums(LIMIT_S) for url in self.fleet.up()]
        self.checksums = self.checksums or sums[0]
        assert sums == [self.checksums] * 2, "they do not take their first weights back"
        for member in self.members:
            member.restarts, member.reason = 0, ""

    def checked(self, groups: list[RolloutGroup]) -> set[int]:
        """The groups are whole, in order and of the current weights; returns the versions of their tokens."""
        assert [g.prompt for g in groups] == PROMPTS and all(len(g.rollouts) == 4 for g in groups)
        assert largest_logprob_error(groups, self.model, 1.0) < TOLERANCE
        return {v for g in groups for r in g.rollouts for v in r.weight_versions}

    def during(self, url: str, act: Callable[[], None]) -> list[RolloutGroup]:
        """Groups whose generation is disturbed by `act`, once the server at `url` generates."""
        disturbing = threading.Thread(target=when_it_generates, args=(url, act, self.fleet.api_key))
        disturbing.start()
        groups = self.driver.generate(PROMPTS)
        while disturbing.is_alive():  # the server was not asked, or was done before it was looked at
            groups = self.driver.generate(PROMPTS)
        disturbing.join()
        return groups

    def processes(self, index: int) -> list[psutil.Process]:
        pid = self.members[index].server.pid
        assert pid is not None
        return [psutil.Process(member) for member in members(pid)]


@contextlib.contextmanager
def started_pair(directory: Path, launch: Callable[..., Any]) -> Iterator[Pair]:
    """Whole, as `Pair.restore` leaves it. launch: starts the servers' processes. At the end nothing of them runs."""
    path = directory / "model"
    model = tiny_models.write("qwen3", path)
    config = with_delta_loader(ServerConfig(count=2, start_timeout_s=LIMIT_S, health_timeout_s=LIMIT_S, max_restarts=9))
    rollout = RolloutConfig(
        prompts_per_step=4, samples_per_prompt=4, sampling=SAMPLING, server=config, request_timeout_s=LIMIT_S
    )
    log = directory / "log"
    servers = [
        SGLangServer(config, path, "float32", 0, log / f"server-{i}.log", index=i, api_key=KEY, colocated=True)
        for i in range(2)
    ]
    for server in servers:
        server.launch = launch
    router = Router(rollout.router, log / "router.log", KEY)
    fleet_members = [Member(f"server-{i}", server) for i, server in enumerate(servers)]
    with Fleet(config, fleet_members, router, KEY, StatusFile(path / NAME)) as fleet:
        fleet.wait_all()
        driver = RolloutDriver(rollout, fleet, AutoTokenizer.from_pretrained(path))
        pair = Pair(fleet, driver, model, path)
        pair.restore()
        yield pair
        pair.weights.close(servers_alive=False)
        pids = [server.pid for server in servers]
    assert not [left for pid in pids if pid for left in wait_until_gone(pid, LIMIT_S)]


class Pairs:
    """At most one pair, started when a test asks for it."""

    def __init__(self, root: Path, launch: Callable[..., Any]) -> None:
        self._root = root
        self._launch = launch
        self._count = 0
        self._running = contextlib.ExitStack()
        self._pair: Pair | None = None

    def get(self) -> Pair:
        if self._pair is None:
            self._count += 1
            self._pair = self._running.enter_context(started_pair(self._root / str(self._count), self._launch))
        return self._pair

    def give_back(self) -> None:
        """Raises AssertionError when the pair cannot be made whole. It is then replaced."""
        assert self._pair is not None
        try:
            self._pair.restore()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._pair = None
        self._running.close()
