"""Weights from trainers of every layout into servers of every layout, by every transport, and what the probe finds.

Real ranks push to real servers. Before each push the weights change; after it the server's log-probs of fixed tokens
are compared with the trainer's own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.config.schema import RunConfig, SyncConfig
from tests.support.launch import run_ranks
from tests.support.server_pool import PooledServer
from tests.support.servers import LIMIT_S
from tests.support.updates import run_config

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
SERVERS = {"plain": ("qwen3", 1), "tp2": ("qwen3", 2), "moe": ("qwen3_moe", 1), "moe_tp2": ("qwen3_moe", 2)}
"""Kinds of the pool: model, tensor-parallel size."""


@dataclass(frozen=True)
class Pushes:
    """What one trainer sends to one server: (transport, name of the bucket size), in order. model: its directory.
    plant: also look at what the probe finds.
    """

    trainer: str
    tensor_parallel: int
    url: str
    model: Path
    directory: Path
    ways: tuple[tuple[str, str], ...]
    plant: bool


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

    def __init__(self, pushes: Pushes) -> None:
        from drpo_megatron.rollout.experts import RoutedExpertsFormat
        from drpo_megatron.sync.verify import ServerLayout
        from drpo_megatron.training.probe import SyncProbe
        from drpo_megatron.training.step import Policy

        parallel = TRAINERS[pushes.trainer][1]
        self.path, self.url, self.directory = pushes.model, pushes.url, pushes.directory
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

        settings = SyncConfig(transport=transport, bucket_mb=bucket_mb, timeout_s=LIMIT_S)
        buckets = iter_hf_tensors(self.policy.modules, self.policy.hf, bucket_bytes=max(1, int(bucket_mb * 2**20)))
        if torch.distributed.get_rank() != 0:
            for _ in buckets:
                pass
            return None
        weights = WeightSync(settings, self.layout, self.path, self.directory)
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
            mine = score_on_servers([self.url], self.probe.token_ids, LIMIT_S, self.experts)
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


def push_on_ranks(plan: list[Pushes]) -> tuple[list[Pushed], dict[str, Any]]:
    """Every push of the plan, and what the probe finds when something was planted, by trainer. On rank 0."""
    from drpo_megatron.platform import distributed

    pushed: list[Pushed] = []
    planted: dict[str, Any] = {}
    for index, pushes in enumerate(plan):
        config = configuration(pushes.model, TRAINERS[pushes.trainer][1], 1)
        (distributed.change_layout if index else distributed.initialize)(config.layout, timeout_s=LIMIT_S, seed=0)
        trainer = Trainer(pushes)
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
        if pushes.plant:
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


def pushes_to(
    pooled: PooledServer, trainer: str, ways: tuple[tuple[str, str], ...], directory: Path, *, plant: bool
) -> Pushes:
    family, ranks = SERVERS[pooled.kind]
    assert TRAINERS[trainer][0] == family
    return Pushes(trainer, ranks, pooled.url, pooled.model, directory, ways, plant)


def check_pushes(plan: list[Pushes]) -> None:
    """Carry the plan out, and assert that trainer and server agree after every push."""
    pushed, planted = run_ranks(2, push_on_ranks, plan, timeout_s=3600)[0]
    assert len(pushed) == sum(len(pushes.ways) for pushes in plan)
    for push in pushed:
        print(push)
        assert push.difference < TOLERANCE, push
        assert push.moved > MOVED, push
        assert push.verified > 0
        assert push.buckets == (push.tensors if push.name.endswith("one tensor") else min(push.buckets, push.tensors))
        assert push.name.endswith("all") == (push.buckets == 1), push
    assert len(planted) == sum(pushes.plant for pushes in plan)
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
