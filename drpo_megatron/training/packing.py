"""From scored groups to packed micro-batches.

Rank 0 turns groups into `TrainSequence`s, whose `weight` already holds the aggregation with its global denominator;
every rank packs the same list with the same deterministic rule and keeps its data-parallel share. So the loss cannot
depend on how sequences fall into micro-batches or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from drpo_megatron.algorithms import sequence_weights
from drpo_megatron.records import RolloutGroup, TrainBatch


@dataclass(frozen=True)
class TrainSequence:
    """One rollout, ready to train on. L is the length of prompt + response.

    token_ids_L int32; sampled_L bool: the policy sampled this token; logmu_L float32 and version_L int32: meaningful
    where sampled; advantage: of every sampled token; weight: of every sampled token in the loss of its update.
    prompt_length: tokens at the start that all samples of its group have; 0 where that is not known. row: its place
    among the sequences of the update, which finds it again.
    routed_experts_PLK: `Rollout.routed_experts`, P = num_positions.
    """

    token_ids_L: np.ndarray
    sampled_L: np.ndarray
    logmu_L: np.ndarray
    version_L: np.ndarray
    advantage: float
    weight: float
    prompt_length: int = 0
    row: int = 0
    routed_experts_PLK: np.ndarray | None = None

    @property
    def num_positions(self) -> int:
        """Positions the model computes: the last token predicts nothing that was sampled, so it is not an input."""
        return len(self.token_ids_L) - 1

    def part(self, start: int, stop: int | None = None) -> TrainSequence:
        """Its tokens from start to stop, as a sequence of its own."""
        arrays = {f.name: getattr(self, f.name)[start:stop] for f in fields(self) if f.name.endswith("_L")}
        if self.routed_experts_PLK is not None:
            # The last token of a part is no position of it.
            arrays["routed_experts_PLK"] = self.routed_experts_PLK[start:][: len(arrays["token_ids_L"]) - 1]
        return replace(self, **arrays)


def groups_of_updates(groups: Sequence[RolloutGroup], updates: int) -> list[Sequence[RolloutGroup]]:
    """The groups that each update of a step trains on: every `updates`-th."""
    return [groups[i::updates] for i in range(updates)]


def train_sequences(groups: Sequence[RolloutGroup], aggregation: str, horizon: int) -> list[TrainSequence]:
    """The sequences of one update. `groups` is the whole global batch of that update: the denominators are taken over
    it.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    weights_S = sequence_weights(aggregation, [sum(r.response_mask) for r in rollouts], horizon=horizon)
    sequences = []
    for row, (rollout, weight) in enumerate(zip(rollouts, weights_S, strict=True)):
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
                prompt_length=num_prompt,
                row=row,
                routed_experts_PLK=rollout.routed_experts,
            )
        )
    return sequences


def partition(
    lengths: Sequence[int],
    num_ranks: int,
    token_budget: int,
    count_multiple: int = 1,
    costs: Sequence[float] | None = None,
) -> list[list[list[int]]]:
    """Split sequences into micro-batches: `[rank][micro-batch] -> indices`, equally many micro-batches on each rank.

    `costs`, None for the lengths, are balanced: most expensive first into the cheapest micro-batch that has room in
    `token_budget` (a longer sequence is alone), then micro-batches over ranks in the same way. Where the budget leaves
    little room this can be worse than balancing lengths, so the better of the two is taken. The number of micro-batches
    is the smallest multiple of `count_multiple` at which one of them has room for everything. The n-th micro-batches
    of all ranks have similar costs. A micro-batch may be empty. Deterministic.
    """
    costs = lengths if costs is None else costs
    per_rank = max(1, math.ceil(sum(lengths) / (num_ranks * token_budget)))
    while True:
        per_rank = math.ceil(per_rank / count_multiple) * count_multiple
        filled = [_fill(lengths, balanced, num_ranks * per_rank, token_budget) for balanced in (costs, lengths)]
        dealt = [_deal(bins, costs, num_ranks) for bins in filled if bins is not None]
        if dealt:
            return min(dealt, key=lambda shares: max(_total(share, costs) for share in shares))
        per_rank += 1


def _total(share: list[list[int]], costs: Sequence[float]) -> float:
    return sum(costs[i] for indices in share for i in indices)


