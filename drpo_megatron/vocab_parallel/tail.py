"""The certified sparse backward: columns of a chunk that hold almost no gradient are left out of both products.

With G the gradient of a chunk's logits [C, V] and D the columns that are left out, ∂weight = Gᵀ·h gets rows of zeros,
and ∂hidden = G·W gets the mean row W̄ of the weight in place of each W_v: output weights share a large common part, and
G_D's row sums times W̄ cost next to nothing. Both errors are bounded without computing them:

    token t:    ‖Σ_{v∈D} G_tv·(W_v − W̄)‖ ≤ Σ_{v∈D} |G_tv|·‖W_v − W̄‖
    column v:   ‖Σ_t G_tv·h_t‖           ≤ Σ_t |G_tv|·‖h_t‖

A chunk's bound is the larger of the two, each as a Frobenius norm relative to the gradient it belongs to: at least
‖computed‖ − bound for ∂hidden, and for ∂weight at least the norm of the rows that were computed. Columns are left out
from the smallest up as far as an estimate of the bound allows, which learns from the chunks before; if the bound itself
then exceeds `tolerance`, the columns that were left out are added, and the chunk is exact. Under tensor parallelism
each rank decides for its shard, relative to its own part of ∂hidden.

This sums mass over the whole chunk, where cut-cross-entropy (arXiv 2411.09009) drops blocks whose every probability is
below a fixed number: that bounds an entry, and not the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drpo_megatron.vocab_parallel.chunks import WeightGradient
from drpo_megatron.vocab_parallel.torch_kernels import blocks, rows_per_block

COLUMN_BLOCK = 2048
"""Columns gathered at a time: their copies of weight rows and of the operand stay small."""

FIRST_MARGIN = 0.4
AIM = 0.75
"""Columns are left out up to a margin times the estimate. It starts low and follows the chunks' bounds, so that they
come to AIM times the tolerance: some chunks have a softer tail than the one before."""

LARGEST_KEPT_SHARE = 0.8
"""Gathering costs more than it saves when more columns than this stay."""


@dataclass(frozen=True)
class TailReport:
    """What the sparse backward left out on this rank.

    bound: the largest relative bound of a chunk, at most the tolerance. hidden_bound, weight_bound: upper bounds of the
    Frobenius norm of the error in ∂hidden and in ∂weight, over all chunks. kept_share: share of (chunk, column) pairs
    that were multiplied. exact_chunks: chunks done in full.
    """

    bound: float = 0.0
    hidden_bound: float = 0.0
    weight_bound: float = 0.0
    kept_share: float = 1.0
    exact_chunks: int = 0


@dataclass
class SparseBackward:
    """Both backward products of chunks, within `tolerance`; `report` is of all chunks so far."""

    weight_VH: Tensor
    tolerance: float
    _mean_H: Tensor = field(init=False)
    _norms_V: Tensor = field(init=False)  # of W_v − W̄
    _missing_V: Tensor = field(init=False)
    _margin: float = FIRST_MARGIN
    _bound: float = 0.0
    _hidden_square: float = 0.0
    _kept: int = 0
    _chunks: int = 0
    _exact: int = 0

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.weight_VH.dtype == torch.float64 else torch.float32
        self._mean_H = self.weight_VH.mean(0, dtype=dtype)
        self._norms_V = torch.empty(len(self.weight_VH), dtype=dtype, device=self.weight_VH.device)
        for norms_B, weight_BH in zip(
            self._norms_V.split(COLUMN_BLOCK), self.weight_VH.split(COLUMN_BLOCK), strict=True
        ):
            torch.linalg.vector_norm(weight_BH - self._mean_H, dim=1, out=norms_B)
        self._missing_V = torch.zeros_like(self._norms_V)

    @property
    def report(self) -> TailReport:
        pairs = self._chunks * len(self._norms_V)
        return TailReport(
            bound=self._bound,
            hidden_bound=self._hidden_square**0.5,
            weight_bound=float(torch.linalg.vector_norm(self._missing_V)),
            kept_share=self._kept / pairs if pairs else 1.0,
            exact_chunks=self._exact,
        )

    def products(
        self,
        operand_CV: Tensor,
        factor_C: Tensor,
        hidden_CH: Tensor,
        scaled_CH: Tensor,
        size_C: Tensor,
        gradient: WeightGradient,
    ) -> Tensor | None:
        """∂hidden / factor, [C, H] in at least float32, with ∂weight added to `gradient`; None: do the chunk in full.

        G = factor_C·operand_CV and scaled_CH = factor_C·hidden_CH. size_C: |∂L/∂logπ|·(1 − p) / τ, from which the size
        of ∂hidden is estimated.
        """
        self._chunks += 1
        hidden_norm_C = torch.linalg.vector_norm(hidden_CH, dim=1, dtype=factor_C.dtype)
        column_bound_V = _column_sums(operand_CV, factor_C.abs() * hidden_norm_C)
        order_V = torch.argsort(column_bound_V * self._norms_V)
        growing_V = (column_bound_V * self._norms_V)[order_V].cumsum(0)
        allowed = self._margin * self.tolerance * self._norms_V.mean() * (size_C * hidden_norm_C).sum()
        num_out = int((growing_V <= allowed).sum())
        if len(order_V) - num_out > LARGEST_KEPT_SHARE * len(order_V):
            self._exact += 1
            self._kept += len(order_V)
            return None
        out, kept = order_V[:num_out], order_V[num_out:].sort().values
        grad_CH = torch.zeros_like(hidden_CH, dtype=factor_C.dtype)
        kept_square = self._multiply(kept, operand_CV, scaled_CH, grad_CH, gradient)

        is_out_V = torch.zeros_like(self._norms_V).index_fill_(0, out, 1.0)
        token_bound_C, mass_C = _row_sums(operand_CV, is_out_V * self._norms_V, is_out_V)
        hidden_bound = float(torch.linalg.vector_norm(token_bound_C * factor_C))
        exact_part_CH = grad_CH
        grad_CH = grad_CH + torch.outer(mass_C, self._mean_H)
        hidden_norm = float(torch.linalg.vector_norm(grad_CH * factor_C[:, None]))
        weight_bound = float(torch.linalg.vector_norm(column_bound_V[out]))
        bound = max(_relative(hidden_bound, hidden_norm - hidden_bound), _relative(weight_bound, kept_square**0.5))
        self._margin *= min(1.5, max(0.1, AIM * self.tolerance / bound)) if bound > 0 else 1.5
        if bound <= self.tolerance:
            self._missing_V.index_add_(0, out, column_bound_V[out])
            self._hidden_square += hidden_bound**2
            self._bound = max(self._bound, bound)
            self._kept += len(kept)
        else:
            grad_CH = exact_part_CH
            self._multiply(out.sort().values, operand_CV, scaled_CH, grad_CH, gradient)
            self._exact += 1
            self._kept += len(order_V)
        return grad_CH

    def _multiply(
        self, columns_K: Tensor, operand_CV: Tensor, scaled_CH: Tensor, grad_CH: Tensor, gradient: WeightGradient
    ) -> float:
        """Both products over the given columns; the squared norm of the weight gradient's rows."""
        square = torch.zeros((), dtype=gradient.total_VH.dtype, device=operand_CV.device)
        for columns_B in columns_K.split(COLUMN_BLOCK):
            operand_CB = operand_CV.index_select(1, columns_B)
            grad_CH += torch.mm(operand_CB, self.weight_VH.index_select(0, columns_B))
            square += gradient.add_rows(columns_B, operand_CB, scaled_CH)
        return float(square)


