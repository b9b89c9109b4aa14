"""The certified sparse backward: what holds almost no gradient is left out of both products.

G is the gradient of a chunk's logits, [C, V]. Its rows are put in order of entropy, softest first, and cut into groups;
column v is multiplied for the first groups only, as many as need it: a staircase, whose steps are dense products. With
D the entries that are left out, ∂weight = Gᵀ·h lacks their part, and ∂hidden = G·W gets the mean row W̄ of the weight
in place of each W_v: output weights share a large common part, and G_D's row sums times W̄ cost next to nothing. Both
errors are bounded without computing them:

    token t:    ‖Σ_{v∈D} G_tv·(W_v − W̄)‖ ≤ Σ_{v∈D} |G_tv|·‖W_v − W̄‖
    column v:   ‖Σ_{t∈D} G_tv·h_t‖       ≤ Σ_{t∈D} |G_tv|·‖h_t‖

A chunk's bound is the larger of the two, each as a Frobenius norm relative to the gradient it belongs to, of which the
norm is at least ‖computed‖ − bound. Entries are left out from the smallest up as far as an estimate of the bound
allows, which learns from the chunks before; if the bound itself then exceeds `tolerance`, the entries that were left
out are added, and the chunk is exact. The targets' own entries are always multiplied. Under tensor
parallelism each rank decides for its shard, relative to its own part of ∂hidden.

This sums mass over the whole chunk, where cut-cross-entropy (arXiv 2411.09009) drops blocks whose every probability is
below a fixed number: that bounds an entry, and not the gradient.

All of it is torch on the tensors' device. It has not been run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from drpo_megatron.vocab_parallel.chunks import WeightGradient, statistics_dtype

COLUMN_BLOCK, ROW_BLOCK = 2048, 16
"""Columns gathered, and rows looked at, at a time: the copies stay small, and a row block stays in a cache."""

ROW_GROUPS, SMALLEST_GROUP = 4, 64
"""Groups of a chunk's rows, and the rows below which a group is not worth a product of its own."""

FIRST_MARGIN = 0.4
AIM = 0.75
"""Entries are left out up to a margin times the estimate. It starts low and follows the chunks' bounds, so that they
come to AIM times the tolerance: some chunks have a softer tail than the one before."""

LARGEST_KEPT_SHARE = 0.7
"""Gathering costs more than it saves when more than this stays."""

_BINS_PER_OCTAVE, _OCTAVES = 8, 256


@dataclass(frozen=True)
class TailReport:
    """What the sparse backward left out on this rank.

    bound: the largest relative bound of a chunk, at most the tolerance. hidden_bound, weight_bound: upper bounds of the
    Frobenius norm of the error in ∂hidden and in ∂weight, over all chunks. kept_share: share of (token, column) pairs
    that were multiplied. exact_chunks: chunks done in full.
    """

    bound: float = 0.0
    hidden_bound: float = 0.0
    weight_bound: float = 0.0
    kept_share: float = 1.0
    exact_chunks: int = 0