def _fill(
    lengths: Sequence[int], balanced: Sequence[float], num_bins: int, token_budget: int
) -> list[list[int]] | None:
    """The sequences in `num_bins` micro-batches with about equal sums of `balanced`; None when they have no room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals, loads = [0.0] * num_bins, [0] * num_bins
    for i in sorted(range(len(lengths)), key=lambda i: (-balanced[i], -lengths[i], i)):
        with_room = [b for b in range(num_bins) if not bins[b] or loads[b] + lengths[i] <= token_budget]
        if not with_room:
            return None
        chosen = min(with_room, key=lambda b: (totals[b], b))
        bins[chosen].append(i)
        totals[chosen] += balanced[i]
        loads[chosen] += lengths[i]
    return bins


def _deal(bins: list[list[int]], costs: Sequence[float], num_ranks: int) -> list[list[list[int]]]:
    """The same number of micro-batches to each rank, most expensive first, to the rank that has least to do."""
    cost_of = [sum(costs[i] for i in indices) for indices in bins]
    shares: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for b in sorted(range(len(bins)), key=lambda b: (-cost_of[b], b)):
        open_ranks = [r for r in range(num_ranks) if len(shares[r]) < len(bins) // num_ranks]
        chosen = min(open_ranks, key=lambda r: (totals[r], r))
        shares[chosen].append(bins[b])
        totals[chosen] += cost_of[b]
    return shares


def pack(
    sequences: Sequence[TrainSequence],
    *,
    data_rank: int,
    data_size: int,
    token_budget: int,
    pad_multiple: int,
    count_multiple: int,
    version: int,
    sequence_multiple: int = 1,
    cost: Callable[[int], float] = float,
) -> list[TrainBatch]:
    """The micro-batches of one data-parallel rank, all padded to one length so that pipeline stages agree on shapes.

    pad_multiple: the length is a multiple of this (`context.pack_multiple`). count_multiple: the number of
    micro-batches is (pipeline size for the interleaved schedule). version: the trainer's weight version, from which
    staleness is counted. sequence_multiple: each sequence is padded at its end to a multiple of this, and
    `token_budget` counts that padding (twice the context-parallel size; it must divide pad_multiple). cost: of a
    sequence by its length, what is balanced; its own length where nothing is known about the model. Raises ValueError
    when sequence_multiple does not divide pad_multiple, or when some sequences have routed experts and others do not,
    or not one a position.
    """
    if pad_multiple % sequence_multiple:
        raise ValueError(f"sequence_multiple = {sequence_multiple} must divide pad_multiple = {pad_multiple}")
    lengths = [math.ceil(s.num_positions / sequence_multiple) * sequence_multiple for s in sequences]
    shares = partition(lengths, data_size, token_budget, count_multiple, [cost(n) for n in lengths])
    longest = max(sum(lengths[i] for i in indices) for share in shares for indices in share)
    padded = math.ceil(max(longest, 1) / pad_multiple) * pad_multiple
    experts_LK, num_update_tokens = experts_shape(sequences), sum(s.num_positions for s in sequences)
    batches = [
        pack_segments([sequences[i] for i in indices], [lengths[i] for i in indices], padded, version, experts_LK)
        for indices in shares[data_rank]
    ]
    return [replace(batch, num_update_tokens=num_update_tokens) for batch in batches]


def token_places(batch: TrainBatch) -> torch.Tensor:
    """int32 [2, N] on the CPU: of each trained token the row of its sequence, and its index in that."""
    # The label of a position is the token behind it; position ids count on behind a shared prefix.
    places_2T = torch.stack([batch.rows_T, batch.position_ids_T + 1])
    return places_2T[:, batch.mask_T].int().cpu()


def experts_shape(sequences: Sequence[TrainSequence]) -> tuple[int, ...] | None:
    """(L, K) of the sequences' routed experts, None when they have none. Raises ValueError when they differ."""
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


def pack_segments(
    sequences: Sequence[TrainSequence],
    lengths: Sequence[int],
    padded: int,
    version: int,
    experts_LK: tuple[int, ...] | None = None,
) -> TrainBatch:
    """One micro-batch of `padded` positions, `lengths` of them for each sequence, whose position ids start at 0."""
    padding = padded - sum(lengths)
    # Padding is one more sequence without sampled tokens: nothing attends to it and it has no loss. Nor does anything
    # attend to the padding behind a sequence's last token, because attention is causal.
    bounds = np.cumsum([0, *lengths] + ([padding] if padding else []), dtype=np.int32)

    def joined(parts: list[np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        flat_T = np.zeros(padded)
        for start, part in zip(bounds.tolist(), parts, strict=False):
            flat_T[start : start + len(part)] = part
        return torch.as_tensor(flat_T, dtype=dtype)

    return TrainBatch(
        tokens_T=joined([s.token_ids_L[:-1] for s in sequences], torch.int64),
        position_ids_T=torch.cat([torch.arange(n) for n in np.diff(bounds)]),
        labels_T=joined([s.token_ids_L[1:] for s in sequences], torch.int64),
        logmu_T=joined([s.logmu_L[1:] for s in sequences], torch.float32),
        advantages_T=joined([np.full(s.num_positions, s.advantage) for s in sequences], torch.float32),
        mask_T=joined([s.sampled_L[1:] for s in sequences], torch.bool),
        weights_T=joined([np.full(s.num_positions, s.weight) * s.sampled_L[1:] for s in sequences], torch.float32),
        sequence_ids_T=joined([np.full(s.num_positions, i) for i, s in enumerate(sequences)], torch.int64),
        rows_T=joined([np.full(s.num_positions, s.row) for s in sequences], torch.int64),
        staleness_T=joined([(version - s.version_L[1:]) * s.sampled_L[1:] for s in sequences], torch.float32),
        cu_seqlens=torch.as_tensor(bounds),
        max_seqlen=int(np.diff(bounds).max()),
        num_sequences=len(sequences),
        num_tokens=sum(s.num_positions for s in sequences),
        routed_experts_TLK=None if experts_LK is None else _join_experts(sequences, bounds, padded, experts_LK),
    )
