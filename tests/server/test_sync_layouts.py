"""Weights from trainers of every layout into servers of every layout, by every transport, and what the probe finds.

Real ranks push to real servers. Before each push the weights change; after it the server's log-probs of fixed tokens
are compared with the trainer's own. `make test` gives each pair of trainer and server one bucket size for each
transport, `make layouts` all of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.config.schema import RunConfig, ServerConfig, SyncConfig
from drpo_megatron.rollout.errors import ServerRequestError
from drpo_megatron.rollout.server import SGLangServer
from drpo_megatron.rollout.server_args import with_delta_loader
from tests.ranks.test_train_step import run_config
from tests.support import tiny_models
from tests.support.launch import run_ranks

pytestmark = [pytest.mark.server, pytest.mark.distributed]

TRANSPORTS = ("distributed", "shared_memory", "disk", "delta")
BUCKETS_MB = {"one tensor": 1e-6, "some": 0.05, "all": 64.0}
TOLERANCE = 1e-4
# So much the change before a push moves the log-probs, at least.
MOVED = 1e-2

# Two ranks each, so that one launch goes through all of them.
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp1": ("qwen3", {"data": 2}),
    "tp2": ("qwen3", {"tensor": 2, "sequence_parallel": True}),
    "pp2": ("qwen3", {"pipeline": 2}),
    "ep2": ("qwen3_moe", {"data": 2, "expert": 2}),
}
WHOLE = "DRPO_LAYOUTS" in os.environ
SERVERS = (("qwen3", 1), ("qwen3", 2), ("qwen3_moe", 1)) + ((("qwen3_moe", 2),) if WHOLE else ())
"""Model, tensor-parallel size."""


@dataclass(frozen=True)
class Pushes:
    """What one trainer sends to one server: (transport, name of the bucket size), in order."""

    trainer: str
    tensor_parallel: int
    url: str
    ways: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Pushed:
    """What one push left. moved: how far the server's log-probs went; difference: from the trainer's, the largest."""

    name: str
    difference: float
    moved: float
    tensors: int
    buckets: int
    verified: int


def configuration(model: Path, parallel: dict[str, Any], tensor_parallel: int) -> RunConfig:
    raw = run_config(model, parallel).model_dump()
    raw["rollout"]["server"]["tensor_parallel"] = tensor_parallel
    return RunConfig.model_validate(raw)


class Trainer:
    """A policy of one layout whose weights are a function of a number, and its way to one server. Collective."""

    def __init__(self, models: dict[str, Path], pushes: Pushes) -> None:
        from drpo_megatron.rollout.experts import RoutedExpertsFormat
        from drpo_megatron.sync.verify import ServerLayout
        from drpo_megatron.training.probe import SyncProbe
        from drpo_megatron.training.step import Policy

        family, parallel = TRAINERS[pushes.trainer]
        self.path, self.url = models[family], pushes.url
        self.config = configuration(self.path, parallel, pushes.tensor_parallel)
        self.policy = Policy(self.config)
        self.probe = SyncProbe(self.config, self.policy.hf.vocab_size)
        self.experts = RoutedExpertsFormat.load(self.path)
        self.layout = ServerLayout.from_config(self.path, pushes.tensor_parallel, torch.float32)
        self.parameters = {
            f"{i}.{name}": p for i, module in enumerate(self.policy.modules) for name, p in module.named_parameters()
        }
        self.before = {name: p.detach().clone() for name, p in self.parameters.items()}

    def change(self, number: int) -> None:
        """The same function of every element, so that copies of a parameter stay equal over ranks."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                before = self.before[name]
                parameter.copy_(before + 0.05 * torch.sin(1000 * before + number))

    def push(self, transport: str, bucket_mb: float, number: int, spoil: str = "") -> Any:
        """A push by a connection of its own. spoil: a tensor that is sent wrong. The report on rank 0."""
        from drpo_megatron.sync.push import WeightSync
        from drpo_megatron.weights.exporter import iter_hf_tensors

        settings = SyncConfig(transport=transport, bucket_mb=bucket_mb, timeout_s=120)
        buckets = iter_hf_tensors(self.policy.modules, self.policy.hf, bucket_bytes=max(1, int(bucket_mb * 2**20)))
        if torch.distributed.get_rank() != 0:
            for _ in buckets:
                pass
            return None
        weights = WeightSync(settings, self.layout, self.path, self.path.parent / "sync")
        weights.connect([self.url])
        tensors = itertools.chain.from_iterable(buckets)
        report = weights.push(((n, 1.5 * t if n == spoil else t) for n, t in tensors), number)
        weights.close()
        return report

    def scores(self) -> Any:
        """The server's, on all ranks."""
        from drpo_megatron.rollout.probe import score_on_servers
        from drpo_megatron.training.run import from_rank_0

        mine = None
        if torch.distributed.get_rank() == 0:
            mine = score_on_servers([self.url], self.probe.token_ids, 120, self.experts)
        return from_rank_0(mine)

    def difference(self, scores: Any) -> float:
        """Largest, in nats; 0 but on rank 0. Raises ProbeMismatch there."""
        return self.probe.compare(self.policy, scores)["sync/probe_abs_dlogp_max"]

    def found(self) -> Any:
        """The ProbeMismatch that the probe raises now, as (difference, names, message); None but on rank 0."""
        from drpo_megatron.training.probe import ProbeMismatch

        try:
            self.difference(self.scores())
        except ProbeMismatch as error:
            return error.difference, error.names, str(error)
        return None