def _relative(bound: float, norm: float) -> float:
    if bound == 0.0:
        return 0.0
    return bound / norm if norm > 0 else float("inf")


def _column_sums(matrix_CV: Tensor, weights_C: Tensor) -> Tensor:
    """Σ_t |matrix_tv|·weights_t, [V]."""
    sums_V = weights_C.new_zeros(matrix_CV.shape[1])
    scratch_BV = _scratch(matrix_CV, sums_V.dtype)
    for rows in blocks(matrix_CV):
        absolute_BV = scratch_BV[: len(matrix_CV[rows])].copy_(matrix_CV[rows]).abs_()
        sums_V.addmv_(absolute_BV.t(), weights_C[rows])
    return sums_V


def _row_sums(matrix_CV: Tensor, weights_V: Tensor, signed_weights_V: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_v |matrix_tv|·weights_v and Σ_v matrix_tv·signed_weights_v, each [C]."""
    sums_C, signed_sums_C = weights_V.new_empty(2, len(matrix_CV)).unbind()
    scratch_BV = _scratch(matrix_CV, weights_V.dtype)
    for rows in blocks(matrix_CV):
        copy_BV = scratch_BV[: len(matrix_CV[rows])].copy_(matrix_CV[rows])
        torch.mv(copy_BV, signed_weights_V, out=signed_sums_C[rows])
        torch.mv(copy_BV.abs_(), weights_V, out=sums_C[rows])
    return sums_C, signed_sums_C


def _scratch(matrix_CV: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix_CV.new_empty(rows_per_block(matrix_CV.shape[1]), matrix_CV.shape[1], dtype=dtype)
