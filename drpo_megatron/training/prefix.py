"""Shared-prefix packing: the prompt of a group is computed once a pack, and every response continues it.

A pack of one group is [prompt without its last token], then for each response [the prompt's last token, the response
without its last token]. So each response has a hidden state of its own for its first token, and labels, masks and
weights are those of plain packing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from drpo_megatron.models.flops import SequenceCost
from drpo_megatron.models.shared_prefixes import SharedPrefixes
from drpo_megatron.models.specs import SpecBackend
from drpo_megatron.records import TrainBatch
from drpo_megatron.training.packing import TrainSequence, experts_shape, pack, pack_segments, partition

SharingMode = Literal["auto", "always", "never"]

# `auto` shares from this share of saved positions on: less would not pay for smaller attention calls.
SAVED_FROM = 0.1

LENGTH = SequenceCost(linear=1.0, quadratic=0.0)


def sharing_mode(setting: SharingMode, context: int, spec_backend: SpecBackend = "local") -> SharingMode:
    """The mode of a run with `context` context-parallel ranks. Raises ValueError where `always` cannot be had.

    `auto` packs plainly with Transformer Engine: its FlexAttention has run in tests only, and must be asked for.
    """
    if context > 1 and setting == "always":
        raise ValueError(
            f"always does not go with parallel.context = {context}, because a prefix is not split over "
            "context-parallel ranks; set training.shared_prefix to auto or never, or parallel.context to 1"
        )
    if context > 1 or (setting == "auto" and spec_backend == "transformer_engine"):
        return "never"
    return setting


@dataclass(frozen=True)
class Unit:
    """Sequences that are packed together. members: indices. shared: the positions at their start that they have in
    common and that are computed once, with the routed experts of the first of them; 0 for one sequence alone.
    """

    members: tuple[int, ...]
    shared: int

    def segments(self, sequences: Sequence[TrainSequence]) -> list[tuple[TrainSequence, int]]:
        """What is computed, in order: each segment, and the number of segments back to the one it continues (0: it
        continues none).
        """
        members = [sequences[i] for i in self.members]
        if not self.shared:
            return [(member, 0) for member in members]
        prefix = members[0].part(0, self.shared + 1)
        return [(prefix, 0), *((member.part(self.shared), back) for back, member in enumerate(members, start=1))]

    def num_positions(self, sequences: Sequence[TrainSequence]) -> int:
        return sum(segment.num_positions for segment, _ in self.segments(sequences))

    def cost(self, sequences: Sequence[TrainSequence], cost: SequenceCost) -> float:
        return sum(cost(s.num_positions, self.shared * bool(back)) for s, back in self.segments(sequences))


def alone(sequences: Sequence[TrainSequence]) -> list[Unit]:
    return [Unit((i,), 0) for i in range(len(sequences))]


def share(sequences: Sequence[TrainSequence], token_budget: int, parts: int = 1) -> list[Unit]:
    """One unit a prompt, or several that each repeat its prefix: until each fits `token_budget`, and `parts` or a
    multiple of it where there are as many sequences. Sequences share only what is equal token by token.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for i, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.token_ids_L[: sequence.prompt_length].tobytes(), []).append(i)
    units = []
    for members in by_prompt.values():
        shared = sequences[members[0]].prompt_length - 1
        if shared < 1 or len(members) == 1:
            units += [Unit((i,), 0) for i in members]
            continue
        rests = [sequences[i].num_positions - shared for i in members]
        (split,) = partition(rests, 1, max(1, token_budget - shared), parts)
        for part in split:
            if part:
                units.append(Unit(tuple(members[i] for i in sorted(part)), shared if len(part) > 1 else 0))
    return units


@dataclass(frozen=True)
class UpdatePlan:
    """Which units each rank computes in which micro-batch, `shares[rank][micro-batch] -> units`, each micro-batch
    padded to `padded` positions.
    """

    shares: list[list[list[Unit]]]
    padded: int

    @classmethod
    def of(
        cls,
        units: Sequence[Unit],
        sequences: Sequence[TrainSequence],
        *,
        data_size: int,
        token_budget: int,
        pad_multiple: int,
        count_multiple: int,
        cost: SequenceCost,
    ) -> UpdatePlan:
        lengths = [unit.num_positions(sequences) for unit in units]
        costs = [unit.cost(sequences, cost) for unit in units]
        shares = partition(lengths, data_size, token_budget, count_multiple, costs)
        longest = max(sum(lengths[i] for i in indices) for share in shares for indices in share)
        padded = math.ceil(max(longest, 1) / pad_multiple) * pad_multiple
        return cls([[[units[i] for i in indices] for indices in share] for share in shares], padded)

    @property
    def positions_a_rank(self) -> int:
        """Positions that each rank computes, padding included."""
        return len(self.shares[0]) * self.padded

    @property
    def units(self) -> list[Unit]:
        return [unit for share in self.shares for units in share for unit in units]


