"""The delta transport to one real server: what follows on a base, and what goes whole because there is none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig, ServerConfig, SyncConfig
from drpo_megatron.platform.ports import free_port
from drpo_megatron.records import RolloutGroup
from drpo_megatron.rollout.driver import RolloutDriver
from drpo_megatron.rollout.errors import ServerRequestError
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.rollout.server_args import DELTA_LOADER, with_delta_loader
from drpo_megatron.sync import delta
from drpo_megatron.sync.delta_codec import encode
from drpo_megatron.sync.delta_loader import load
from drpo_megatron.sync.push import SyncReport, WeightSync
from drpo_megatron.sync.verify import ServerLayout, SyncMismatch
from tests.support import tiny_models
from tests.support.server_pool import Loans, ServerPool
from tests.support.servers import LIMIT_S, OneServer, largest_logprob_error, make_prompts, nudge

pytestmark = pytest.mark.server

SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=12)
TOLERANCE = 1e-4
SMALL = 0.1  # of the whole, where one element in a hundred changed


@dataclass
class Setup:
    """A server with its first weights, and a trainer that pushes deltas to it. weights: is connected."""

    url: str
    driver: RolloutDriver
    model: PreTrainedModel
    path: Path
    layout: ServerLayout
    directory: Path
    version: int = 0
    last: list[RolloutGroup] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = self.sync()

    def sync(self, **settings: Any) -> WeightSync:
        config = SyncConfig(transport="delta", bucket_mb=0.05, timeout_s=LIMIT_S, directory=self.directory)
        weights = WeightSync(config.model_copy(update=settings), self.layout, self.path, self.directory)
        weights.connect([self.url])
        return weights

    def push(self, weights: WeightSync | None = None) -> SyncReport:
        """Changed weights, verified, and the server's log-probs compared with those of transformers."""
        nudge(self.model, self.version)
        self.version += 1
        report = (weights or self.weights).push(self.model.state_dict().items(), self.version)
        assert report.verified == 3 + 4 * 8
        groups = self.driver.generate(make_prompts(4, tiny_models.VOCAB_SIZE))
        assert {v for g in groups for r in g.rollouts for v in r.weight_versions} == {self.version}
        assert largest_logprob_error(groups, self.model, 1.0) < TOLERANCE
        if self.last:
            assert largest_logprob_error(self.last, self.model, 1.0) > 100 * TOLERANCE, "the change must show"
        self.last = groups
        return report

    def share(self, weights: WeightSync | None = None) -> float:
        share = self.push(weights).delta_share
        assert share is not None
        return share


def driver_of(server: SGLangServer, path: Path) -> RolloutDriver:
    config = RolloutConfig(prompts_per_step=4, samples_per_prompt=4, sampling=SAMPLING)
    return RolloutDriver(config, OneServer(server), AutoTokenizer.from_pretrained(path))


@pytest.fixture
def setup(borrow: Loans, tmp_path: Path) -> Iterator[Setup]:
    pooled = borrow("plain")
    driver = driver_of(pooled.server, pooled.model)
    made = Setup(pooled.url, driver, pooled.reference(), pooled.model, pooled.layout, tmp_path / "sync")
    yield made
    made.weights.close()


@pytest.fixture(autouse=True)
def reasons(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=delta.__name__)


def test_whole_weights_and_then_deltas(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    first = setup.push()
    assert first.delta_share is not None and 1 <= first.delta_share < 1.1
    assert "no earlier push" in caplog.text
    caplog.clear()
    for _ in range(3):
        report = setup.push()
        assert report.delta_share is not None and 0 < report.delta_share < SMALL
        assert report.bytes == round(report.delta_share * sum(t.nbytes for t in setup.model.state_dict().values()))
    assert "whole" not in caplog.text


def test_another_transport_in_between_changes_nothing(setup: Setup) -> None:
    """It leaves the base alone, and a delta push loads all tensors."""
    setup.push()
    for transport in ("disk", "shared_memory"):
        other = setup.sync(transport=transport)
        assert setup.push(other).delta_share is None
        other.close()
        assert setup.share() < SMALL


def test_another_trainer_in_between(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.push()
    other = setup.sync()
    assert setup.share(other) >= 1 and setup.share(other) < SMALL
    caplog.clear()
    assert setup.share() >= 1
    assert "by another trainer" in caplog.text
    assert setup.share() < SMALL
    other.close()


def test_after_a_push_that_failed(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    """One that broke off after its first buckets, and one with a tensor too few."""

    def stream(end: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(setup.model.state_dict().items())[:end]
        raise ServerRequestError("broken off")

    nudge(setup.model, 90)
    with pytest.raises(ServerRequestError, match="broken off"):
        setup.weights.push(stream(12), 99)
    setup.weights.connect([setup.url])
    caplog.clear()
    assert setup.share() >= 1 and setup.share() < SMALL
    assert "no earlier push" in caplog.text
    nudge(setup.model, 91)
    with pytest.raises(SyncMismatch):
        setup.weights.push([i for i in setup.model.state_dict().items() if i[0] != "model.norm.weight"], 99)
    setup.weights.connect([setup.url])
    assert setup.share() >= 1 and setup.share() < SMALL


def test_a_damaged_delta_is_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the checksum of the bytes, before the server's weights could show it; the server lives on."""
    setup.push()

    def damage(*arguments: Any) -> Any:
        encoded = encode(*arguments)
        packed = bytearray(encoded.parts[1])
        packed[len(packed) // 2] ^= 4
        encoded.parts[1] = bytes(packed)
        return encoded

    monkeypatch.setattr(delta, "encode", damage)
    nudge(setup.model, 92)
    with pytest.raises(ServerRequestError, match=r"did not take a weight bucket: DamagedDelta"):
        setup.weights.push(setup.model.state_dict().items(), 99)
    monkeypatch.undo()
    setup.weights.connect([setup.url])
    assert setup.share() >= 1 and setup.share() < SMALL


def test_after_a_restart(servers: ServerPool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps the address, and with it the trainer's connection and base. A server of this test's own."""
    path = tmp_path / "model"
    model = tiny_models.write("qwen3", path)
    config = with_delta_loader(ServerConfig(start_timeout_s=LIMIT_S, port=free_port("127.0.0.1")))
    server = SGLangServer(config, path, "float32", 0, tmp_path / "server.log")
    server.launch = servers.launch
    with server:
        url = server.wait_ready()
        pid = server.pid
        layout = ServerLayout.from_config(path, 1, torch.float32)
        setup = Setup(url, driver_of(server, path), model, path, layout, tmp_path / "sync")
        assert setup.share() >= 1 and setup.share() < SMALL
        server.stop()
        server.start()
        assert server.wait_ready() == url and server.pid != pid
        setup.weights.connect([url])
        caplog.clear()
        assert setup.share() >= 1
        assert "a server restarted" in caplog.text
        assert setup.share() < SMALL
        setup.weights.close()
    assert not list((tmp_path / "sync").iterdir())


def test_a_server_without_the_loader_is_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "DELTA_LOADER", "another.loader")
    with pytest.raises(ServerRequestError, match=r"--custom-weight-loader another\.loader"):
        setup.sync()
    assert f"{load.__module__}.{load.__name__}" == DELTA_LOADER
