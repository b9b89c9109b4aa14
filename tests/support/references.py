"""What transformers, autograd and torch's AdamW compute of the same updates, in float64: the independent side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.training.packing import TrainSequence
from tests.support.updates import CLIP, DELTA, EPS, LR, TEMPERATURE

Loss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(log π, log μ, advantage) of a sequence's sampled tokens to their losses."""


def drpo(logp_N: torch.Tensor, logmu_N: torch.Tensor, advantage: float) -> torch.Tensor:
    r_N = (logp_N - logmu_N).exp()
    return -advantage * r_N + abs(advantage) * logmu_N.exp() * (r_N - 1) ** 2 / (2 * DELTA)


def gspo(eps_low: float, eps_high: float) -> Loss:
    def loss(logp_N: torch.Tensor, logmu_N: torch.Tensor, advantage: float) -> torch.Tensor:
        s = (logp_N - logmu_N).mean().exp()
        clipped = s.clamp(1 - eps_low, 1 + eps_high)
        return -torch.minimum(advantage * s, advantage * clipped).expand(len(logp_N))

    return loss


@dataclass(frozen=True)
class Router:
    """What the routers of a mixture of experts are to do. `replay`: take the experts that the sequences name."""

    replay: bool = False
    aux_loss: float = 0.0
    z_loss: float = 0.0


@dataclass
class Reference:
    """What the updates left. logp_N: of all updates, within an update in the order of log μ.

    losses, grad_norms, balance, z: one an update. weights: by the names in the files. compared, own_disagreements:
    sampled tokens × layers of each update, and those of them where the routers' own choice is another set than the
    sequences name.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    balance: list[float] = field(default_factory=list)
    z: list[float] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    own_disagreements: list[int] = field(default_factory=list)
    logp_N: np.ndarray = field(default_factory=lambda: np.zeros(0))
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class ForcedGates:
    """Hooks on transformers' routers: they take the experts of `targets_PLK`, and keep logits and their own choice."""

    def __init__(self, model: Any, hf: HFModelConfig) -> None:
        self.moe = hf.moe
        self.targets_PLK: torch.Tensor | None = None
        gates = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        self.logits: list[Any] = [None] * len(gates)
        self.own: list[Any] = [None] * len(gates)
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda _, __, output, layer=layer: self._force(layer, output))

    def scores(self, logits_PE: torch.Tensor) -> torch.Tensor:
        return logits_PE.sigmoid() if self.moe.score_function == "sigmoid" else logits_PE.softmax(-1)

    def _force(self, layer: int, output: Any) -> Any:
        logits_PE, weights_PK, own_PK = output
        self.logits[layer], self.own[layer] = logits_PE, own_PK
        if self.targets_PLK is None:
            return output
        target_PK = self.targets_PLK[:, layer]
        weights = self.scores(logits_PE).gather(1, target_PK)
        weights = self.moe.scaling_factor * weights / weights.sum(-1, keepdim=True)
        return logits_PE, weights.to(weights_PK.dtype), target_PK

    def disagreements(self, target_PLK: torch.Tensor, sampled_P: torch.Tensor) -> int:
        """Sampled tokens × layers whose own choice is another set than the target."""
        own_PLK = torch.stack(self.own, dim=1)
        differs_PL = (own_PLK.sort(-1).values != target_PLK.sort(-1).values).any(-1)
        return int(differs_PL[sampled_P].sum())

    def auxiliary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(load-balancing loss of this sequence, sum of squared log-sum-exp over its tokens), summed over layers."""
        balance, z = torch.zeros(()), torch.zeros(())
        for logits_PE in self.logits:
            scores_PE = self.scores(logits_PE)
            scores_PE = scores_PE / scores_PE.sum(-1, keepdim=True)
            chosen_PK = scores_PE.topk(self.moe.top_k).indices
            share_E = torch.bincount(chosen_PK.flatten(), minlength=self.moe.num_experts) / chosen_PK.numel()
            balance = balance + self.moe.num_experts * (share_E * scores_PE.mean(0)).sum()
            z = z + logits_PE.logsumexp(-1).square().sum()
        return balance, z


def train(
    path: Path,
    updates: Sequence[Sequence[TrainSequence]],
    loss: Loss = drpo,
    *,
    lr: float = LR,
    eps: float = EPS,
    router: Router | None = None,
) -> Reference:
    """Updates of the model at `path`, one sequence at a time. In float64 but for what transformers' routers compute in
    float32. An auxiliary loss of a router weighs each sequence by its share of the update's positions.
    """
    hf = HFModelConfig.load(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    gates = ForcedGates(model, hf) if hf.moe is not None else None
    router = router or Router()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, eps=eps)
    found = Reference()
    for sequences in updates:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        balance, z = torch.zeros(()), torch.zeros(())
        positions = sum(s.num_positions for s in sequences)
        compared, differing, logp, logmu = 0, 0, [], []
        for s in sequences:
            tokens_L = torch.from_numpy(s.token_ids_L.astype(np.int64))
            if gates is not None and router.replay:
                gates.targets_PLK = torch.from_numpy(s.routed_experts_PLK).long()
            logp_LV = torch.log_softmax(model(tokens_L[None, :-1]).logits[0] / TEMPERATURE, -1)
            logp_L = logp_LV.gather(1, tokens_L[1:, None])[:, 0]
            mask_L, logmu_L = torch.from_numpy(s.sampled_L[1:]), torch.from_numpy(s.logmu_L[1:])
            total = total + s.weight * loss(logp_L[mask_L], logmu_L[mask_L], s.advantage).sum()
            logp.append(logp_L[mask_L].detach())
            logmu.append(logmu_L[mask_L])
            if gates is not None:
                own_balance, own_z = gates.auxiliary()
                balance, z = balance + own_balance * s.num_positions / positions, z + own_z / positions
                if s.routed_experts_PLK is not None:
                    compared += int(mask_L.sum()) * sum(hf.moe.layers)
                    differing += gates.disagreements(torch.from_numpy(s.routed_experts_PLK).long(), mask_L)
        (total + router.aux_loss * balance + router.z_loss * z).backward()
        for parameter in model.parameters():
            if parameter.grad is None:  # experts without a token: Adam counts the step all the same
                parameter.grad = torch.zeros_like(parameter)
        found.losses.append(float(total.detach()))
        found.grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        order_N = torch.cat(logmu).argsort()
        found.logp_N = np.append(found.logp_N, torch.cat(logp)[order_N].numpy())
        found.balance.append(float(balance.detach()))
        found.z.append(float(z.detach()))
        found.compared.append(compared)
        found.own_disagreements.append(differing)
    weights = revert_weight_conversion(model, {n: p.detach().clone() for n, p in model.named_parameters()})
    found.weights = {name: weight.clone() for name, weight in weights.items()}
    return found
