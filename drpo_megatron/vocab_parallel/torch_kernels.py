"""A chunk's logits with their statistics, and logits into gradient operand in place, in plain torch.

The product is done in blocks of columns, and a block that fits a core's own cache goes through all element-wise
operations before the next one: the statistics find the logits in a cache. The exponentials are computed once: `project`
leaves E = exp(z − m) in place of the logits, m being near the local maximum, and the soft-max is never scaled. They are
powers of two: torch's exp2 takes a third of exp's time, and the difference to m is scaled, which loses little. With
d = log Z − m, log Z the normalizer over all ranks, p = E·exp(−d), so the gradient of Σ c·logπ is

    ∂/∂logit_v = −(c/τ)·exp(−d)·(E_v − 1[v = target]·exp(d))

one row factor, which belongs to the small operands of the two products, times E changed in one entry a token. The
entropy's gradient, −e·p·(log p + H), has log p = log E − d and takes one more pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from drpo_megatron.vocab_parallel.chunks import statistics_dtype
from drpo_megatron.vocab_parallel.logprob import merge_statistics, owned_targets

CACHE_ELEMENTS = 160 * 2**10
"""Elements of a thread's share of a block of rows: in float32 640 KiB, and as much scratch, fit a core's own cache."""

COLUMN_BLOCK = 8192
"""Columns of a product whose statistics are taken before the next: the logits are then still in the shared cache."""

HEADROOM = 20.0
"""m is the maximum of the first columns until the exponentials of later ones sum up to exp(20), which is far from the
end of the range: to raise m is to scale what is there."""

_LARGEST_SUM = math.exp(HEADROOM)
_LOG2_E = 1 / math.log(2)

# exp(±d) must stay in range. Where d is larger, this shard's probabilities are below exp(HEADROOM − 48) ≈ 7e-13 each:
# they count as that much, which float32 cannot tell from zero beside the target's 1.
LARGEST_SHIFT = {torch.float32: 48.0, torch.float64: 300.0}


def project(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    temperature: float,
    logits_CV: Tensor,
    *,
    exponentiate: bool,
) -> Tensor:
    """Multiply hidden·Wᵀ into `logits_CV` and return (m, s, q, g) of z = logits / temperature, [C, 4] in at least
    float32, as in `logprob`, with an m that no z exceeds by more than `HEADROOM`. V may be 0.

    targets_C: columns of this shard; outside [0, V) another rank owns the target and g is −inf. `logits_CV` then holds
    exp(z − m) if `exponentiate`, else anything.
    """
    num_rows, num_columns = logits_CV.shape
    dtype = statistics_dtype(logits_CV)
    stats_C4 = torch.zeros(num_rows, 4, dtype=dtype, device=logits_CV.device)
    m_C, s_C, q_C, g_C = stats_C4.unbind(1)
    m_C.fill_(torch.finfo(dtype).min)
    g_C.fill_(-torch.inf)
    owned_C, column_C = owned_targets(targets_C, num_columns)
    for start in range(0, num_columns, COLUMN_BLOCK):
        columns = slice(start, min(start + COLUMN_BLOCK, num_columns))
        block_CB = torch.mm(hidden_CH, weight_VH[columns].t(), out=logits_CV[:, columns])
        here_C = owned_C & (column_C >= columns.start) & (column_C < columns.stop)
        local_C1 = (column_C - start).clamp(0, block_CB.shape[1] - 1)[:, None]
        _take_targets_(g_C, here_C, block_CB, local_C1, temperature)
        scratch_RB = logits_CV.new_empty(rows_per_block(block_CB.shape[1]), block_CB.shape[1], dtype=dtype)
        for rows in blocks(block_CB):
            # The logits themselves unless they are of lower precision.
            z_RB = _divided(block_CB[rows].to(dtype), temperature)
            if start == 0:
                torch.amax(z_RB, 1, out=m_C[rows])
            bits_RB = scratch_RB[: len(z_RB)]
            sum_R = _exponentiate_from_(z_RB, m_C[rows], bits_RB)
            too_low_R = sum_R > _LARGEST_SUM
            if bool(too_low_R.any()):
                # Rare, and the logits are gone: they are multiplied again rather than looked through each time.
                torch.mm(hidden_CH[rows], weight_VH[columns].t(), out=block_CB[rows])
                # Of fewer rows, whose sums may be in another order: the target's logit must be the one in the sum.
                _take_targets_(g_C[rows], here_C[rows], block_CB[rows], local_C1[rows], temperature)
                z_RB = _divided(block_CB[rows].to(dtype), temperature)
                maximum_R = torch.where(too_low_R, torch.amax(z_RB, 1), m_C[rows])
                _raise_maximum_(stats_C4[rows], maximum_R, logits_CV[rows, :start])
                sum_R = _exponentiate_from_(z_RB, maximum_R, bits_RB)
            s_C[rows] += sum_R
            q_C[rows] += bits_RB.mul_(z_RB).sum(1) / _LOG2_E
            if exponentiate and z_RB.dtype != block_CB.dtype:
                block_CB[rows] = z_RB
    return stats_C4


def _take_targets_(g_C: Tensor, here_C: Tensor, logits_CB: Tensor, column_C1: Tensor, temperature: float) -> None:
    """The logits of targets whose column is in these columns, into g."""
    g_C.copy_(torch.where(here_C, logits_CB.gather(1, column_C1).squeeze(1).to(g_C.dtype) / temperature, g_C))


def _exponentiate_from_(z_RB: Tensor, maximum_R: Tensor, bits_RB: Tensor) -> Tensor:
    """z to exp(z − maximum) in place, with the powers of two in `bits_RB`; the sums of the rows."""
    torch.sub(z_RB, maximum_R[:, None], out=bits_RB).mul_(_LOG2_E)
    return torch.exp2(bits_RB, out=z_RB).sum(1)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def _raise_maximum_(stats_R4: Tensor, maximum_R: Tensor, exponentials_RV: Tensor) -> None:
    """Take sums and exponentials so far relative to another m."""
    m_R, s_R, q_R, _ = stats_R4.unbind(1)
    shift_R = m_R - maximum_R
    scale_R = shift_R.exp()
    q_R.add_(torch.where(s_R > 0, s_R * shift_R, 0.0)).mul_(scale_R)
    s_R.mul_(scale_R)
    m_R.copy_(maximum_R)
    if exponentials_RV.shape[1]:
        exponentials_RV.mul_(scale_R[:, None].to(exponentials_RV.dtype))


def merge(gathered_RC4: Tensor, logp_C: Tensor, entropy_C: Tensor, log_normalizer_C: Tensor) -> None:
    """The statistics of all ranks into log-prob, entropy and log normalizer; see `merge_statistics`."""
    for out_C, merged_C in zip((logp_C, entropy_C, log_normalizer_C), merge_statistics(gathered_RC4), strict=True):
        out_C.copy_(merged_C)


def scale_rows(matrix_CH: Tensor, factor_C: Tensor, out_CH: Tensor) -> Tensor:
    """factor_C[:, None] · matrix_CH into `out_CH`, in its dtype; returns it."""
    return out_CH.copy_(matrix_CH * factor_C[:, None])


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

    G is the gradient, with respect to the logits, of Σ grad_logp·logπ + grad_entropy·H. maximum_C: m of `project`
    if that left exponentials; None if `logits_CV` are logits again.
    """
    if maximum_C is None:
        shift_C = torch.zeros_like(log_normalizer_C)
        _exponentiate_(logits_CV, log_normalizer_C, temperature)
        log_scale_C = shift_C
    else:
        log_scale_C = log_normalizer_C - maximum_C
        shift_C = log_scale_C.clamp(max=LARGEST_SHIFT[log_scale_C.dtype])
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
        z_BV = _divided(logits_CV[rows].to(log_normalizer_C.dtype), temperature)
        z_BV.sub_(log_normalizer_C[rows, None]).mul_(_LOG2_E).exp2_()
        if z_BV.dtype != logits_CV.dtype:
            logits_CV[rows] = z_BV
