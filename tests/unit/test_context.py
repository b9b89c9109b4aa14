"""Context parallelism: where each packed token goes, and what a rank keeps of a micro-batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from drpo_megatron.models.context_attention import context_positions
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.records import TrainBatch
from drpo_megatron.training.context import pack_multiple, sequence_multiple, split_context
from drpo_megatron.training.packing import pack, train_sequences
from tests.unit.test_packing import make_groups

PER_TOKEN = (
    "tokens_T",
    "position_ids_T",
    "labels_T",
    "logmu_T",
    "advantages_T",
    "mask_T",
    "weights_T",
    "sequence_ids_T",
    "staleness_T",
)


def packed(layout: ParallelLayout) -> list[TrainBatch]:
    return pack(
        train_sequences(make_groups(), "token_mean", horizon=1),
        data_rank=0,
        data_size=1,
        token_budget=60,
        pad_multiple=pack_multiple(layout),
        sequence_multiple=sequence_multiple(layout),
        count_multiple=1,
        version=5,
    )


def test_a_rank_holds_a_chunk_from_each_end_of_every_sequence() -> None:
    bounds = [0, 8, 8, 12]  # a sequence of 8, an empty one, and one of 4
    assert context_positions(bounds, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_positions(bounds, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_ranks_hold_every_token_once_with_its_label(size: int) -> None:
    for batch in packed(ParallelLayout(context=size)):
        parts = [split_context(batch, rank, size) for rank in range(size)]
        order = torch.cat([context_positions(batch.cu_seqlens.tolist(), rank, size) for rank in range(size)])
        assert order.sort().values.tolist() == list(range(len(batch.tokens_T)))
        for name in PER_TOKEN:
            joined_T = torch.cat([getattr(part, name) for part in parts])
            whole_T = torch.empty_like(joined_T)
            whole_T[order] = joined_T
            assert torch.equal(whole_T, getattr(batch, name)), name
        for part in parts:
            assert len(part.tokens_T) == len(batch.tokens_T) // size
            assert torch.equal(part.cu_seqlens, batch.cu_seqlens)
            assert (part.max_seqlen, part.num_sequences) == (batch.max_seqlen, batch.num_sequences)


def test_padding_stands_behind_each_sequence_and_is_not_trained() -> None:
    plain = packed(ParallelLayout())
    layout = ParallelLayout(context=2, tensor=3, sequence_parallel=True)
    padded = packed(layout)

    def trained(batches: list[TrainBatch]) -> list[tuple[int, int, float]]:
        return sorted(
            (int(b.labels_T[t]), int(b.position_ids_T[t]), float(b.logmu_T[t]))
            for b in batches
            for t in b.mask_T.nonzero().flatten()
        )

    assert trained(padded) == trained(plain)
    for batch in padded:
        bounds = batch.cu_seqlens.tolist()
        assert bounds[-1] == len(batch.tokens_T)
        # Each of the two ranks divides its part over three tensor-parallel ranks.
        assert len(batch.tokens_T) % (2 * 3) == 0
        for start, end in itertools.pairwise(bounds):
            assert (end - start) % 4 == 0
            assert batch.position_ids_T[start:end].tolist() == list(range(end - start))
        assert not batch.weights_T[~batch.mask_T].any()


def test_one_rank_keeps_the_batch() -> None:
    (batch, *_) = packed(ParallelLayout())
    assert split_context(batch, 0, 1) is batch


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    (batch, *_) = packed(ParallelLayout())
    with pytest.raises(ValueError, match=r"does not divide into 2 · 2 chunks .* to a multiple of 4"):
        split_context(batch, 0, 2)
    with pytest.raises(ValueError, match="sequence_multiple = 4 must divide pad_multiple = 2"):
        pack(
            train_sequences(make_groups(), "token_mean", horizon=1),
            data_rank=0,
            data_size=1,
            token_budget=60,
            pad_multiple=2,
            sequence_multiple=4,
            count_multiple=1,
            version=5,
        )


@pytest.mark.parametrize("tokens", [16, 32])
def test_packs_of_fp8_products_divide_on_every_rank(tokens: int) -> None:
    """Each rank multiplies its part of the pack; under sequence parallelism it quantizes its own tokens before."""
    for layout, ranks in [
        (ParallelLayout(), 1),
        (ParallelLayout(tensor=2), 1),
        (ParallelLayout(tensor=2, sequence_parallel=True), 2),
        (ParallelLayout(context=3, tensor=2, sequence_parallel=True), 6),
    ]:
        assert pack_multiple(layout, tokens) == tokens * ranks
        assert pack_multiple(layout, tokens) % sequence_multiple(layout) == 0
