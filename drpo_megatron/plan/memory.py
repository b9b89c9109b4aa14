"""Bytes on one device: of the trainer's fullest rank of each stage, and of a server's rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.models.memory import AdamBytes, ModelStateMemory
from drpo_megatron.plan.activations import ActivationModel, Kernels, StagePeak, loss_bytes, stage_peak
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import Device
from drpo_megatron.plan.parameters import Stage, rank_parameters, stages_of, states_of
from drpo_megatron.plan.workload import Workload
from drpo_megatron.platform.layout import ParallelLayout

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
# The gathered parameters of a bucket, their flattened copy, and the copy before it that is still on the wire.
_BUCKET_COPIES = 3


@dataclass(frozen=True)
class TrainerMemory:
    """One rank of a pipeline stage. parameters: elements by kind. sync: copies of buckets, while nothing is trained."""

    stage: Stage
    parameters: Counter[str]
    states: ModelStateMemory
    peak: StagePeak
    sync: float
    reserved: float

    @property
    def training(self) -> float:
        return self.states.total + self.peak.total + self.reserved

    @property
    def total(self) -> float:
        """At the fullest moment of a step."""
        return self.states.total + max(self.peak.total, self.sync) + self.reserved

    def by_kind(self) -> dict[str, float]:
        return {
            "weights": self.states.weights,
            "gradients": self.states.gradients,
            "optimizer": self.states.optimizer,
            "activations": self.peak.activations,
            "loss": self.peak.loss,
            "sync buckets": self.sync,
            "reserved": self.reserved,
            "total": self.total,
        }


def trainer_memory(
    config: RunConfig, hf: HFModelConfig, workload: Workload, assumptions: Assumptions, kernels: Kernels
) -> list[TrainerMemory]:
    """The fullest rank of each stage. Raises ValueError when the model does not divide over the layout."""
    layout, element = config.layout, ELEMENT_BYTES[config.model.dtype]
    activations = ActivationModel(hf, layout, element, kernels)
    tokens = workload.micro_batch_tokens(layout)
    projection = config.algorithm.projection
    loss = loss_bytes(
        hf, layout, element, tokens * workload.trained_share, projection.memory_budget, projection.backend
    )
    made = []
    for stage in stages_of(hf, layout):
        elements = rank_parameters(hf, layout, stage)
        made.append(
            TrainerMemory(
                stage,
                elements,
                states_of(elements, layout, element, config.optimizer.distributed, AdamBytes.of(config)),
                stage_peak(activations, stage, config.model.recompute, tokens, loss, workload.micro_batches(layout)),
                sync=_BUCKET_COPIES * config.sync.bucket_mb * 2**20,
                reserved=assumptions.reserved_gb * 1e9,
            )
        )
    return made


@dataclass(frozen=True)
class ServerMemory:
    """One rank of a server. kv_token: bytes of KV cache a token. available: bytes for weights and KV cache."""

    weights: float
    kv_token: float
    available: float

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit, in all ranks together: each has its heads of the same tokens."""
        return max(0, int((self.available - self.weights) / self.kv_token))


def server_memory(config: RunConfig, hf: HFModelConfig, device: Device, assumptions: Assumptions) -> ServerMemory:
    """Experts are divided by rows, or with `ep_size` among the server's arguments by whole experts: as many bytes."""
    ranks, element = config.rollout.server.tensor_parallel, ELEMENT_BYTES[config.model.dtype]
    layout = _server_layout(ranks, hf)
    elements = rank_parameters(hf, layout, stages_of(hf, layout)[0])
    if hf.mla is None:
        kv_width = 2 * max(1, hf.num_kv_heads // ranks) * hf.head_dim
    else:
        kv_width = hf.mla.kv_lora_rank + hf.mla.qk_rope_head_dim  # the latent, on every rank
    return ServerMemory(
        weights=elements.total() * element,
        kv_token=hf.num_layers * kv_width * element,
        available=assumptions.server_memory_fraction * device.memory,
    )


def _server_layout(ranks: int, hf: HFModelConfig) -> ParallelLayout:
    return ParallelLayout(tensor=ranks, expert_tensor=ranks if hf.moe else 1)
