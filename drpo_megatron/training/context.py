"""Context parallelism in training: each rank's part of a micro-batch, and losses that need a whole sequence."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from drpo_megatron.algorithms import LossFunction, LossInputs, LossOutputs, evaluate
from drpo_megatron.models.context_attention import context_positions
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.records import TrainBatch


def sequence_multiple(layout: ParallelLayout) -> int:
    """What the length of every packed sequence must be a multiple of: two chunks for each context-parallel rank."""
    return 2 * layout.context if layout.context > 1 else 1


def pack_multiple(layout: ParallelLayout, tokens: int = 1) -> int:
    """What the length of a pack must be a multiple of, so that each context-parallel rank's part of it divides over the
    tensor-parallel ranks of sequence parallelism, and padding is a sequence like the others.

    tokens: what a rank's matrix products need their number of tokens to be a multiple of (`fp8.recipes`).
    """
    part = tokens * (layout.tensor if layout.sequence_parallel else 1)
    return layout.context * (math.lcm(2, part) if layout.context > 1 else part)


def split_context(batch: TrainBatch, rank: int, size: int) -> TrainBatch:
    """The tokens of context-parallel rank `rank` of `size`, in the order of `context_positions`.

    Everything with one entry a token is this rank's T / size; cu_seqlens, max_seqlen and num_sequences stay those of
    the whole pack. A rank may get no trained token: its loss is 0 then, and it takes part in every collective. Raises
    ValueError when a sequence does not divide into 2·size chunks.
    """
    if size == 1:
        return batch
    mine = context_positions(batch.cu_seqlens.tolist(), rank, size).to(batch.tokens_T.device)
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name.endswith(("_T", "_TLK"))}
    local = {name: tensor[mine] for name, tensor in tensors.items() if tensor is not None}
    return dataclasses.replace(batch, **local)


def evaluate_whole_sequences(
    loss_function: LossFunction, own: LossInputs, weights_N: Tensor, mask_T: Tensor, group: ProcessGroup
) -> tuple[Tensor, LossOutputs]:
    """A sequence-level loss of tokens that context-parallel ranks share: `(loss, outputs of the own N tokens)`.

    own: this rank's trained tokens, as `LossInputs` of N = mask_T.sum() of its T positions; N may be 0. weights_N: the
    aggregation's. Every rank evaluates the whole sequences, with its own log-probs differentiable and the others'
    constant, so that the gradient is the whole loss's; the value is that of the own tokens alone, so that the sum over
    the ranks counts each token once. Collective over `group`.
    """
    size = group.size()

    def spread(t_N: Tensor) -> Tensor:
        """[T], zero at positions without a trained token: of equal size on all ranks."""
        dtype = own.logp_T.dtype
        return torch.zeros(mask_T.shape, dtype=dtype, device=mask_T.device).masked_scatter(mask_T, t_N.to(dtype))

    logp_T = spread(own.logp_T)
    # Small integers, exact in float32 up to 2^24 sequences.
    rows = [logp_T.detach(), *map(spread, (own.logmu_T, own.advantages_T, own.sequence_ids_T, weights_N)), mask_T]
    mine_FT = torch.stack([row.to(logp_T.dtype) for row in rows])
    everyone = [torch.empty_like(mine_FT) for _ in range(size)]
    dist.all_gather(everyone, mine_FT, group=group)
    logp_R, logmu_R, advantages_R, ids_R, weights_R, trained_R = torch.cat(everyone, dim=1)
    logp_of_rank = list(logp_R.split(len(logp_T)))
    logp_of_rank[group.rank()] = logp_T
    outputs = evaluate(
        loss_function,
        LossInputs(
            logp_T=torch.cat(logp_of_rank),
            logmu_T=logmu_R,
            advantages_T=advantages_R,
            mask_T=trained_R.bool(),
            sequence_ids_T=ids_R.long(),
            num_sequences=own.num_sequences,
        ),
    )
    of_tokens_R = weights_R * outputs.loss_T
    start = group.rank() * len(logp_T)

    def of_own(t_R: Tensor) -> Tensor:
        return t_R[start : start + len(logp_T)][mask_T]

    whole = of_tokens_R.sum()
    loss = of_own(of_tokens_R).sum().detach() + (whole - whole.detach())
    return loss, LossOutputs(*(of_own(t) for t in (outputs.loss_T, outputs.coefficient_T, outputs.weight_T)))
