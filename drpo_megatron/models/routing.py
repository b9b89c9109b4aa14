"""Routers that take their experts from the rollout, say what they used, and carry the auxiliary losses.

The choice of a micro-batch travels with its packed-sequence parameters. Megatron-Core hands that object to every layer
in the forward and, when activations are recomputed, again to the same layer in the backward; so a router finds the
micro-batch it works on in any pipeline schedule and order of recomputation. Megatron-Core's own `RouterReplay` keeps
one list of targets in the process and takes them in the order of the forwards: it is not used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

NO_EXPERT = -1
"""Stands in a target where no rollout chose an expert: at padding."""


@dataclass(frozen=True)
class RouterTraining:
    """What trains the routers beside the policy's loss; 0 is off.

    aux_loss: coefficient of the load-balancing loss E·Σ_e f_e·P_e of a micro-batch, where f_e is the share of choices
    that fall on expert e (of the router's own top-k of its scores) and P_e its mean score; the loss is 1 when balanced.
    z_loss: of the mean squared log-sum-exp of the router's logits. Both are added for every layer. bias_update_rate:
    step of the bias of an expert, by the sign of its load's distance from the mean load, once an update.
    """

    aux_loss: float = 0.0
    z_loss: float = 0.0
    bias_update_rate: float = 0.0


class MicroBatchRouting:
    """What the routers of one model chunk follow in one micro-batch, and what they leave behind.

    experts_NLK: integer [N, L, K], the rollout's K experts of each of this rank's N tokens (its slice of them under
    sequence parallelism) in each of the model's L mixture-of-experts layers, in any order; NO_EXPERT at padding.
    trained_N: bool, the tokens that count in the comparison. replay: whether the routers use these experts, or their
    own and the two are only compared. num_tokens: tokens of the whole micro-batch without padding, those of other
    tensor and context parallel ranks included; num_update_tokens: of all micro-batches of the update on all ranks.

    `compared` counts (trained token, layer) pairs; `disagreements` those whose set of experts, as handed to the
    dispatcher, is another than the rollout's; `own_disagreements` those where the router's own choice is. All are
    scalar tensors, of this rank's tokens and the chunk's layers. `losses` has this micro-batch's and rank's part of the
    auxiliary losses, by name: without coefficient, summed over layers.
    """

    def __init__(
        self,
        experts_NLK: torch.Tensor,
        trained_N: torch.Tensor,
        *,
        replay: bool,
        num_tokens: int,
        num_update_tokens: int,
    ) -> None:
        self.experts_NLK = experts_NLK
        self.trained_N = trained_N
        self.replay = replay
        self.num_tokens = num_tokens
        self.num_update_tokens = num_update_tokens
        self.padding_N = experts_NLK[:, 0, 0] == NO_EXPERT
        zero = torch.zeros((), dtype=torch.int64, device=experts_NLK.device)
        self.compared, self.disagreements, self.own_disagreements = zero, zero, zero
        self.losses: dict[str, torch.Tensor] = {}
        self._observed: set[int] = set()

    def experts_of(self, layer: int) -> torch.Tensor:
        """int64 [N, K], of mixture-of-experts layer `layer`."""
        return self.experts_NLK[:, layer].long()

    def observe(self, layer: int, routing_map_NE: torch.Tensor, own_NK: torch.Tensor) -> None:
        """Compare what the router handed to the dispatcher, and its own choice, with the rollout's experts.

        A layer counts once: its recomputation is not another comparison.
        """
        if layer in self._observed:
            return
        self._observed.add(layer)
        target_NK = self.experts_of(layer)
        count = target_NK.size(1)
        # K distinct experts, all of them in a map of K experts: the two sets are one. Padding is never trained.
        used_N = routing_map_NE.gather(1, target_NK.clamp(min=0)).all(1) & (routing_map_NE.sum(1) == count)
        own_N = (own_NK[:, :, None] == target_NK[:, None, :]).any(2).all(1)
        self.compared = self.compared + self.trained_N.sum()
        self.disagreements = self.disagreements + (self.trained_N & ~used_N).sum()
        self.own_disagreements = self.own_disagreements + (self.trained_N & ~own_N).sum()

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        value = value.detach()
        self.losses[name] = self.losses[name] + value if name in self.losses else value


@dataclass
class RoutedSeqParams(PackedSeqParams):
    """Packed-sequence parameters that carry the routing of their micro-batch."""

    routing: MicroBatchRouting | None = None


class _RolloutTopK:
    """Stands where a router expects Megatron-Core's `RouterReplay`: chooses a token's experts, given their scores."""

    def __init__(self) -> None:
        self.layer_number: int | None = None  # set by the router
        self.target_NK: torch.Tensor | None = None
        self.own_NK: torch.Tensor | None = None

    def get_replay_topk(
        self,
        scores_NE: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores [N, K], experts [N, K]): the target's where it has experts, the router's own at padding."""
        with torch.no_grad():
            _, own_NK = default_compute_topk(scores_NE, topk, num_groups=num_groups, group_topk=group_topk)
        self.own_NK = own_NK
        chosen_NK = own_NK
        if self.target_NK is not None:
            chosen_NK = torch.where(self.target_NK == NO_EXPERT, own_NK, self.target_NK)
        return scores_NE.gather(1, chosen_NK), chosen_NK


class RolloutRouter(TopKRouter):
    """Megatron-Core's router, following the routing of the micro-batch it is bound to. Without one it is plain.

    Gradients reach the router through the scores of the experts that are used. Padding counts neither in the auxiliary
    losses nor in the loads that move the bias of the experts.

    The auxiliary losses carry their denominators, like the policy's loss: a micro-batch counts by its share of the
    update's tokens, so that the sum over micro-batches and ranks is a mean over the update. Megatron-Core would count
    on a division of all gradients by the number of tokens, which is not made here.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micro_batch: MicroBatchRouting | None = None
        self.router_replay = _RolloutTopK()

    @property
    def moe_layer(self) -> int:
        """Position of this layer among the model's mixture-of-experts layers, over all pipeline stages."""
        is_moe = self.config.moe_layer_freq
        assert isinstance(is_moe, list), "models.builder gives a list"
        return sum(is_moe[: self.layer_number - 1])

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [N, E], routing map [N, E]) of the tokens `input` [N, 1, H].

        Raises ValueError when the micro-batch's routing is of another number of tokens.
        """
        routing, choice = self.micro_batch, self.router_replay
        if routing is None:
            choice.target_NK = None
            return super().forward(input, padding_mask)
        if len(routing.padding_N) != len(input):
            raise ValueError(
                f"the router of layer {self.layer_number} sees {len(input)} tokens and the routing of its micro-batch "
                f"has {len(routing.padding_N)}: give each rank the routing of its own tokens"
            )
        choice.target_NK = routing.experts_of(self.moe_layer) if routing.replay else None
        weights_NE, routing_map_NE = super().forward(input, routing.padding_N[:, None])
        routing.observe(self.moe_layer, routing_map_NE, choice.own_NK)
        return weights_NE, routing_map_NE

    def is_aux_loss_enabled(self) -> bool:
        # The load of a micro-batch that is all padding would be 0 / 0.
        return super().is_aux_loss_enabled() and self._routing().num_tokens > 0

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """`activation`, with this rank's part of the micro-batch's loss in the backward.

        aux_loss: coefficient included; the parts of tensor and context parallel ranks sum to the micro-batch's.
        """
        routing = self._routing()
        part = aux_loss * (routing.num_tokens / routing.num_update_tokens)
        routing.add_loss("aux", part / aux_loss_coeff)
        carrying: torch.Tensor = MoEAuxLossAutoScaler.apply(activation, part)
        return carrying

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`logits` [N, E], with this rank's part of the z-loss in the backward.

        Megatron-Core takes the mean of its ranks' means, in which the tokens of a rank with much padding weigh more.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        routing = self._routing()
        real_tokens = (~routing.padding_N).sum()
        part = z_loss_func(logits, 1.0, padding_mask=padding_mask) * (real_tokens / routing.num_update_tokens)
        routing.add_loss("z", part)
        carrying: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, coefficient * part)
        return carrying

    def _routing(self) -> MicroBatchRouting:
        if self.micro_batch is None:
            raise ValueError("an auxiliary loss needs the routing of its micro-batch: pass it to forward_packed")
        return self.micro_batch

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        # Megatron-Core's own combines a mask of tokens with the map's columns.
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        super()._apply_expert_bias(routing_map)


def use_rollout_router(layer: TransformerLayerSubmodules) -> None:
    """Put `RolloutRouter` into the spec of a layer; does nothing to a dense one."""
    if isinstance(layer.mlp, functools.partial) and layer.mlp.func is MoELayer:
        layer.mlp.keywords["submodules"].router = RolloutRouter


def bind_routers(model: torch.nn.Module, config: TransformerConfig) -> None:
    """Let every layer hand the routing of the micro-batch it is called for to its router, in forward and recomputation.

    Raises ValueError when only parts of a layer are recomputed and its router is one of them: it would then be called
    without its layer.
    """
    if config.recompute_granularity == "selective" and "moe" in config.recompute_modules:
        raise ValueError("recompute_modules contains moe, which routes again without its layer: recompute whole layers")
    for layer in model.modules():
        if isinstance(getattr(layer, "mlp", None), MoELayer):
            layer.register_forward_pre_hook(_bind, with_kwargs=True)


def _bind(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer.mlp.router.micro_batch = getattr(kwargs["packed_seq_params"], "routing", None)