def push_on_ranks(models: dict[str, Path], plan: list[Pushes]) -> tuple[list[Pushed], dict[str, Any]]:
    """Every push of the plan, and what the probe finds when something was planted, by trainer. On rank 0."""
    from drpo_megatron.platform import distributed

    pushed: list[Pushed] = []
    planted: dict[str, Any] = {}
    for index, pushes in enumerate(plan):
        config = configuration(models[TRAINERS[pushes.trainer][0]], TRAINERS[pushes.trainer][1], 1)
        (distributed.change_layout if index else distributed.initialize)(config.layout, timeout_s=300, seed=0)
        trainer = Trainer(models, pushes)
        last = trainer.scores()[pushes.url].logprobs_P
        for number, (transport, size) in enumerate(pushes.ways):
            trainer.change(100 * index + number)
            report = trainer.push(transport, BUCKETS_MB[size], number)
            scores = trainer.scores()
            difference = trainer.difference(scores)
            now = scores[pushes.url].logprobs_P
            if report:
                name = f"{pushes.trainer} to tp{pushes.tensor_parallel} by {transport}, {size}"
                moved = float(abs(now - last).max())
                pushed.append(Pushed(name, difference, moved, report.tensors, report.buckets, report.verified))
            last = now
        planted[f"{pushes.trainer}-{pushes.tensor_parallel}"] = plant(trainer)
    distributed.shutdown()
    return pushed, planted


def plant(trainer: Trainer) -> dict[str, Any]:
    """What the probe finds: a weight that is wrong in the trainer, one in the server, and norms of another epsilon."""
    found = {}
    wrong = [
        p for name, p in trainer.parameters.items() if name.endswith(".layers.1.self_attention.linear_proj.weight")
    ]
    for parameter in wrong:
        parameter.data.mul_(1.5)
    found["trainer"] = trainer.found()
    for parameter in wrong:
        parameter.data.div_(1.5)
    spoiled = (
        "model.layers.1.mlp.experts.5.down_proj.weight" if trainer.experts else "model.layers.2.mlp.up_proj.weight"
    )
    trainer.push("shared_memory", 64.0, 1, spoil=spoiled)
    found["server"] = trainer.found()
    trainer.push("shared_memory", 64.0, 2)
    found["nothing"] = trainer.found()
    for module in trainer.policy.modules:
        for part in module.modules():
            if hasattr(part, "eps"):
                part.eps = 0.3
    found["engine"] = trainer.found()
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tiny_models.write("qwen3", root / "qwen3")
    # SGLang makes every layer of this family a mixture of experts, whatever the configuration says.
    tiny_models.write("qwen3_moe", root / "qwen3_moe", mlp_only_layers=[])
    return {family: root / family for family, _ in SERVERS}


@pytest.fixture(scope="module")
def servers(models: dict[str, Path]) -> Iterator[dict[tuple[str, int], SGLangServer]]:
    """By model and tensor-parallel size. They start together."""
    with ExitStack() as started:
        servers = {}
        for family, ranks in SERVERS:
            config = with_delta_loader(ServerConfig(tensor_parallel=ranks, start_timeout_s=600))
            log = models[family].parent / f"{family}-{ranks}.log"
            server = SGLangServer(config, models[family], "float32", 0, log, routed_experts=family == "qwen3_moe")
            servers[family, ranks] = started.enter_context(server)
        for server in servers.values():
            server.wait_ready()
        yield servers


