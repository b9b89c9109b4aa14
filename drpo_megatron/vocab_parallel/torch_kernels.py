"""The two passes over a chunk's logits in plain torch: statistics, and logits into gradient operand, both in place.

A block of rows that fits the processor's cache goes through all element-wise operations before the next one, so that
the chunk crosses the memory bus once a pass. The exponentials are computed once: `statistics` leaves E = exp(z − m) in
place of the logits, m being the local maximum, and the soft-max is never scaled. With d = log Z − m, log Z the
normalizer over all ranks, p = E·exp(−d), so the gradient of Σ c·logπ is

    ∂/∂logit_v = −(c/τ)·exp(−d)·(E_v − 1[v = target]·exp(d))

one row factor, which belongs to the small operands of the two products, times E changed in one entry a token. The
entropy's gradient, −e·p·(log p + H), has log p = log E − d and takes one more pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from drpo_megatron.vocab_parallel.chunks import statistics_dtype
from drpo_megatron.vocab_parallel.logprob import owned_targets

CACHE_ELEMENTS = 160 * 2**10
"""Elements of a thread's share of a block of rows: in float32 640 KiB, and as much scratch, fit a core's own cache."""

# exp(±d) must stay in range. Where d is larger, this shard's probabilities are below exp(−40) ≈ 4e-18 each: they count
# as that much, which float32 cannot tell from zero beside the target's 1.
_LARGEST_SHIFT = {torch.float32: 40.0, torch.float64: 300.0}


def statistics(logits_CV: Tensor, targets_C: Tensor, temperature: float, *, exponentiate: bool) -> Tensor:
    """(m, s, q, g) of z = logits / temperature, [C, 4] in at least float32, as in `logprob`. V may be 0.

    targets_C: columns of this shard; outside [0, V) another rank owns the target and g is −inf. Overwrites the logits:
    with exp(z − m) if `exponentiate`, else with anything.
    """
    num_columns = logits_CV.shape[1]
    stats_C4 = torch.empty(len(logits_CV), 4, dtype=statistics_dtype(logits_CV), device=logits_CV.device)
    m_C, s_C, q_C, g_C = stats_C4.unbind(1)
    if num_columns == 0:
        m_C.fill_(torch.finfo(stats_C4.dtype).min)
        s_C.zero_()
        q_C.zero_()
        g_C.fill_(-torch.inf)
        return stats_C4
    owned_C, column_C = owned_targets(targets_C, num_columns)
    dtype = stats_C4.dtype
    scratch_BV = logits_CV.new_empty(rows_per_block(num_columns), num_columns, dtype=dtype)
    for rows in blocks(logits_CV):
        z_BV = logits_CV[rows].to(dtype)  # the logits themselves unless they are of lower precision
        if temperature != 1.0:
            z_BV.div_(temperature)
        g_C[rows] = torch.where(owned_C[rows], z_BV.gather(1, column_C[rows, None]).squeeze(1), -torch.inf)
        m_C[rows] = m_B = torch.amax(z_BV, 1)
        shifted_BV = torch.sub(z_BV, m_B[:, None], out=scratch_BV[: len(z_BV)])
        torch.exp(shifted_BV, out=z_BV)
        s_C[rows] = z_BV.sum(1)
        q_C[rows] = shifted_BV.mul_(z_BV).sum(1)
        if exponentiate and z_BV.dtype != logits_CV.dtype:
            logits_CV[rows] = z_BV
    return stats_C4


def gradient_(
    logits_CV: Tensor,
    targets_C: Tensor,
    *,
    maximum_C: Tensor | None,
    logp_C: Tensor,
    log_normalizer_C: Tensor,
    entropy_C: Tensor,
    grad_logp_C: Tensor,
    grad_entropy_C: Tensor | None,
    temperature: float,
) -> Tensor:
    """Turn the chunk into G up to a factor a row, which is returned: G = factor_C[:, None] · logits_CV afterwards.

    G is the gradient, with respect to the logits, of Σ grad_logp·logπ + grad_entropy·H. maximum_C: m of `statistics`
    if that left exponentials; None if `logits_CV` are logits again.
    """
    if maximum_C is None:
        shift_C = torch.zeros_like(log_normalizer_C)
        _exponentiate_(logits_CV, log_normalizer_C, temperature)
        log_scale_C = shift_C
    else:
        log_scale_C = log_normalizer_C - maximum_C
        shift_C = log_scale_C.clamp(max=_LARGEST_SHIFT[log_scale_C.dtype])
    factor_C = torch.exp(-shift_C).div_(-temperature)
    target_C = torch.expm1(logp_C)  # p − 1 without the cancellation
    if grad_entropy_C is None:
        factor_C.mul_(grad_logp_C)
    else:
        constant_C = grad_logp_C + grad_entropy_C * (entropy_C - log_scale_C)
        for rows in blocks(logits_CV):
            e_BV = logits_CV[rows].to(shift_C.dtype)
            e_log_e_BV = torch.xlogy(e_BV, e_BV)
            e_BV.mul_(constant_C[rows, None]).addcmul_(e_log_e_BV, grad_entropy_C[rows, None])
            logits_CV[rows] = e_BV
        target_C = grad_logp_C * target_C + grad_entropy_C * logp_C.exp() * (logp_C + entropy_C)
    if logits_CV.shape[1]:
        owned_C, column_C = owned_targets(targets_C, logits_CV.shape[1])
        present_C1 = logits_CV.gather(1, column_C[:, None])
        entry_C1 = (target_C * shift_C.exp()).to(logits_CV.dtype)[:, None]
        logits_CV.scatter_(1, column_C[:, None], torch.where(owned_C[:, None], entry_C1, present_C1))
    return factor_C


def rows_per_block(num_columns: int) -> int:
    """Equally many rows for each thread: reductions over a row are divided by rows."""
    return torch.get_num_threads() * max(1, CACHE_ELEMENTS // max(1, num_columns))


def blocks(matrix_CV: Tensor) -> Iterator[slice]:
    """Rows in blocks of `rows_per_block`."""
    num_rows, num_columns = matrix_CV.shape
    step = rows_per_block(num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _exponentiate_(logits_CV: Tensor, log_normalizer_C: Tensor, temperature: float) -> None:
    """Logits to probabilities, in place."""
    for rows in blocks(logits_CV):
        z_BV = logits_CV[rows].to(log_normalizer_C.dtype)
        if temperature != 1.0:
            z_BV.div_(temperature)
        z_BV.sub_(log_normalizer_C[rows, None]).exp_()
        if z_BV.dtype != logits_CV.dtype:
            logits_CV[rows] = z_BV
