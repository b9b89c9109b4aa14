"""Seconds of the updates of a step, from FLOPs at an assumed rate and bytes over links.

A micro-batch on a stage is computation and the communication that Megatron-Core does between its matrix products,
one after the other. 1F1B repeats the slowest stage's for each micro-batch, and once more for each further stage
(Narayanan et al. 2021, section 2.2: the bubble, divided by the chunks of a stage). Gradients are reduced behind the
last micro-batch's backward, as far as it lasts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.flops import SequenceCost, layer_weights, routed_weights, training_flops
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import Device
from drpo_megatron.plan.memory import ELEMENT_BYTES
from drpo_megatron.plan.parameters import EXPERTS, Stage, rank_parameters, stages_of
from drpo_megatron.plan.workload import Workload

# Collectives of a hidden state in a layer, forward and backward, under tensor parallelism; sequence parallelism gathers
# two more for the weights' gradients (Korthikanti et al. 2022, section 4.2.2). A recomputed forward repeats its own.
_FORWARD_COLLECTIVES, _BACKWARD_COLLECTIVES = 4, 6
_FORWARD_ROUTES, _BACKWARD_ROUTES = 2, 2


@dataclass(frozen=True)
class TrainSeconds:
    """Of all updates of a step. flops: useful ones, on all ranks together. The parts are the slowest stage's."""

    total: float
    flops: float
    micro_batches: int
    compute: float
    tensor: float
    expert: float
    bubble: float
    data: float

    def mfu(self, ranks: int, device: Device) -> float:
        """Useful FLOPs over what the ranks could do: recomputation and waiting count as nothing."""
        return self.flops / (self.total * ranks * device.flops_per_s)


@lru_cache
def step_flops(hf: HFModelConfig, workload: Workload) -> float:
    """Useful FLOPs of all updates of a step, when every sequence has the mean length."""
    lengths = [round(workload.length)] * workload.sequences
    return training_flops(hf, lengths, round(workload.response * workload.sequences))


_cost = lru_cache(SequenceCost.of)


@dataclass(frozen=True)
class _MicroBatch:
    compute: float
    tensor: float
    expert: float
    other: float

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.expert + self.other


