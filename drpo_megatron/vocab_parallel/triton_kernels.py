"""The two passes over a chunk's logits as Triton kernels, with the interface of `torch_kernels`.

Statistics read the logits once, one program a token, with an online soft-max; gradients read and write them once, when
the normalizer over all ranks is known. Logits are float32 or bfloat16, all arithmetic is float32. Both kernels are
correct under Triton's interpreter; they have not been run on a GPU. They are tuned there, and only there, at the first
call for a number of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETER_BLOCK = 256


@triton.jit
def _statistics(logits, targets, stats, stride, num_columns, inverse_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    m = -float("inf")
    s = 0.0
    q = 0.0  # Σ exp(z − m)·(z − m)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32) * inverse_temperature
        new_m = tl.maximum(m, tl.max(z, axis=0))
        shifted = tl.where(inside, z - new_m, 0.0)
        e = tl.where(inside, tl.exp(shifted), 0.0)
        # Nothing has been summed before the first block: its shift would be −inf, and −inf · 0 is not a number.
        moved = tl.where(start == 0, 0.0, m - new_m)
        scale = tl.exp(moved)
        q = scale * (q + moved * s) + tl.sum(e * shifted, axis=0)
        s = scale * s + tl.sum(e, axis=0)
        m = new_m
    target = tl.load(targets + row)
    owned = (target >= 0) & (target < num_columns)
    g = tl.load(logits + tl.where(owned, target, 0)).to(tl.float32) * inverse_temperature
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
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    logits += row * stride
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


_CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block in (1024, 2048, 4096) for warps in (4, 8)]
# Tuning chooses by time, and the block decides the order of the sum: a deterministic run has one for all.
_DETERMINISTIC = {"BLOCK": 2048, "num_warps": 8}
# In place: tuning must put the logits back between its trials.
_tuned_statistics = triton.autotune(_CONFIGS, key=["num_columns"])(_statistics)
_tuned_gradient = triton.autotune(_CONFIGS, key=["num_columns"], restore_value=["logits"])(_gradient)


def project(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    targets_C: Tensor,
    temperature: float,
    logits_CV: Tensor,
    *,
    exponentiate: bool,
) -> Tensor:
    """hidden·Wᵀ into `logits_CV`, and its statistics, as `torch_kernels.project`. The logits stay as they are either
    way: `exponentiate` saves a pass over memory only where the gradient does not need one of its own.
    """
    torch.mm(hidden_CH, weight_VH.t(), out=logits_CV)
    return statistics(logits_CV, targets_C, temperature)


def statistics(logits_CV: Tensor, targets_C: Tensor, temperature: float) -> Tensor:
    """(m, s, q, g) of z = logits / temperature, float32 [C, 4]. m is the maximum."""
    num_tokens, num_columns = logits_CV.shape
    stats_C4 = torch.empty(num_tokens, 4, dtype=torch.float32, device=logits_CV.device)
    if num_columns == 0:
        shard = (torch.finfo(torch.float32).min, 0.0, 0.0, -torch.inf)
        return stats_C4.copy_(torch.tensor(shard, device=logits_CV.device))
    arguments = (logits_CV, targets_C.contiguous(), stats_C4, logits_CV.stride(0), num_columns, 1.0 / temperature)
    if logits_CV.is_cuda and torch.are_deterministic_algorithms_enabled():
        _statistics[(num_tokens,)](*arguments, **_DETERMINISTIC)
    elif logits_CV.is_cuda:
        _tuned_statistics[(num_tokens,)](*arguments)
    else:
        _statistics[(num_tokens,)](*arguments, BLOCK=_INTERPRETER_BLOCK)
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
    """Turn logits into their gradient in place, as `torch_kernels.gradient_`; the row factor is 1."""
    num_tokens, num_columns = logits_CV.shape
    ones_C = torch.ones_like(log_normalizer_C)
    if num_columns == 0 or num_tokens == 0:
        return ones_C
    arguments = (
        logits_CV,
        targets_C.contiguous(),
        log_normalizer_C.contiguous(),
        entropy_C.contiguous(),
        grad_logp_C.float().contiguous(),
        (grad_logp_C if grad_entropy_C is None else grad_entropy_C).float().contiguous(),
        logits_CV.stride(0),
        num_columns,
        1.0 / temperature,
    )
    has_entropy = grad_entropy_C is not None
    if logits_CV.is_cuda:
        _tuned_gradient[lambda meta: (num_tokens, triton.cdiv(num_columns, meta["BLOCK"]))](
            *arguments, HAS_ENTROPY=has_entropy
        )
    else:
        grid = (num_tokens, triton.cdiv(num_columns, _INTERPRETER_BLOCK))
        _gradient[grid](*arguments, HAS_ENTROPY=has_entropy, BLOCK=_INTERPRETER_BLOCK)
    return ones_C
