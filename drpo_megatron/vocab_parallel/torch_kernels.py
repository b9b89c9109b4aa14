"""A chunk's logits with their statistics, and logits into gradient operand in place, in plain torch.

The product is done in tiles, and a tile, which about fits the cores' own caches, goes through all element-wise
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

CACHE_ELEMENTS = 176 * 2**10
"""Elements of a thread's share of a tile: in float32 704 KiB, and as much scratch."""

COLUMN_BLOCK = 512
"""Columns of a tile. The product alone is faster so than over the whole weight too: 1.2 times with MKL at
441 × 1,024 × 151,936 on two cores."""

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
    stats_C4[:, 0] = torch.finfo(dtype).min
    stats_C4[:, 3] = -torch.inf
    tiles = _even_slices(num_rows, rows_per_block(COLUMN_BLOCK))
    targets = [_rows_by_block(targets_C[rows], num_columns) for rows in tiles]
    elements = max((rows.stop - rows.start for rows in tiles), default=0) * min(COLUMN_BLOCK, num_columns)
    product, scratch = logits_CV.new_empty(elements), stats_C4.new_empty(elements)
    for block, start in enumerate(range(0, num_columns, COLUMN_BLOCK)):
        weight_BH = weight_VH[start : start + COLUMN_BLOCK]
        for rows, rows_by_block in zip(tiles, targets, strict=True):
            hidden_RH, stats_R4, shape = hidden_CH[rows], stats_C4[rows], (rows.stop - rows.start, len(weight_BH))
            out_RB, bits_RB = (buffer[: math.prod(shape)].view(shape) for buffer in (product, scratch))
            z_RB = _logits(hidden_RH, weight_BH, temperature, out_RB)
            if start == 0:
                stats_R4[:, 0] = z_RB.amax(1)
            column_R, here = targets_C[rows] - start, rows_by_block[block]
            if len(here):
                stats_R4[here, 3] = z_RB[here, column_R[here]]
            sum_R = _exponentiate_from_(z_RB, stats_R4[:, 0], bits_RB)
            outgrown_R = sum_R > _LARGEST_SUM
            if bool(outgrown_R.any()):
                # Rare, and the logits are gone: they are multiplied again rather than looked through each time.
                at = outgrown_R.nonzero().squeeze(1)
                z_UB = _logits(hidden_RH[at], weight_BH, temperature)
                _raise_maximum_(stats_R4, at, z_UB.amax(1), logits_CV[rows, :start] if exponentiate else None)
                # Of fewer rows, whose sums may be in another order: the target's logit must be the one in the sum.
                owned_U, column_U = owned_targets(column_R[at], len(weight_BH))
                stats_R4[at, 3] = torch.where(owned_U, z_UB.gather(1, column_U[:, None]).squeeze(1), stats_R4[at, 3])
                bits_UB = torch.empty_like(z_UB)
                sum_R[at] = _exponentiate_from_(z_UB, stats_R4[at, 0], bits_UB)
                z_RB[at], bits_RB[at] = z_UB, bits_UB
            stats_R4[:, 1] += sum_R
            stats_R4[:, 2] += bits_RB.mul_(z_RB).sum(1) / _LOG2_E
            if exponentiate:
                logits_CV[rows, start : start + COLUMN_BLOCK] = z_RB
    return stats_C4


def _logits(hidden_RH: Tensor, weight_BH: Tensor, temperature: float, out_RB: Tensor | None = None) -> Tensor:
    """z in at least float32, in `out_RB` unless that is of lower precision."""
    product_RB = torch.mm(hidden_RH, weight_BH.t(), out=out_RB)
    return _divided(product_RB.to(statistics_dtype(product_RB)), temperature)


def _rows_by_block(targets_R: Tensor, num_columns: int) -> tuple[Tensor, ...]:
    """For each block of columns the rows whose target is in it."""
    sorted_R, order_R = targets_R.sort()
    edges = torch.tensor([*range(0, num_columns, COLUMN_BLOCK), num_columns], device=targets_R.device)
    return order_R.tensor_split(torch.searchsorted(sorted_R, edges).tolist())[1:-1]


def _exponentiate_from_(z_RB: Tensor, maximum_R: Tensor, bits_RB: Tensor) -> Tensor:
    """z to exp(z − maximum) in place, with the powers of two in `bits_RB`; the sums of the rows."""
    torch.sub(z_RB, maximum_R[:, None], out=bits_RB).mul_(_LOG2_E)
    return torch.exp2(bits_RB, out=z_RB).sum(1)


def _divided(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def _raise_maximum_(stats_R4: Tensor, at: Tensor, maximum_U: Tensor, exponentials_RV: Tensor | None) -> None:
    """Take sums and exponentials so far of the rows `at` relative to another m."""
    m_U, s_U, q_U, g_U = stats_R4[at].unbind(1)
    shift_U = m_U - maximum_U
    scale_U = shift_U.exp()
    q_U = (q_U + torch.where(s_U > 0, s_U * shift_U, 0.0)) * scale_U
    stats_R4[at] = torch.stack((maximum_U, s_U * scale_U, q_U, g_U), 1)
    if exponentials_RV is not None:
        exponentials_RV[at] *= scale_U[:, None].to(exponentials_RV.dtype)


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


def _even_slices(size: int, most: int) -> list[slice]:
    """As few as can be with at most `most` each."""
    count = math.ceil(size / most)
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


def _exponentiate_(logits_CV: Tensor, log_normalizer_C: Tensor, temperature: float) -> None:
    """Logits to probabilities, in place."""
    for rows in blocks(logits_CV):
        z_BV = _divided(logits_CV[rows].to(log_normalizer_C.dtype), temperature)
        z_BV.sub_(log_normalizer_C[rows, None]).mul_(_LOG2_E).exp2_()
        if z_BV.dtype != logits_CV.dtype:
            logits_CV[rows] = z_BV
