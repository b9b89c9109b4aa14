"""A chunk's logits with their statistics, and logits into gradient operand, as Triton kernels, with the interface of
`torch_kernels`.

A logit travels through memory twice beside the products: one program a token reads its row, sums the statistics and
leaves E = exp(z − m) in place of the logits, where m is the maximum of the row's first block and of the target. The
products take E as it is, with one entry a token changed and the row's factor in their small operands: `torch_kernels`
derives it. Only an entropy bonus takes one more pass. Logits are float32 or bfloat16, all arithmetic is float32: E is
at most exp(HEADROOM) and rounded as the gradient itself would be. The kernels are correct under Triton's interpreter
and are tuned on a GPU, and only there, at the first call for a number of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from drpo_megatron.vocab_parallel import torch_kernels

_INTERPRETER_BLOCK, _TOKEN_BLOCK, _HIDDEN_BLOCK = 256, 128, 1024
_LOWEST = tl.constexpr(-3.0e38)
_HEADROOM = tl.constexpr(torch_kernels.HEADROOM)
_LARGEST_SHIFT = tl.constexpr(torch_kernels.LARGEST_SHIFT[torch.float32])

# Kernels have no types: Triton reads the annotations itself, and knows `tl.constexpr` alone.


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    logits,
    targets,
    stats,
    stride,
    num_columns,
    inverse_temperature,
    EXPONENTIATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    owned = (target >= 0) & (target < num_columns)
    g = tl.load(logits + tl.where(owned, target, 0)).to(tl.float32) * inverse_temperature
    first = tl.load(logits + tl.arange(0, BLOCK), mask=tl.arange(0, BLOCK) < num_columns, other=-float("inf"))
    m = tl.maximum(tl.max(first.to(tl.float32) * inverse_temperature, axis=0), _LOWEST)
    m = tl.maximum(m, tl.where(owned, g, _LOWEST))
    # Sums of each column of the blocks: one reduction a block, of the maximum, is what a block waits for.
    s_B = tl.zeros([BLOCK], dtype=tl.float32)
    q_B = tl.zeros([BLOCK], dtype=tl.float32)  # of exp(z − m)·(z − m)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        highest = tl.max(z, axis=0)
        if highest > m + _HEADROOM:
            # Rare: what is summed and stored so far is taken relative to a higher m.
            moved = m - highest
            scale = tl.exp(moved)
            q_B = scale * (q_B + tl.where(s_B > 0.0, moved * s_B, 0.0))
            s_B = scale * s_B
            m = highest
            if EXPONENTIATE:
                tl.debug_barrier()
                for before in range(0, start, BLOCK):
                    done = before + tl.arange(0, BLOCK)
                    e = tl.load(logits + done).to(tl.float32) * scale
                    tl.store(logits + done, e.to(logits.dtype.element_ty))
        shifted = z - m
        e = tl.exp(shifted)
        s_B += e
        q_B += tl.where(e > 0.0, e * shifted, 0.0)  # e·log e → 0 as e → 0
        if EXPONENTIATE:
            tl.store(logits + columns, e.to(logits.dtype.element_ty), mask=inside)
    s = tl.sum(s_B, axis=0)
    q = tl.sum(q_B, axis=0)
    tl.store(stats + row * 4, m)
    tl.store(stats + row * 4 + 1, s)
    tl.store(stats + row * 4 + 2, q)
    tl.store(stats + row * 4 + 3, tl.where(owned, g, -float("inf")))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    targets,
    log_normalizer,
    entropy,
    grad_logp,
    grad_entropy,
    stride,
    num_columns,
    inverse_temperature,
    EXPONENTIATED: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    logits += row * stride
    if EXPONENTIATED:
        z = tl.log(tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32))
    else:
        z = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
    log_p = z - tl.load(log_normalizer + row)
    p = tl.exp(log_p)
    c = tl.load(grad_logp + row)
    gradient = c * (tl.where(columns == tl.load(targets + row), 1.0, 0.0) - p)
    if HAS_ENTROPY:
        # p·(log p + H) → 0 as p → 0, also where log p is −inf.
        terms = p * (log_p + tl.load(entropy + row))
        gradient -= tl.load(grad_entropy + row) * tl.where(p > 0.0, terms, 0.0)
    tl.store(logits + columns, (gradient * inverse_temperature).to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _merge(stats, logp, entropy, log_normalizer, num_tokens, num_ranks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    highest = tl.full([BLOCK], _LOWEST, dtype=tl.float32)
    g = tl.full([BLOCK], -float("inf"), dtype=tl.float32)
    for rank in range(num_ranks):
        of_rank = stats + (rank * num_tokens + token) * 4
        highest = tl.maximum(highest, tl.load(of_rank, mask=inside, other=0.0))
        g = tl.maximum(g, tl.load(of_rank + 3, mask=inside, other=0.0))
    s = tl.zeros([BLOCK], dtype=tl.float32)
    q = tl.zeros([BLOCK], dtype=tl.float32)
    for rank in range(num_ranks):
        of_rank = stats + (rank * num_tokens + token) * 4
        moved = tl.load(of_rank, mask=inside, other=0.0) - highest
        s_of_rank = tl.load(of_rank + 1, mask=inside, other=1.0)
        scale = tl.exp(moved)
        s += scale * s_of_rank
        q += scale * (tl.load(of_rank + 2, mask=inside, other=0.0) + moved * s_of_rank)
    log_s = tl.log(s)
    tl.store(log_normalizer + token, highest + log_s, mask=inside)
    tl.store(logp + token, tl.where(g == -float("inf"), float("nan"), g - (highest + log_s)), mask=inside)
    tl.store(entropy + token, log_s - q / s, mask=inside)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    logits,
    targets,
    maximum,
    logp,
    log_normalizer,
    grad_logp,
    factor,
    stride,
    maximum_stride,
    num_tokens,
    num_columns,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    d = tl.load(log_normalizer + token, mask=inside, other=0.0)
    d = tl.minimum(d - tl.load(maximum + token * maximum_stride, mask=inside, other=0.0), _LARGEST_SHIFT)
    c = tl.load(grad_logp + token, mask=inside, other=0.0)
    tl.store(factor + token, -inverse_temperature * c * tl.exp(-d), mask=inside)
    x = tl.load(logp + token, mask=inside, other=0.0)
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    not_p = tl.where(x > -0.05, series, tl.exp(x) - 1)  # expm1: p − 1 without the cancellation
    target = tl.load(targets + token, mask=inside, other=-1)
    owned = inside & (target >= 0) & (target < num_columns)
    entry = logits + token.to(tl.int64) * stride + target
    tl.store(entry, (not_p * tl.exp(d)).to(logits.dtype.element_ty), mask=owned)


@triton.jit
def _scale_rows(matrix, factor, out, num_columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(matrix + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32) * tl.load(factor + row)
    tl.store(out + row * num_columns + columns, x.to(out.dtype.element_ty), mask=inside)


_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)
]
# Tuning chooses by time, and the block decides the order of the sum: a deterministic run has one for all.
_DETERMINISTIC = {"BLOCK": 4096, "num_warps": 8}
_tuned_statistics = triton.autotune(_CONFIGS, key=["num_columns"])(_statistics)
# In place: tuning must put the logits back between its trials, and holds a copy of them.
_tuned_exponentials = triton.autotune(_CONFIGS, key=["num_columns"], restore_value=["logits"])(_statistics)
_tuned_gradient = triton.autotune(_CONFIGS, key=["num_columns", "EXPONENTIATED"], restore_value=["logits"])(_gradient)


def project(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    temperature: float,
    logits_CV: Tensor,
    *,
    exponentiate: bool,
) -> Tensor:
    """hidden·Wᵀ into `logits_CV`, and its statistics, as `torch_kernels.project`."""
    torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
    return statistics_(logits_CV, targets_C, temperature, exponentiate=exponentiate)


def statistics_(logits_CV: Tensor, targets_C: Tensor, temperature: float, *, exponentiate: bool) -> Tensor:
    """(m, s, q, g) of z = logits / temperature, float32 [C, 4], with an m that no z exceeds by more than `HEADROOM`;
    `logits_CV` become exp(z − m) if `exponentiate`, else they stay.
    """
    num_tokens, num_columns = logits_CV.shape
    stats_C4 = torch.empty(num_tokens, 4, dtype=torch.float32, device=logits_CV.device)
    if num_columns == 0 or num_tokens == 0:
        shard = (torch.finfo(torch.float32).min, 0.0, 0.0, -torch.inf)
        return stats_C4.copy_(torch.tensor(shard, device=logits_CV.device))
    arguments = (logits_CV, targets_C.contiguous(), stats_C4, logits_CV.stride(0), num_columns, 1.0 / temperature)
    if not logits_CV.is_cuda:
        _statistics[(num_tokens,)](*arguments, EXPONENTIATE=exponentiate, BLOCK=_INTERPRETER_BLOCK)
    elif torch.are_deterministic_algorithms_enabled():
        _statistics[(num_tokens,)](*arguments, EXPONENTIATE=exponentiate, **_DETERMINISTIC)
    else:
        tuned = _tuned_exponentials if exponentiate else _tuned_statistics
        tuned[(num_tokens,)](*arguments, EXPONENTIATE=exponentiate)
    return stats_C4


def merge(gathered_RC4: Tensor, logp_C: Tensor, entropy_C: Tensor, log_normalizer_C: Tensor) -> None:
    """As `torch_kernels.merge`."""
    num_ranks, num_tokens, _ = gathered_RC4.shape
    grid = (triton.cdiv(num_tokens, _TOKEN_BLOCK),)
    _merge[grid](gathered_RC4, logp_C, entropy_C, log_normalizer_C, num_tokens, num_ranks, BLOCK=_TOKEN_BLOCK)


def scale_rows(matrix_CH: Tensor, factor_C: Tensor, out_CH: Tensor) -> Tensor:
    """As `torch_kernels.scale_rows`; all contiguous."""
    num_rows, num_columns = matrix_CH.shape
    grid = (num_rows, triton.cdiv(num_columns, _HIDDEN_BLOCK))
    _scale_rows[grid](matrix_CH, factor_C, out_CH, num_columns, BLOCK=_HIDDEN_BLOCK)
    return out_CH


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
    """The chunk into G up to a factor a row, in place, as `torch_kernels.gradient_`."""
    num_tokens, num_columns = logits_CV.shape
    if maximum_C is not None and grad_entropy_C is None:
        # Exponentials are the operand but for one entry a token.
        factor_C = torch.empty_like(log_normalizer_C)
        _finish[(triton.cdiv(num_tokens, _TOKEN_BLOCK),)](
            logits_CV,
            targets_C.contiguous(),
            maximum_C,
            logp_C.contiguous(),
            log_normalizer_C.contiguous(),
            grad_logp_C.float().contiguous(),
            factor_C,
            logits_CV.stride(0),
            maximum_C.stride(0),
            num_tokens,
            num_columns,
            1.0 / temperature,
            BLOCK=_TOKEN_BLOCK,
        )
        return factor_C
    ones_C = torch.ones_like(log_normalizer_C)
    if num_columns == 0 or num_tokens == 0:
        return ones_C
    exponentiated, has_entropy = maximum_C is not None, grad_entropy_C is not None
    arguments = (
        logits_CV,
        targets_C.contiguous(),
        (log_normalizer_C if maximum_C is None else log_normalizer_C - maximum_C).contiguous(),
        entropy_C.contiguous(),
        grad_logp_C.float().contiguous(),
        (grad_logp_C if grad_entropy_C is None else grad_entropy_C).float().contiguous(),
        logits_CV.stride(0),
        num_columns,
        1.0 / temperature,
    )
    if logits_CV.is_cuda:
        _tuned_gradient[lambda meta: (num_tokens, triton.cdiv(num_columns, meta["BLOCK"]))](
            *arguments, EXPONENTIATED=exponentiated, HAS_ENTROPY=has_entropy
        )
    else:
        grid = (num_tokens, triton.cdiv(num_columns, _INTERPRETER_BLOCK))
        _gradient[grid](*arguments, EXPONENTIATED=exponentiated, HAS_ENTROPY=has_entropy, BLOCK=_INTERPRETER_BLOCK)
    return ones_C