@dataclass(frozen=True)
class ChunkGradient:
    """G = factor_C[:, None]·operand_CV, and what both products need.

    columns_C: the target's column; outside [0, V) another rank owns it. size_C: |∂L/∂logπ|·(1 − p) / τ, from which the
    size of ∂hidden is estimated. softness_C: orders the rows, the softest distribution first, and those without
    gradient last. signed: whether entries beside the targets' can be negative. scaled_CH = factor_C·hidden_CH.
    """

    operand_CV: Tensor
    factor_C: Tensor
    hidden_CH: Tensor
    scaled_CH: Tensor
    columns_C: Tensor
    size_C: Tensor
    softness_C: Tensor
    signed: bool


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
    _pairs: int = 0
    _exact: int = 0

    def __post_init__(self) -> None:
        dtype = statistics_dtype(self.weight_VH)
        self._mean_H = self.weight_VH.mean(0, dtype=dtype)
        self._norms_V = torch.empty(len(self.weight_VH), dtype=dtype, device=self.weight_VH.device)
        for norms_B, weight_BH in zip(
            self._norms_V.split(COLUMN_BLOCK), self.weight_VH.split(COLUMN_BLOCK), strict=True
        ):
            torch.linalg.vector_norm(weight_BH - self._mean_H, dim=1, out=norms_B)
        self._missing_V = torch.zeros_like(self._norms_V)

    @property
    def report(self) -> TailReport:
        return TailReport(
            bound=self._bound,
            hidden_bound=self._hidden_square**0.5,
            weight_bound=float(torch.linalg.vector_norm(self._missing_V)),
            kept_share=self._kept / self._pairs if self._pairs else 1.0,
            exact_chunks=self._exact,
        )

    def products(self, chunk: ChunkGradient, gradient: WeightGradient) -> Tensor:
        """∂hidden / factor, [C, H] in at least float32, with ∂weight added to `gradient`."""
        stairs = self._stairs(chunk)
        num_rows, num_columns = chunk.operand_CV.shape
        self._pairs += num_rows * num_columns
        if stairs is None:
            self._exact += 1
            self._kept += num_rows * num_columns
            gradient.add_product(chunk.operand_CV, chunk.scaled_CH)
            return torch.mm(chunk.operand_CV, self.weight_VH)
        work = _Products(chunk, stairs, self.weight_VH, gradient)
        for step, columns_K in enumerate(stairs.columns):
            if step:
                work.add(columns_K, slice(0, stairs.ends[step]), self._norms_V)
        work.product_CH += torch.outer(work.mass_C, self._mean_H)

        factor_C = chunk.factor_C[stairs.order_C]
        # What is left of a sum after its parts were taken off carries the rounding of the whole.
        rounding = torch.finfo(factor_C.dtype).eps * num_columns**0.5
        token_bound_C = work.bound_C.clamp(min=0) + rounding * stairs.bound_C
        hidden_bound = float(torch.linalg.vector_norm(token_bound_C * factor_C))
        hidden_norm = float(torch.linalg.vector_norm(work.product_CH * factor_C[:, None]))
        weight_bound = float(torch.linalg.vector_norm(stairs.column_bound_V))
        bound = max(_relative(hidden_bound, hidden_norm), _relative(weight_bound, float(work.square) ** 0.5))
        self._margin *= min(1.5, max(0.1, AIM * self.tolerance / bound)) if bound > 0 else 1.5
        if bound <= self.tolerance:
            self._missing_V += stairs.column_bound_V
            self._hidden_square += hidden_bound**2
            self._bound = max(self._bound, bound)
            self._kept += stairs.kept
        else:
            work.product_CH -= torch.outer(work.mass_C, self._mean_H)
            for step, columns_K in enumerate(stairs.columns):
                work.add(columns_K, slice(stairs.ends[step], num_rows), None)
            self._exact += 1
            self._kept += num_rows * num_columns
        return torch.empty_like(work.product_CH).index_copy_(0, stairs.order_C, work.product_CH)

    def _stairs(self, chunk: ChunkGradient) -> _Stairs | None:
        """Which columns are multiplied for which rows; None when leaving out does not pay."""
        num_rows, num_columns = chunk.operand_CV.shape
        order_C = torch.argsort(chunk.softness_C, descending=True, stable=True)
        num_groups = max(1, min(ROW_GROUPS, num_rows // SMALLEST_GROUP))
        ends = [num_rows * group // num_groups for group in range(num_groups + 1)]
        hidden_norm_C = torch.linalg.vector_norm(chunk.hidden_CH, dim=1, dtype=chunk.factor_C.dtype)
        row_weight_C = (chunk.factor_C.abs() * hidden_norm_C)[order_C]
        row_weights_GC = row_weight_C.new_zeros(num_groups, num_rows)
        for group in range(num_groups):
            rows = slice(ends[group], ends[group + 1])
            row_weights_GC[group, order_C[rows]] = row_weight_C[rows]
        mass_GV, bound_C, mass_C = _sums(chunk.operand_CV, row_weights_GC, self._norms_V, chunk.signed)

        score_GV = mass_GV * self._norms_V
        allowed = self._margin * self.tolerance * self._norms_V.mean() * (chunk.size_C * hidden_norm_C).sum()
        group_G1 = torch.arange(1, num_groups + 1, device=score_GV.device)[:, None]
        step_V = ((score_GV > _threshold(score_GV, allowed)) * group_G1).amax(0)
        # A target's column is multiplied as far as the target's row; rows without gradient need nothing.
        group_of_row_C = torch.empty_like(order_C)
        for group in range(num_groups):
            group_of_row_C[order_C[ends[group] : ends[group + 1]]] = group + 1
        needed_C = (chunk.columns_C >= 0) & (chunk.columns_C < num_columns) & (chunk.factor_C != 0)
        step_V.scatter_reduce_(0, chunk.columns_C[needed_C], group_of_row_C[needed_C], "amax")
        columns = [(step_V == step).nonzero().squeeze(1) for step in range(num_groups + 1)]
        kept = sum(end * len(columns_K) for end, columns_K in zip(ends, columns, strict=True))
        if kept > LARGEST_KEPT_SHARE * num_rows * num_columns:
            return None
        column_bound_V = (mass_GV * (group_G1 > step_V)).sum(0)
        return _Stairs(order_C, ends, columns, kept, column_bound_V, bound_C[order_C], mass_C[order_C])


@dataclass(frozen=True)
class _Stairs:
    """columns[s] are multiplied for the first ends[s] rows in the order `order_C`.

    column_bound_V: Σ |G_tv|·‖h_t‖ over what is left out. bound_C, mass_C: Σ_v |operand_tv|·‖W_v − W̄‖ and Σ_v
    operand_tv over all columns, rows in order; without `signed` the first has the targets' entries with their sign.
    """

    order_C: Tensor
    ends: list[int]
    columns: list[Tensor]
    kept: int
    column_bound_V: Tensor
    bound_C: Tensor
    mass_C: Tensor


class _Products:
    """Both products of a chunk, rows in order, as parts are added. bound_C, mass_C: the sums of what is not in yet."""

    def __init__(self, chunk: ChunkGradient, stairs: _Stairs, weight_VH: Tensor, gradient: WeightGradient) -> None:
        self._operand_CV, self._signed = chunk.operand_CV, chunk.signed
        self._order_C, self._weight_VH, self._gradient = stairs.order_C, weight_VH, gradient
        self._scaled_CH = chunk.scaled_CH[stairs.order_C]
        self.product_CH = torch.zeros_like(chunk.hidden_CH, dtype=chunk.factor_C.dtype)
        self.bound_C, self.mass_C = stairs.bound_C.clone(), stairs.mass_C.clone()
        self.square = torch.zeros((), dtype=gradient.total_VH.dtype, device=gradient.total_VH.device)

    def add(self, columns_K: Tensor, rows: slice, norms_V: Tensor | None) -> None:
        """Multiply the given columns of the given rows. square: grows by the squared norm of their part of ∂weight."""
        if rows.start == rows.stop:
            return
        for columns_B in columns_K.split(COLUMN_BLOCK):
            operand_RB = _take(self._operand_CV, self._order_C[rows], columns_B)
            self.square += self._gradient.add_rows(columns_B, operand_RB, self._scaled_CH[rows])
            self.product_CH[rows] += torch.mm(operand_RB, self._weight_VH.index_select(0, columns_B))
            if norms_V is not None:
                operand_RB = operand_RB.to(norms_V.dtype)
                self.mass_C[rows] -= operand_RB.sum(1)
                self.bound_C[rows] -= torch.mv(operand_RB.abs_() if self._signed else operand_RB, norms_V[columns_B])


def _sums(
    operand_CV: Tensor, row_weights_GC: Tensor, column_weights_V: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_t weight_gt·|operand_tv| [G, V], Σ_v |operand_tv|·weight_v [C] and Σ_v operand_tv [C], in one pass.

    Without `signed` no absolute value is taken: only the targets' entries are negative, and those are never left out.
    """
    num_rows, num_columns = operand_CV.shape
    mass_GV = row_weights_GC.new_zeros(len(row_weights_GC), num_columns)
    bound_C, sum_C = row_weights_GC.new_empty(2, num_rows).unbind()
    for start in range(0, num_rows, ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        block_BV = operand_CV[rows].to(mass_GV.dtype)
        torch.sum(block_BV, 1, out=sum_C[rows])
        if signed:
            block_BV = block_BV.abs()
        torch.mv(block_BV, column_weights_V, out=bound_C[rows])
        mass_GV.addmm_(row_weights_GC[:, rows], block_BV)
    return mass_GV, bound_C, sum_C


def _take(matrix_CV: Tensor, rows_R: Tensor, columns_K: Tensor) -> Tensor:
    """matrix_CV[rows_R[:, None], columns_K], contiguous. `gather` on the flat matrix takes 0.6 of indexing's time."""
    flat_RN = matrix_CV.view(1, -1).expand(len(rows_R), -1)
    return flat_RN.gather(1, rows_R[:, None] * matrix_CV.shape[1] + columns_K)


def _threshold(score_GV: Tensor, allowed: Tensor) -> Tensor:
    """The scores that are not above this value, a scalar, sum up to at most `allowed`.

    From a histogram over the logarithm: counts are whole numbers, so the answer is the same each time on any device.
    """
    top, last = score_GV.amax(), _OCTAVES * _BINS_PER_OCTAVE
    depth_GV = (torch.log2(top / score_GV) * _BINS_PER_OCTAVE).nan_to_num(nan=last).clamp(0, last)
    counts = torch.bincount(depth_GV.to(torch.int64).flatten(), minlength=last + 1)
    step = torch.arange(last + 1, dtype=score_GV.dtype, device=score_GV.device) / _BINS_PER_OCTAVE
    largest = top * torch.exp2(-step)  # score of a bin
    growing = (counts * largest).flip(0).cumsum(0)  # from the smallest scores up
    bins_out = (growing <= allowed).sum()
    return torch.cat([largest, largest.new_full((1,), -1.0)])[last + 1 - bins_out]


def _relative(bound: float, computed_norm: float) -> float:
    """bound over the least norm that the exact gradient can have."""
    if bound == 0.0:
        return 0.0
    return bound / (computed_norm - bound) if computed_norm > bound else float("inf")
