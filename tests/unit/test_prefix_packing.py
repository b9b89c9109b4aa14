"""Shared-prefix packing: the same contexts, labels and weights as plain packing, in fewer positions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from drpo_megatron.records import Prompt, Rollout, RolloutGroup, TrainBatch
from drpo_megatron.training.packing import TrainSequence, train_sequences
from drpo_megatron.training.prefix import PackedUpdate, pack_update, share, sharing_mode


def groups_of(prompt: int, responses: list[int], num_groups: int, seed: int = 0) -> list[RolloutGroup]:
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        task = Prompt(id=str(g), token_ids=rng.integers(1, 1000, prompt).tolist(), text="")
        rollouts = [
            Rollout(
                prompt=task,
                response_ids=rng.integers(1, 1000, n).tolist(),
                logmu=(-rng.random(n)).tolist(),
                weight_versions=[4] * n,
                response_mask=[1] * (n - 1) + [int(n == 1 or rng.random() > 0.3)],
                finish_reason="stop",
            )
            for n in responses
        ]
        for rollout in rollouts:
            rollout.advantage = float(rng.normal())
        groups.append(RolloutGroup(task, rollouts))
    return groups


def sequences_of(prompt: int, responses: list[int], num_groups: int) -> list[TrainSequence]:
    return train_sequences(groups_of(prompt, responses, num_groups), "seq_mean_token_mean", horizon=16)


LAYOUT: dict[str, Any] = {"data_size": 1, "token_budget": 10_000, "pad_multiple": 1, "count_multiple": 1}


def all_ranks(sequences: list[TrainSequence], mode: str, **layout: int) -> list[PackedUpdate]:
    layout = LAYOUT | layout
    return [pack_update(sequences, mode, data_rank=r, version=5, **layout) for r in range(layout["data_size"])]


def terms(batch: TrainBatch) -> list[tuple[Any, ...]]:
    """(what a trained position sees, its label, and everything the loss takes), by the definition of attention."""
    found = []
    bounds = batch.cu_seqlens.tolist()
    segments = list(itertools.pairwise(bounds))
    prefix_of = batch.prefixes.prefix_of if batch.prefixes else [-1] * len(segments)
    assert not batch.prefixes or batch.prefixes.bounds == tuple(bounds)
    for (start, end), prefix in zip(segments, prefix_of, strict=True):
        before = batch.tokens_T[slice(*segments[prefix])].tolist() if prefix >= 0 else []
        assert batch.position_ids_T[start:end].tolist() == list(range(len(before), len(before) + end - start))
        assert len(set(batch.sequence_ids_T[start:end][batch.mask_T[start:end]].tolist())) <= 1
        for t in range(start, end):
            if batch.mask_T[t]:
                context = (*before, *batch.tokens_T[start : t + 1].tolist())
                values = (batch.weights_T, batch.advantages_T, batch.logmu_T, batch.staleness_T)
                found.append((context, int(batch.labels_T[t]), *(float(v[t]) for v in values)))
            else:
                assert batch.weights_T[t] == 0
    assert batch.sequence_ids_T.max() < max(batch.num_sequences, 1)
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"token_budget": 40, "pad_multiple": 4},
        {"data_size": 2, "token_budget": 60, "count_multiple": 2},
        {"data_size": 4, "token_budget": 1, "pad_multiple": 8},
        {"data_size": 7, "token_budget": 64},
    ],
)
@pytest.mark.parametrize("prompt", [1, 2, 17])
def test_every_sampled_token_is_trained_once_in_its_context(prompt: int, layout: dict[str, int]) -> None:
    sequences = sequences_of(prompt, [5, 1, 9, 3, 30], num_groups=5)
    plain = [t for p in all_ranks(sequences, "never", **layout) for b in p.micro_batches for t in terms(b)]
    packed = all_ranks(sequences, "always", **layout)
    shared = [t for p in packed for b in p.micro_batches for t in terms(b)]
    assert sorted(shared) == sorted(plain)
    assert len(plain) == sum(int(s.sampled_L[1:].sum()) for s in sequences)
    batches = [b for p in packed for b in p.micro_batches]
    assert (
        len({len(b.tokens_T) for b in batches}) == 1 and len(batches[0].tokens_T) % layout.get("pad_multiple", 1) == 0
    )
    assert len({len(p.micro_batches) for p in packed}) == 1
    assert len(packed[0].micro_batches) % layout.get("count_multiple", 1) == 0
    longest = max(s.num_positions for s in sequences)
    assert all(len(b.tokens_T) <= max(layout.get("token_budget", 10_000), longest) + 7 for b in batches)


def test_the_recipes_group_is_133_positions_instead_of_448() -> None:
    """46 prompt and 11 response tokens, 8 samples: 45 shared positions and 8 of 11."""
    sequences = sequences_of(46, [11] * 8, num_groups=1)
    (plain,), (shared,) = all_ranks(sequences, "never"), all_ranks(sequences, "auto")
    assert [len(b.tokens_T) for b in plain.micro_batches] == [448]
    assert [len(b.tokens_T) for b in shared.micro_batches] == [133]
    assert shared.tokens_saved_frac == pytest.approx(1 - 133 / 448) and plain.tokens_saved_frac == 0
    assert (shared.lengths, shared.prefix_lengths) == ([45] + [11] * 8, [0] + [45] * 8)
    assert (plain.lengths, plain.prefix_lengths) == ([56] * 8, [0] * 8)


def test_a_group_beyond_the_budget_repeats_its_prefix() -> None:
    sequences = sequences_of(21, [10] * 8, num_groups=1)
    units = share(sequences, token_budget=50)
    assert sorted(i for unit in units for i in unit.members) == list(range(8))
    assert [unit.num_positions(sequences) for unit in units] == [50, 50, 40]
    assert all(unit.num_positions(sequences) <= 50 and unit.shared == 20 for unit in units)
    # No two fit beside the prefix: plain sequences, each as long as it is.
    assert {unit.shared for unit in share(sequences, token_budget=35)} == {0}


def test_ranks_without_a_group_of_their_own_get_a_part_of_one() -> None:
    sequences = sequences_of(40, [20] * 8, num_groups=2)
    packed = all_ranks(sequences, "always", data_size=4)
    assert [sum(int(b.mask_T.sum() > 0) for b in p.micro_batches) for p in packed] == [1] * 4
    assert len(packed[0].micro_batches[0].tokens_T) == 39 + 4 * 20
    # With one rank the groups stay whole.
    assert len(all_ranks(sequences, "always")[0].micro_batches[0].tokens_T) == 2 * (39 + 8 * 20)


def test_other_prompts_are_never_shared() -> None:
    sequences = sequences_of(9, [4] * 4, num_groups=1)
    tokens_L = sequences[2].token_ids_L.copy()
    tokens_L[5] += 1
    sequences[2] = dataclasses.replace(sequences[2], token_ids_L=tokens_L)
    assert {unit.members for unit in share(sequences, 1000)} == {(0, 1, 3), (2,)}
    unknown = [dataclasses.replace(s, prompt_length=0) for s in sequences]
    assert {unit.members for unit in share(unknown, 1000)} == {(0,), (1,), (2,), (3,)}


def test_auto_shares_from_a_tenth_on() -> None:
    few = sequences_of(5, [40] * 4, num_groups=3)  # saves 3 of 4 times 4 positions of 176
    many = sequences_of(12, [40] * 4, num_groups=3)
    (packed,), (forced,) = all_ranks(few, "auto"), all_ranks(few, "always")
    assert packed.micro_batches[0].prefixes is None and packed.tokens_saved_frac == 0
    assert forced.tokens_saved_frac == pytest.approx(3 * 4 / 176)
    (packed,) = all_ranks(many, "auto")
    assert packed.micro_batches[0].prefixes is not None
    assert packed.tokens_saved_frac == pytest.approx(3 * 11 / (4 * 51))


def test_context_parallelism() -> None:
    assert sharing_mode("always", 1) == "always"
    assert sharing_mode("auto", 2) == "never"
    with pytest.raises(ValueError, match=r"parallel.context = 2.*set training.shared_prefix to auto or never"):
        sharing_mode("always", 2)
    assert sharing_mode("auto", 1, "transformer_engine") == "never"
    assert sharing_mode("always", 1, "transformer_engine") == "always"
