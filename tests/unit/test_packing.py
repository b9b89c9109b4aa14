"""Packing: what a position predicts, where padding goes, and that no way of packing changes the weighted sum of the
loss.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from drpo_megatron.models.flops import SequenceCost
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.training.packing import TrainSequence, pack, partition, train_sequences


def make_groups(seed: int = 0, num_groups: int = 5) -> list[RolloutGroup]:
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        prompt = Prompt(id=str(g), token_ids=rng.integers(1, 100, rng.integers(1, 9)).tolist(), text="")
        rollouts = []
        for _ in range(3):
            n = int(rng.integers(1, 12))
            rollout = Rollout(
                prompt=prompt,
                response_ids=rng.integers(1, 100, n).tolist(),
                logmu=(-rng.random(n)).tolist(),
                weight_versions=[4] * n,
                finish_reason="stop",
            )
            rollout.advantage = float(rng.normal())
            rollouts.append(rollout)
        groups.append(RolloutGroup(prompt, rollouts))
    return groups


def flat_terms(groups: list[RolloutGroup], **layout: int) -> dict[tuple[int, ...], float]:
    """Every trained token, found again in the packed batches by its context: (prefix…, label) → weight × advantage ×
    log μ.
    """
    sequences = train_sequences(groups, "seq_mean_token_mean", horizon=16)
    found: dict[tuple[int, ...], float] = {}
    for data_rank in range(layout["data_size"]):
        for batch in pack(sequences, data_rank=data_rank, count_multiple=1, version=5, **layout):
            bounds = batch.cu_seqlens.tolist()
            assert bounds[-1] == len(batch.tokens_T) and len(batch.tokens_T) % layout["pad_multiple"] == 0
            for start, end in itertools.pairwise(bounds):
                assert batch.position_ids_T[start:end].tolist() == list(range(end - start))
                for t in range(start, end):
                    if batch.mask_T[t]:
                        context = (*batch.tokens_T[start : t + 1].tolist(), int(batch.labels_T[t]))
                        term = float(batch.weights_T[t] * batch.advantages_T[t] * batch.logmu_T[t])
                        found[context] = found.get(context, 0.0) + term
                        assert batch.staleness_T[t] == 1
                    else:
                        assert batch.weights_T[t] == 0
    return found


def expected_terms(groups: list[RolloutGroup]) -> dict[tuple[int, ...], float]:
    rollouts = [r for g in groups for r in g.rollouts]
    terms: dict[tuple[int, ...], float] = {}
    for r in rollouts:
        for i, (token, logmu) in enumerate(zip(r.response_ids, r.logmu, strict=True)):
            context = (*r.prompt.token_ids, *r.response_ids[:i], token)
            value = r.advantage * logmu / len(r.response_ids) / len(rollouts)
            terms[context] = terms.get(context, 0.0) + value
    return terms


@pytest.mark.parametrize(
    "layout",
    [
        {"data_size": 1, "token_budget": 10_000, "pad_multiple": 1},
        {"data_size": 1, "token_budget": 24, "pad_multiple": 4},
        {"data_size": 2, "token_budget": 24, "pad_multiple": 1},
        {"data_size": 4, "token_budget": 1, "pad_multiple": 8},
    ],
)
def test_every_sampled_token_appears_once_with_its_weight(layout: dict[str, int]) -> None:
    groups = make_groups()
    found, expected = flat_terms(groups, **layout), expected_terms(groups)
    assert found.keys() == expected.keys()
    for context, value in expected.items():
        assert found[context] == pytest.approx(value, rel=1e-5)


def test_tool_tokens_are_inputs_but_not_trained() -> None:
    groups = make_groups(num_groups=1)
    rollout = groups[0].rollouts[0]
    rollout.response_mask[0] = 0
    (batch,) = pack(
        train_sequences(groups, "token_mean", horizon=1),
        data_rank=0,
        data_size=1,
        token_budget=1000,
        pad_multiple=1,
        count_multiple=1,
        version=4,
    )
    trained = sum(sum(r.response_mask) for r in groups[0].rollouts)
    assert int(batch.mask_T.sum()) == trained
    assert float(batch.weights_T.sum()) == pytest.approx(1.0)
    assert torch.all(batch.staleness_T == 0)


def test_partition_balances_and_respects_the_budget() -> None:
    lengths = [7, 3, 3, 9, 1, 5, 5, 30]
    shares = partition(lengths, num_ranks=2, token_budget=12, count_multiple=2)
    assert sorted(i for share in shares for indices in share for i in indices) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) % 2 == 0
    for share in shares:
        for indices in share:
            assert sum(lengths[i] for i in indices) <= 12 or indices == [7]


COST = SequenceCost(linear=3.6e9, quadratic=36 * 32 * 256)  # of a model with 4 billion parameters


def largest_rank_cost(shares: list[list[list[int]]], lengths: list[int]) -> float:
    return max(sum(COST(lengths[i]) for indices in share for i in indices) for share in shares)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("count_multiple", [1, 3])
@pytest.mark.parametrize("budget", [16384, 40000])
def test_balancing_cost_keeps_the_budget(num_ranks: int, count_multiple: int, budget: int) -> None:
    lengths = np.random.default_rng(0).lognormal(7, 1, 200).astype(int).clip(1, 16384).tolist()
    costs = [COST(n) for n in lengths]
    by_length = partition(lengths, num_ranks, budget, count_multiple)
    by_cost = partition(lengths, num_ranks, budget, count_multiple, costs)
    assert by_cost == partition(lengths, num_ranks, budget, count_multiple, costs)
    assert len({len(share) for share in by_cost}) == 1 and len(by_cost[0]) % count_multiple == 0
    assert len(by_cost[0]) <= len(by_length[0])
    assert sorted(i for share in by_cost for indices in share for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= budget for share in by_cost for indices in share)
    assert largest_rank_cost(by_cost, lengths) <= largest_rank_cost(by_length, lengths)


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "budget"),
    [
        ([16384] + [1000] * 60, 2, 65536),
        ([16384] + [1000] * 60, 4, 32768),
        ([30000] * 5 + [1500] * 100, 2, 65536),
        ([30000] * 5 + [1500] * 100, 4, 65536),
        ([30000] * 5 + [1500] * 100, 8, 65536),
    ],
)
def test_with_skewed_lengths_the_largest_rank_costs_less(lengths: list[int], num_ranks: int, budget: int) -> None:
    by_length = partition(lengths, num_ranks, budget)
    by_cost = partition(lengths, num_ranks, budget, costs=[COST(n) for n in lengths])
    assert largest_rank_cost(by_cost, lengths) < 0.97 * largest_rank_cost(by_length, lengths)


def test_the_ranks_pack_what_balances_their_cost() -> None:
    """One sequence of 40 tokens, whose attention costs as much as all others together, is alone on its rank."""
    long_rank, short_rank = (
        pack(
            [sequence_of(40), *(sequence_of(10) for _ in range(8))],
            data_rank=rank,
            data_size=2,
            token_budget=100,
            pad_multiple=1,
            count_multiple=1,
            version=0,
            cost=lambda length: float(length * length),
        )
        for rank in range(2)
    )
    assert [b.num_sequences for b in long_rank] == [1]
    assert [b.num_sequences for b in short_rank] == [8]


def sequence_of(positions: int) -> TrainSequence:
    length = positions + 1
    return TrainSequence(
        token_ids_L=np.arange(length, dtype=np.int32),
        sampled_L=np.arange(length) > 0,
        logmu_L=np.zeros(length, dtype=np.float32),
        version_L=np.zeros(length, dtype=np.int32),
        advantage=1.0,
        weight=1.0,
    )
