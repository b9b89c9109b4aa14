"""How the fused operation cuts its work: the vocabulary's shard, token chunks from a memory budget, and where the
weight's gradient is summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

DEFAULT_MEMORY_BUDGET = 256 * 2**20
"""Bytes for the logits of the chunks in flight. A vocabulary of 151,936 in float32 gives 441 tokens a chunk."""

_CAST_ELEMENTS = 2**22


@dataclass(frozen=True)
class Shard:
    """This rank's columns [first, first + valid) of the vocabulary; what its weight holds beyond them is padding."""

    group: ProcessGroup | None
    rank: int
    ranks: int
    first: int
    valid: int
    temperature: float

    @staticmethod
    def of(weight_VH: Tensor, group: ProcessGroup | None, vocab_size: int, temperature: float) -> Shard:
        """Raises ValueError when the shards are too small for `vocab_size` or the temperature is not positive."""
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        num_columns = weight_VH.shape[0]
        check_shard(num_columns, ranks, vocab_size, temperature)
        first = rank * num_columns
        return Shard(group, rank, ranks, first, min(max(vocab_size - first, 0), num_columns), temperature)


def check_shard(num_columns: int, ranks: int, vocab_size: int, temperature: float) -> None:
    """Raises ValueError when `ranks` shards cannot hold the vocabulary, or the temperature is not positive."""
    if num_columns * ranks < vocab_size:
        raise ValueError(
            f"{ranks} shards of {num_columns} columns cannot hold a vocabulary of {vocab_size}: "
            "pass the vocabulary's shard on each rank and the group they are sharded over"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: greedy rollouts have no log-probability")


def chunk_tokens(num_tokens: int, columns: int, itemsize: int, ranks: int, memory_budget: int) -> int:
    """Tokens of a chunk, at least 1: chunks of nearly equal size whose logits fit `memory_budget` bytes.

    columns: of the weight's shard (equal on all ranks, so that all of them cut alike). With more than one rank two
    chunks are in flight: the statistics of one travel while the next is multiplied.
    """
    in_flight = 2 if ranks > 1 else 1
    largest = max(1, memory_budget // (in_flight * columns * itemsize))
    chunks = max(1, math.ceil(num_tokens / largest))
    return max(1, math.ceil(num_tokens / chunks))


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64 tensors."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class WeightGradient:
    """The sum of a shard's weight gradient over chunks, at least float32: Megatron's `main_grad`, or a buffer."""

    def __init__(self, weight_VH: Tensor, main_grad_VH: Tensor | None) -> None:
        self.in_main_grad = main_grad_VH is not None
        self.total_VH = (
            torch.zeros_like(weight_VH, dtype=statistics_dtype(weight_VH)) if main_grad_VH is None else main_grad_VH
        )

    def add_product(self, operand_CV: Tensor, hidden_CH: Tensor) -> None:
        """Add operandᵀ·hidden to the first V rows, without a temporary of [V, H]."""
        num_columns = operand_CV.shape[1]
        total_VH = self.total_VH[:num_columns]
        if operand_CV.dtype == total_VH.dtype:
            total_VH.addmm_(operand_CV.t(), hidden_CH)
            return
        if operand_CV.is_cuda and total_VH.dtype == torch.float32:
            torch.addmm(total_VH, operand_CV.t(), hidden_CH, out_dtype=torch.float32, out=total_VH)
            return
        # torch has that product only for CUDA: a block of rows at a time.
        step = max(1, _CAST_ELEMENTS // hidden_CH.shape[1])
        for start in range(0, num_columns, step):
            block_CB = operand_CV[:, start : start + step]
            self.total_VH[start : start + block_CB.shape[1]].add_(torch.mm(block_CB.t(), hidden_CH))

    def add_rows(self, rows_K: Tensor, operand_CK: Tensor, hidden_CH: Tensor) -> Tensor:
        """Add operandᵀ·hidden to the given distinct rows; return the squared norm of what was added, a scalar."""
        product_KH = torch.mm(operand_CK.t(), hidden_CH).to(self.total_VH.dtype)
        self.total_VH.index_add_(0, rows_K, product_KH)
        norm: Tensor = torch.linalg.vector_norm(product_KH)
        return norm.square()
