"""From scored groups to packed micro-batches.

Rank 0 turns groups into `TrainSequence`s, whose `weight` already holds the aggregation with its global denominator;
every rank packs the same list with the same deterministic rule and keeps its data-parallel share. So the loss cannot
depend on how sequences fall into micro-batches or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from drpo_megatron.algorithms import sequence_weights
from drpo_megatron.records import RolloutGroup, TrainBatch


@dataclass(frozen=True)
class TrainSequence:
    """One rollout, ready to train on. L is the length of prompt + response.

    token_ids_L int32; sampled_L bool: the policy sampled this token; logmu_L float32 and version_L int32: meaningful
    where sampled; advantage: of every sampled token; weight: of every sampled token in the loss of its update.
    routed_experts_PLK: `Rollout.routed_experts`, P = num_positions.
    """

    token_ids_L: np.ndarray
    sampled_L: np.ndarray
    logmu_L: np.ndarray
    version_L: np.ndarray
    advantage: float
    weight: float
    routed_experts_PLK: np.ndarray | None = None

    @property
    def num_positions(self) -> int:
        """Positions the model computes: the last token predicts nothing that was sampled, so it is not an input."""
        return len(self.token_ids_L) - 1


def train_sequences(groups: Sequence[RolloutGroup], aggregation: str, horizon: int) -> list[TrainSequence]:
    """The sequences of one update. `groups` is the whole global batch of that update: the denominators are taken over
    it.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    weights_S = sequence_weights(aggregation, [sum(r.response_mask) for r in rollouts], horizon=horizon)
    sequences = []
    for rollout, weight in zip(rollouts, weights_S, strict=True):
        num_prompt = len(rollout.prompt.token_ids)
        nothing = [0] * num_prompt
        sequences.append(
            TrainSequence(
                token_ids_L=np.asarray(rollout.prompt.token_ids + rollout.response_ids, dtype=np.int32),
                sampled_L=np.asarray(nothing + rollout.response_mask, dtype=bool),
                logmu_L=np.asarray(nothing + rollout.logmu, dtype=np.float32),
                version_L=np.asarray(nothing + rollout.weight_versions, dtype=np.int32),
                advantage=float(rollout.advantage),
                weight=float(weight),
                routed_experts_PLK=rollout.routed_experts,
            )
        )
    return sequences


def partition(
    lengths: Sequence[int], num_ranks: int, token_budget: int, count_multiple: int = 1
) -> list[list[list[int]]]:
    """Split sequences into micro-batches: `[rank][micro-batch] -> indices`, equally many micro-batches on each rank.

    Longest first into the emptiest micro-batch; the number of micro-batches grows until each fits `token_budget` (a
    longer sequence is alone) and is a multiple of `count_multiple`. A micro-batch may be empty. Deterministic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, math.ceil(sum(lengths) / (num_ranks * token_budget)))
    while True:
        per_rank = math.ceil(per_rank / count_multiple) * count_multiple
        bins: list[list[int]] = [[] for _ in range(num_ranks * per_rank)]
        loads = [0] * len(bins)
        for i in order:
            emptiest = min(range(len(bins)), key=lambda b: (loads[b], b))
            bins[emptiest].append(i)
            loads[emptiest] += lengths[i]
        if all(load <= token_budget or len(b) == 1 for load, b in zip(loads, bins, strict=True)):
            # Bin b goes to rank b mod ranks, so that the fullest bins are spread over the ranks.
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        per_rank += 1


def pack(
    sequences: Sequence[TrainSequence],
    *,
    data_rank: int,
    data_size: int,
    token_budget: int,
    pad_multiple: int,
    count_multiple: int,
    version: int,
) -> list[TrainBatch]:
    """The micro-batches of one data-parallel rank, all padded to one length so that pipeline stages agree on shapes.

    pad_multiple: the length is a multiple of this (tensor-parallel size under sequence parallelism).
    count_multiple: the number of micro-batches is (pipeline size for the interleaved schedule).
    version: the trainer's weight version, from which staleness is counted. Raises ValueError when some sequences have
    routed experts and others do not, or not one a position.
    """
    lengths = [s.num_positions for s in sequences]
    shares = partition(lengths, data_size, token_budget, count_multiple)
    longest = max(sum(lengths[i] for i in indices) for share in shares for indices in share)
    padded = math.ceil(max(longest, 1) / pad_multiple) * pad_multiple
    experts_LK = _experts_shape(sequences)
    batches = [_pack_one([sequences[i] for i in indices], padded, version, experts_LK) for indices in shares[data_rank]]
    num_update_tokens = sum(s.num_positions for s in sequences)
    return [replace(batch, num_update_tokens=num_update_tokens) for batch in batches]


def _experts_shape(sequences: Sequence[TrainSequence]) -> tuple[int, ...] | None:
    """(L, K) of the sequences' routed experts, None when they have none."""
    shapes = {None if s.routed_experts_PLK is None else s.routed_experts_PLK.shape[1:] for s in sequences}
    if len(shapes) > 1:
        raise ValueError(f"the sequences have routed experts of the shapes {shapes}: generate all of them in one way")
    return shapes.pop()