def make_plan(servers: dict[tuple[str, int], SGLangServer], *, whole: bool) -> list[Pushes]:
    """whole: every bucket size for every transport; otherwise one, another for the next pair."""
    plan = []
    turns = itertools.cycle(itertools.permutations(BUCKETS_MB))
    for trainer, (family, _) in TRAINERS.items():
        for (model, ranks), server in servers.items():
            if model == family:
                some = tuple(zip(TRANSPORTS, itertools.cycle(next(turns)), strict=False))
                ways = tuple(itertools.product(TRANSPORTS, BUCKETS_MB)) if whole else some
                plan.append(Pushes(trainer, ranks, server.url, ways))
    return plan


def test_trainer_and_server_agree_after_every_push(
    models: dict[str, Path], servers: dict[tuple[str, int], SGLangServer]
) -> None:
    plan = make_plan(servers, whole=WHOLE)
    pushed, planted = run_ranks(2, push_on_ranks, models, plan, timeout_s=1800)[0]
    assert len(pushed) == sum(len(pushes.ways) for pushes in plan) >= 3 * 7
    for push in pushed:
        print(push)
        assert push.difference < TOLERANCE, push
        assert push.moved > MOVED, push
        assert push.verified > 0
        assert push.buckets == (push.tensors if push.name.endswith("one tensor") else min(push.buckets, push.tensors))
        assert push.name.endswith("all") == (push.buckets == 1), push
    for name, found in planted.items():
        check_planted(name, found)


def check_planted(name: str, found: dict[str, Any]) -> None:
    """The run stops with the tensor's name, or with the word that none differs."""
    assert found["nothing"] is None, name
    layer = "model.layers.1.self_attn.o_proj.weight"
    moe = name.startswith("ep2")
    names = {
        "trainer": [layer],
        "server": ["model.layers.1.mlp.experts.5.down_proj.weight" if moe else "model.layers.2.mlp.up_proj.weight"],
        "engine": [],
    }
    for where, expected in names.items():
        difference, differing, message = found[where]
        print(name, where, difference)
        assert difference > 0.01, (name, where)
        assert set(expected) <= set(differing), (name, where, differing)
        said = expected[0] if where == "trainer" else "tensors that differ" if differing else "no tensor differs"
        assert said in message and "sync.probe_tolerance is 0.001" in message, message
        assert len(differing) <= (16 if moe else 2), differing


def test_the_files_stay_until_every_rank_of_the_server_has_them(
    models: dict[str, Path], servers: dict[tuple[str, int], SGLangServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's first rank answers when it has loaded them itself; a rank that finds nothing ends the server."""
    from drpo_megatron.rollout.admin import ServerAdmin
    from drpo_megatron.sync.push import WeightSync
    from drpo_megatron.sync.verify import ServerLayout

    path, server = models["qwen3"], servers["qwen3", 2]
    directory = path.parent / "files"
    wait_for_ranks = ServerAdmin.wait_for_ranks
    files: list[int] = []

    def record(self: ServerAdmin, timeout_s: float) -> None:
        wait_for_ranks(self, timeout_s)
        files.append(len(list(directory.glob("*/*/*.safetensors"))))

    monkeypatch.setattr(ServerAdmin, "wait_for_ranks", record)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = WeightSync(
        SyncConfig(transport="disk", timeout_s=120), ServerLayout.from_config(path, 2, torch.float32), path, directory
    )
    weights.connect([server.url])
    assert weights.push(model.state_dict().items(), 1).verified
    assert files == [1] and not list(directory.glob("*/*"))
    weights.close()

    # The wait is for all of them: it does not end while one of them cannot go on.
    ranks = {p.pid for p in psutil.Process(server.pid).children(recursive=True)}
    (second,) = [
        p for p in psutil.process_iter(["cmdline"]) if p.pid in ranks and "scheduler_TP1" in " ".join(p.info["cmdline"])
    ]
    second.suspend()
    try:
        with pytest.raises(ServerRequestError, match="did not answer"):
            wait_for_ranks(ServerAdmin(server.url), 2.0)
    finally:
        second.resume()
    wait_for_ranks(ServerAdmin(server.url), 60.0)
