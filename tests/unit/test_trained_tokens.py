"""Every token gets back what the trainer made of it, however the sequences were packed and divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drpo_megatron.algorithms import TokenStats
from drpo_megatron.records import TrainBatch
from drpo_megatron.training.context import split_context
from drpo_megatron.training.packing import groups_of_updates, token_places, train_sequences
from drpo_megatron.training.prefix import SharingMode, pack_update
from drpo_megatron.training.step import UpdateResult
from drpo_megatron.training.trained_tokens import note_trained_tokens
from tests.unit.test_prefix_packing import groups_of

UPDATES, DATA_RANKS = 2, 2


def result(batches: list[TrainBatch]) -> UpdateResult:
    """A trainer for which log π is twice log μ, and the weight its opposite: both are known from the token alone."""
    logmu_N = torch.cat([batch.logmu_T[batch.mask_T] for batch in batches])
    nothing_N = torch.zeros_like(logmu_N)
    stats = TokenStats(nothing_N, -logmu_N, nothing_N, 2 * logmu_N, logmu_N, nothing_N, nothing_N)
    places_2N = torch.cat([token_places(batch) for batch in batches], dim=1)
    return UpdateResult(stats, places_2N, 1.0, True, 0.0, 0.0, flops=0.0, positions=0, tokens_saved_frac=0.0)


@pytest.mark.parametrize(("mode", "context"), [("never", 1), ("never", 2), ("always", 1)])
def test_trained_tokens_come_back(mode: SharingMode, context: int) -> None:
    groups = groups_of(prompt=6, responses=[1, 4, 9], num_groups=7)
    layout: dict[str, Any] = {
        "data_size": DATA_RANKS,
        "token_budget": 48,
        "pad_multiple": 2 * context,
        "count_multiple": 1,
        "sequence_multiple": 2 * context if context > 1 else 1,
    }
    by_rank: list[list[UpdateResult]] = [[] for _ in range(DATA_RANKS * context)]
    for part in groups_of_updates(groups, UPDATES):
        sequences = train_sequences(part, "token_mean", horizon=16)
        for data_rank in range(DATA_RANKS):
            packed = pack_update(sequences, mode, data_rank=data_rank, version=5, **layout)
            assert (packed.tokens_saved_frac > 0) == (mode == "always")
            for rank in range(context):
                batches = [split_context(batch, rank, context) for batch in packed.micro_batches]
                by_rank[data_rank * context + rank].append(result(batches))
    by_rank.append([UpdateResult(None, None, 1.0, True, 0.0, 0.0, 0.0, 0, 0.0)] * UPDATES)  # an earlier stage
    note_trained_tokens(groups, by_rank)
    for rollout in (r for g in groups for r in g.rollouts):
        logmu = [
            float(torch.tensor(x)) * sampled for x, sampled in zip(rollout.logmu, rollout.response_mask, strict=True)
        ]
        assert rollout.logp == [2 * x for x in logmu] and rollout.loss_weight == [-x for x in logmu]
        assert rollout.to_json()["logp"] == rollout.logp