class TrainModel:
    """Predicts the training of one configuration's layout on one kind of device."""

    def __init__(
        self, config: RunConfig, hf: HFModelConfig, workload: Workload, device: Device, assumptions: Assumptions
    ) -> None:
        self.config, self.hf, self.workload, self.device, self.assumed = config, hf, workload, device, assumptions
        self.layout = config.layout
        self.element = ELEMENT_BYTES[config.model.dtype]

    def predict(self) -> TrainSeconds:
        """Raises ValueError when the layers do not divide over the stages."""
        layout, workload = self.layout, self.workload
        count = workload.micro_batches(layout)
        stages = stages_of(self.hf, layout)
        tokens = workload.rank_sequences(layout) * workload.length / count
        slowest = max((self._micro_batch(stage, tokens) for stage in stages), key=lambda one: one.total)
        bubbles = (layout.pipeline - 1) / (layout.virtual_pipeline or 1)
        # Two thirds of a micro-batch are its backward.
        hidden = slowest.total * 2 / 3 if self.config.optimizer.overlap_grad_reduce else 0.0
        data = max(self._data_seconds(stage, hidden) for stage in stages)
        updates = workload.updates
        return TrainSeconds(
            total=updates * ((count + bubbles) * slowest.total + data),
            flops=step_flops(self.hf, workload),
            micro_batches=count,
            compute=updates * count * slowest.compute,
            tensor=updates * count * slowest.tensor,
            expert=updates * count * slowest.expert,
            bubble=updates * bubbles * slowest.total,
            data=updates * data,
        )

    def _micro_batch(self, stage: Stage, tokens: float) -> _MicroBatch:
        """tokens: of all context-parallel ranks together."""
        hf, layout, recompute = self.hf, self.layout, self.config.model.recompute
        own = tokens / layout.context
        quadratic = _cost(hf).quadratic / hf.num_layers * self.workload.length / 2
        dense = expert = 0.0
        for is_moe, number in Counter(map(hf.is_moe_layer, stage.layers)).items():
            layer = next(one for one in stage.layers if hf.is_moe_layer(one) == is_moe)
            routed = routed_weights(hf, layer)
            dense += number * (layer_weights(hf, layer) - routed + quadratic)
            expert += number * routed
        moe_layers = sum(map(hf.is_moe_layer, stage.layers))
        # Multiply-adds a token of forward and backward, with a recomputed forward where there is one.
        passes = 4 if recompute == "full" else 3
        dense = passes * dense + (len(stage.layers) * quadratic if recompute == "selective" else 0.0)
        if stage.last:
            share = self.workload.response / self.workload.length
            dense += 3 * hf.hidden_size * hf.vocab_size * share
        rate, assumed = self.device.flops_per_s, self.assumed
        compute = 2 * own * dense / layout.tensor / (rate * assumed.dense_utilization)
        compute += 2 * own * passes * expert * assumed.imbalance / layout.tensor / (rate * assumed.expert_utilization)
        return _MicroBatch(
            compute,
            self._tensor_seconds(own) * len(stage.layers),
            self._expert_seconds(own) * moe_layers,
            self._ring_seconds(own, quadratic) * len(stage.layers) + self._stage_seconds(own),
        )

    def _hidden_bytes(self, tokens: float) -> float:
        return tokens * self.hf.hidden_size * self.element

    def _link(self, ranks: int) -> float:
        """Bytes/s between neighbouring ranks that span so many devices in a row."""
        device = self.device
        link = device.nvlink_bytes_per_s if ranks <= device.node else device.network_bytes_per_s
        return link * self.assumed.link_utilization

    def _tensor_seconds(self, tokens: float) -> float:
        ranks = self.layout.tensor
        collectives = _FORWARD_COLLECTIVES * (2 if self.config.model.recompute == "full" else 1) + _BACKWARD_COLLECTIVES
        return collectives * self._hidden_bytes(tokens) * (ranks - 1) / ranks / self._link(ranks)

    def _expert_seconds(self, tokens: float) -> float:
        """All-to-all of tokens to experts and back: to peers of the node over NVLink, to others over the network."""
        layout, moe = self.layout, self.hf.moe
        span = layout.expert * layout.expert_tensor
        if moe is None or span == 1:
            return 0.0
        routes = _FORWARD_ROUTES * (2 if self.config.model.recompute == "full" else 1) + _BACKWARD_ROUTES
        sent = routes * self._hidden_bytes(tokens / layout.tensor) * moe.top_k * layout.expert_tensor
        in_node = min(span, self.device.node)
        near, far = (in_node - 1) / span, (span - in_node) / span
        return self.assumed.imbalance * sent * max(near / self._link(in_node), far / self._link(span))

    def _ring_seconds(self, tokens: float, quadratic: float) -> float:
        """Keys and values once around the context-parallel ranks, three times, where attention is shorter than that."""
        layout, hf = self.layout, self.hf
        if layout.context == 1:
            return 0.0
        width = hf.num_heads * hf.head_dim if hf.mla else hf.num_kv_heads * hf.head_dim
        sent = 3 * (layout.context - 1) * tokens * 2 * width / layout.tensor * self.element
        attention = 3 * 2 * tokens * quadratic / layout.tensor
        covered = attention / (self.device.flops_per_s * self.assumed.dense_utilization)
        return max(0.0, sent / self._link(layout.tensor * layout.context) - covered)

    def _stage_seconds(self, tokens: float) -> float:
        """A hidden state from the stage before, and its gradient back."""
        layout = self.layout
        if layout.pipeline == 1:
            return 0.0
        chunks = layout.virtual_pipeline or 1
        slices = layout.tensor if layout.sequence_parallel else 1
        ranks = layout.world_size
        return 2 * chunks * self._hidden_bytes(tokens) / slices / self._link(ranks)

    def _data_seconds(self, stage: Stage, hidden: float) -> float:
        """Gradients to the ranks that hold the optimizer's shards, of which `hidden` seconds cost nothing, and weights
        back.
        """
        layout = self.layout
        elements = rank_parameters(self.hf, layout, stage)
        dense_ranks = layout.context * layout.data
        expert_ranks = layout.tensor * dense_ranks // (layout.expert * layout.expert_tensor)
        reduce = gather = 0.0
        for number, ranks, span in (
            (elements.total() - elements[EXPERTS], dense_ranks, layout.tensor * dense_ranks),
            (elements[EXPERTS], expert_ranks, layout.expert * layout.expert_tensor * expert_ranks),
        ):
            seconds = number * (ranks - 1) / ranks / self._link(span)
            reduce += 4 * seconds
            gather += (self.element if self.config.optimizer.distributed else 4) * seconds
        return max(0.0, reduce - hidden) + gather
