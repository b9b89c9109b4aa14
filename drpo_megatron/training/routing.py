"""Routing of an update: from packed micro-batches to the routers of this rank, and from them to the step's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from drpo_megatron.config.schema import ModelConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.models.hf_sections import MoEConfig
from drpo_megatron.models.routing import MicroBatchRouting, RouterTraining
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.records import Metrics, TrainBatch


@dataclass(frozen=True)
class RoutingStats:
    """What the routers of one rank leave behind in one update: its own tokens and layers. Sums over ranks are the
    update's.

    compared, disagreements, own_disagreements: (trained token, layer) pairs (`MicroBatchRouting`). aux_loss, z_loss:
    the rank's part of the sum over layers, without coefficient; 0 where the coefficient is.
    """

    compared: int
    disagreements: int
    own_disagreements: int
    aux_loss: float
    z_loss: float
    model_layers: int
    """Mixture-of-experts layers of the whole model."""


def router_training(model: ModelConfig) -> RouterTraining:
    return RouterTraining(model.moe_aux_loss_coefficient, model.moe_z_loss_coefficient, model.moe_bias_update_rate)


class UpdateRouting:
    """The routings of one update on this rank, one for each forward of a model chunk."""

    def __init__(self, hf: HFModelConfig, layout: ParallelLayout, *, replay: bool) -> None:
        """hf: a mixture of experts. replay: whether routers take the rollout's experts."""
        assert hf.moe is not None
        self._moe: MoEConfig = hf.moe
        self._layout = layout
        self._replay = replay
        self._routings: list[MicroBatchRouting] = []

    def micro_batch(self, batch: TrainBatch) -> MicroBatchRouting:
        """The routing of this rank's tokens of `batch`, on the batch's device.

        Raises ValueError when the batch has no routed experts, or those of another model.
        """
        experts_TLK, expected = batch.routed_experts_TLK, (sum(self._moe.layers), self._moe.top_k)
        if experts_TLK is None:
            raise ValueError("the model is a mixture of experts and its rollouts have no routed experts: record them")
        if experts_TLK.shape[1:] != expected:
            raise ValueError(
                f"the rollouts have routed experts of {list(experts_TLK.shape[1:])} (layers, experts a token) and the "
                f"model has {list(expected)}: they must come from the same model"
            )
        experts_NLK, trained_N = experts_TLK, batch.mask_T
        if self._layout.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            experts_NLK, trained_N = (t.chunk(self._layout.tensor)[rank] for t in (experts_NLK, trained_N))
        routing = MicroBatchRouting(
            experts_NLK,
            trained_N,
            replay=self._replay,
            num_tokens=batch.num_tokens,
            num_update_tokens=batch.num_update_tokens,
        )
        self._routings.append(routing)
        return routing

    def stats(self) -> RoutingStats:
        """Of the forwards and backwards since the beginning. One transfer from the device."""
        zero = torch.zeros((), device=self._routings[0].padding_N.device)
        sums = torch.stack(
            [
                torch.stack(
                    [r.compared, r.disagreements, r.own_disagreements]
                    + [r.losses.get(name, zero) for name in ("aux", "z")]
                ).double()
                for r in self._routings
            ]
        ).sum(0)
        compared, disagreements, own_disagreements, aux_loss, z_loss = sums.tolist()
        return RoutingStats(
            int(compared), int(disagreements), int(own_disagreements), aux_loss, z_loss, sum(self._moe.layers)
        )


def expert_biases(modules: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """The biases that steer the choice of experts: buffers, moved with every update and not by the optimizer."""
    return [b for module in modules for name, b in module.named_buffers() if name.endswith(".router.expert_bias")]


def routing_metrics(updates: Sequence[Sequence[RoutingStats]], config: ModelConfig) -> Metrics:
    """`updates[update][rank]`. Disagreements are of the first update, whose weights sampled the rollouts; losses are
    means over the layers and updates.
    """
    first = updates[0]
    compared = max(sum(stats.compared for stats in first), 1)
    metrics = {
        "mismatch/router_disagreement": sum(stats.disagreements for stats in first) / compared,
        "router/own_disagreement": sum(stats.own_disagreements for stats in first) / compared,
    }
    every = [stats for update in updates for stats in update]
    count = len(updates) * first[0].model_layers
    if config.moe_aux_loss_coefficient:
        metrics["moe/aux_loss"] = sum(stats.aux_loss for stats in every) / count
    if config.moe_z_loss_coefficient:
        metrics["moe/z_loss"] = sum(stats.z_loss for stats in every) / count
    return metrics