@dataclass(frozen=True)
class PackedUpdate:
    """One rank's micro-batches, and what all ranks together compute for the update.

    lengths, prefix_lengths: of each segment, and of the prefix that it continues (0: none), padding left out.
    tokens_saved_frac: the share of plain packing's positions that a rank saves, padding included; 0 without sharing.
    """

    micro_batches: list[TrainBatch]
    lengths: list[int]
    prefix_lengths: list[int]
    tokens_saved_frac: float


def pack_update(
    sequences: Sequence[TrainSequence],
    mode: SharingMode,
    *,
    data_rank: int,
    data_size: int,
    token_budget: int,
    pad_multiple: int,
    count_multiple: int,
    version: int,
    sequence_multiple: int = 1,
    cost: SequenceCost = LENGTH,
) -> PackedUpdate:
    """Pack one update as `packing.pack` does, with shared prefixes where `mode` says so.

    The keywords are those of `pack`; sequence_multiple is 1 unless `mode` is never. The choice depends on the sequences
    and the layout alone, so all ranks make the same. Groups are divided into 1, 2, 4 … parts, whichever leaves least to
    compute on a rank: whole groups where there are enough of them for all ranks. `auto` shares from `SAVED_FROM` saved
    positions on.
    """
    layout: dict[str, Any] = {
        "data_size": data_size,
        "token_budget": token_budget,
        "pad_multiple": pad_multiple,
        "count_multiple": count_multiple,
        "cost": cost,
    }
    plan = None if mode == "never" else _best_plan(sequences, layout)
    saved = 0.0
    if plan is not None:
        plain = UpdatePlan.of(alone(sequences), sequences, **layout)
        saved = 1 - plan.positions_a_rank / plain.positions_a_rank
    if plan is None or (mode == "auto" and saved < SAVED_FROM):
        lengths = [s.num_positions for s in sequences]
        batches = pack(sequences, data_rank=data_rank, version=version, sequence_multiple=sequence_multiple, **layout)
        return PackedUpdate(batches, lengths, [0] * len(lengths), 0.0)
    computed = [(unit.shared * bool(back), s) for unit in plan.units for s, back in unit.segments(sequences)]
    num_update_tokens = sum(s.num_positions for _, s in computed)
    batches = [
        dataclasses.replace(_pack_units(units, sequences, plan.padded, version), num_update_tokens=num_update_tokens)
        for units in plan.shares[data_rank]
    ]
    return PackedUpdate(batches, [s.num_positions for _, s in computed], [prefix for prefix, _ in computed], saved)


def _best_plan(sequences: Sequence[TrainSequence], layout: dict[str, Any]) -> UpdatePlan | None:
    """The plan with the fewest positions a rank; None where no two sequences share anything."""
    plans, parts = [], 1
    while True:
        units = share(sequences, layout["token_budget"], parts)
        if not any(unit.shared for unit in units):
            break
        plans.append(UpdatePlan.of(units, sequences, **layout))
        parts *= 2
    return min(plans, key=lambda plan: plan.positions_a_rank, default=None)


def _pack_units(units: Sequence[Unit], sequences: Sequence[TrainSequence], padded: int, version: int) -> TrainBatch:
    segments: list[TrainSequence] = []
    prefix_of: list[int] = []
    for unit in units:
        for segment, back in unit.segments(sequences):
            prefix_of.append(len(segments) - back if back else -1)
            segments.append(segment)
    lengths = [s.num_positions for s in segments]
    batch = pack_segments(segments, lengths, padded, version, experts_shape(sequences))
    bounds = tuple(batch.cu_seqlens.tolist())
    # Padding is a last segment that continues none.
    prefixes = SharedPrefixes(bounds, (*prefix_of, *[-1] * (len(bounds) - 1 - len(prefix_of))))
    return dataclasses.replace(batch, position_ids_T=prefixes.position_ids(), prefixes=prefixes)
