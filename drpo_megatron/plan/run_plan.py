"""The plan of one configuration: does it fit, and how long is a step."""

from __future__ import annotations

from dataclasses import dataclass

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig, check_layout
from drpo_megatron.plan.activations import Kernels
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import Device
from drpo_megatron.plan.memory import ServerMemory, TrainerMemory, server_memory, trainer_memory
from drpo_megatron.plan.parameters import total_parameters
from drpo_megatron.plan.serve_seconds import (
    GenerateSeconds,
    SyncSeconds,
    generate_seconds,
    save_seconds,
    servers_of,
    sync_seconds,
)
from drpo_megatron.plan.train_seconds import TrainModel, TrainSeconds
from drpo_megatron.plan.workload import Workload


@dataclass(frozen=True)
class Plan:
    """What a configuration needs on `device`. generate is None where a server does not fit."""

    config: RunConfig
    device: Device
    assumptions: Assumptions
    workload: Workload
    parameters: int
    stages: list[TrainerMemory]
    server: ServerMemory
    train: TrainSeconds
    generate: GenerateSeconds | None
    sync: SyncSeconds
    save: tuple[int, float]

    @property
    def fullest(self) -> TrainerMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def trainer_bytes(self) -> float:
        """On the trainer's fullest device, with a server's rank where both share it (docs/rollouts.md has the turns).

        Colocated, the sync holds the weights of both.
        """
        if not self.colocated:
            return self.fullest.total
        syncing = max(stage.states.weights + stage.sync + stage.reserved for stage in self.stages)
        return max(max(stage.training for stage in self.stages), syncing + self.server.weights)

    @property
    def colocated(self) -> bool:
        return self.config.rollout.placement == "colocated"

    @property
    def trainer_fits(self) -> bool:
        return self.trainer_bytes <= self.device.memory

    @property
    def server_fits(self) -> bool:
        """Whether it holds the longest sequence that the settings allow."""
        return self.server.kv_tokens >= self.workload.longest

    @property
    def fits(self) -> bool:
        return self.trainer_fits and self.server_fits

    @property
    def ranks(self) -> int:
        return self.config.layout.world_size

    @property
    def devices(self) -> int:
        servers = servers_of(self.config) * self.config.rollout.server.tensor_parallel
        return max(self.ranks, servers) if self.colocated else self.ranks + servers

    @property
    def step_seconds(self) -> float:
        """Rollouts ahead of training overlap with it; checkpoints count by how often they are made."""
        generate = self.generate.total if self.generate else float("inf")
        ahead = self.config.rollout.schedule != "synchronous"
        both = max(generate, self.train.total) if ahead else generate + self.train.total
        every = self.config.save.every
        return both + self.sync.total + (self.save[1] / every if every else 0.0)


def make_plan(
    config: RunConfig,
    hf: HFModelConfig,
    device: Device,
    assumptions: Assumptions | None = None,
    kernels: Kernels = "transformer_engine",
) -> Plan:
    """Raises ValueError when the layout cannot be built, or the model does not divide over it."""
    assumed = assumptions or Assumptions.of(config)
    check_layout(hf, config.layout)
    workload = Workload.of(config, assumed)
    stages = trainer_memory(config, hf, workload, assumed, kernels)
    server = server_memory(config, hf, device, assumed)
    generate = None
    if server.kv_tokens >= workload.longest:
        generate = generate_seconds(config, hf, workload, server, device, assumed)
    saved = max(stage.states.weights + stage.states.optimizer for stage in stages)
    return Plan(
        config,
        device,
        assumed,
        workload,
        total_parameters(hf),
        stages,
        server,
        TrainModel(config, hf, workload, device, assumed).predict(),
        generate,
        sync_seconds(config, hf, device, assumed),
        save_seconds(config, hf, assumed, saved),
    )