def _join_experts(
    sequences: Sequence[TrainSequence], starts: np.ndarray, padded: int, experts_LK: tuple[int, ...]
) -> torch.Tensor:
    """int16 [padded, L, K]: each sequence's experts from its start, −1 where there are none."""
    experts_TLK = np.full((padded, *experts_LK), -1, dtype=np.int16)
    for start, sequence in zip(starts, sequences, strict=False):
        experts_PLK = sequence.routed_experts_PLK
        if experts_PLK is None or len(experts_PLK) != sequence.num_positions:
            raise ValueError(
                f"a sequence of {sequence.num_positions} positions has routed experts for "
                f"{0 if experts_PLK is None else len(experts_PLK)}: one row a position is needed"
            )
        experts_TLK[start : start + sequence.num_positions] = experts_PLK
    return torch.from_numpy(experts_TLK)


def _pack_one(
    sequences: Sequence[TrainSequence], padded: int, version: int, experts_LK: tuple[int, ...] | None
) -> TrainBatch:
    lengths = [s.num_positions for s in sequences]
    padding = padded - sum(lengths)
    # Padding is one more sequence without sampled tokens: nothing attends to it and it has no loss.
    bounds = np.cumsum([0, *lengths] + ([padding] if padding else []), dtype=np.int32)

    def joined(parts: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        flat = np.concatenate([*parts, np.zeros(padding)]) if parts else np.zeros(padded)
        return torch.as_tensor(flat, dtype=dtype)

    return TrainBatch(
        tokens_T=joined([s.token_ids_L[:-1] for s in sequences], torch.int64),
        position_ids_T=torch.cat([torch.arange(n) for n in np.diff(bounds)]),
        labels_T=joined([s.token_ids_L[1:] for s in sequences], torch.int64),
        logmu_T=joined([s.logmu_L[1:] for s in sequences], torch.float32),
        advantages_T=joined([np.full(s.num_positions, s.advantage) for s in sequences], torch.float32),
        mask_T=joined([s.sampled_L[1:] for s in sequences], torch.bool),
        weights_T=joined([np.full(s.num_positions, s.weight) * s.sampled_L[1:] for s in sequences], torch.float32),
        sequence_ids_T=joined([np.full(n, i) for i, n in enumerate(lengths)], torch.int64),
        staleness_T=joined([(version - s.version_L[1:]) * s.sampled_L[1:] for s in sequences], torch.float32),
        cu_seqlens=torch.as_tensor(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        num_sequences=len(sequences),
        num_tokens=sum(s.num_positions for s in sequences),
        routed_experts_TLK=None if experts_LK is None else _join_experts(sequences, bounds, padded, experts_LK),
    )
