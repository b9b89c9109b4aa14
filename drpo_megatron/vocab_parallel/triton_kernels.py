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

_INTERPRETER_BLOCK = 256
_LOWEST = tl.constexpr(-3.0e38)
_HEADROOM = tl.constexpr(torch_kernels.HEADROOM)


@triton.jit
def _statistics(
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
    s = 0.0
    q = 0.0  # Σ exp(z − m)·(z − m)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        highest = tl.max(z, axis=0)
        if highest > m + _HEADROOM:
            # Rare: what is summed and stored so far is taken relative to a higher m.
            moved = m - highest
            scale = tl.exp(moved)
            q = scale * (q + tl.where(s > 0.0, moved * s, 0.0))
            s = scale * s
            m = highest
            if EXPONENTIATE:
                tl.debug_barrier()
                for before in range(0, start, BLOCK):
                    done = before + tl.arange(0, BLOCK)
                    e = tl.load(logits + done).to(tl.float32) * scale
                    tl.store(logits + done, e.to(logits.dtype.element_ty))
        shifted = z - m
        e = tl.exp(shifted)
        s += tl.sum(e, axis=0)
        q += tl.sum(tl.where(e > 0.0, e * shifted, 0.0), axis=0)  # e·log e → 0 as e → 0
        if EXPONENTIATE:
            tl.store(logits + columns, e.to(logits.dtype.element_ty), mask=inside)
    tl.store(stats + row * 4, m)
    tl.store(stats + row * 4 + 1, s)
    tl.store(stats + row * 4 + 2, q)
    tl.store(stats + row * 4 + 3, tl.where(owned, g, -float("inf")))


@triton.jit
def _gradient(
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


_CONFIGS = [
    triton.Config({"BLOCK": block}, num_warps=warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16)
]
# Tuning chooses by time, and the block decides the order of the sum: a deterministic run has one for all.
_DETERMINISTIC = {"BLOCK": 4096, "num_warps": 8}
# In place: tuning must put the logits back between its trials.
_tuned_statistics = triton.autotune(_CONFIGS, key=["num_columns", "EXPONENTIATE"], restore_value=["logits"])(
    _statistics
)
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
        _tuned_statistics[(num_tokens,)](*arguments, EXPONENTIATE=exponentiate)
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
    """The chunk into G up to a factor a row, in place, as `torch_kernels.gradient_`."""
    num_tokens, num_columns = logits_CV.shape
    if maximum_C is not None and grad_entropy_C is None:
        # Exponentials are the operand but for one entry a token.
        return torch_kernels.gradient_(
            logits_CV,
            targets_C,
            maximum_C=maximum_C,
            logp_C=logp_C,
            log_normalizer_C=log_normalizer_C,
            entropy_C=entropy_C,
            grad_logp_C=grad_logp_C,
            grad_entropy_C=None,
            temperature=temperature,
        )
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
