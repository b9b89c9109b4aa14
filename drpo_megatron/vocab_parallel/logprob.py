"""Log-probability of the target and entropy from logits whose vocabulary is sharded over tensor-parallel ranks.

Each rank reduces its columns to four numbers a token: m = max z, s = Σ exp(z − m), q = Σ exp(z − m)·(z − m) and g =
z[target] if it owns the target. Merging (m, s, q, g) over ranks is associative (online soft-max), so one all-gather of
[T, 4] is the only communication of the forward pass, and the backward pass needs none: every rank then knows the
normalizer, and

    ∂logπ/∂z_v = 1[v = target] − p_v          ∂H/∂z_v = −p_v·(log p_v + H)

hold for its own columns. The logits are the only [T, V] tensor kept for the backward pass; soft-max values are
recomputed a block of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drpo_megatron.vocab_parallel.chunks import check_shard

BLOCK_ELEMENTS = 2**23
"""Logits processed at a time: the float32 scratch is a few times 32 MiB, whatever T and V are."""


def vocab_parallel_logprob_entropy(
    logits_TV: Tensor,
    targets_T: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log π(target) and the entropy of π = softmax(logits / temperature), both [T] in nats, the same on every rank.

    logits_TV: this rank's columns, V = padded vocabulary / ranks, rank r holding columns [r·V, (r + 1)·V); any
    floating dtype. targets_T: int64 in [0, vocab_size), the same on every rank; a target outside gives NaN. group: the
    ranks that share the vocabulary, None when it is whole. vocab_size: the true size; columns from there on are
    padding and get neither probability nor gradient. Results and arithmetic are float32 (float64 for float64 logits);
    both results are differentiable, and the entropy costs nothing in the backward pass when it is not used. The
    gradient has the logits' dtype.

    Raises ValueError when the shards are too small for `vocab_size` or the temperature is not positive.
    """
    ranks = 1 if group is None else group.size()
    check_shard(logits_TV.shape[-1], ranks, vocab_size, temperature)
    logp_T, entropy_T = _LogprobEntropy.apply(logits_TV, targets_T, group, vocab_size, temperature)
    return logp_T, entropy_T


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, group: ProcessGroup | None, vocab_size: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        num_columns = logits_TV.shape[1]
        first = rank * num_columns
        valid = min(max(vocab_size - first, 0), num_columns)

        stats_T4 = _local_statistics(logits_TV, targets_T - first, valid, temperature)
        if ranks > 1:
            stats_RT4 = stats_T4.new_empty(ranks, *stats_T4.shape)
            torch.distributed.all_gather_single(stats_RT4.flatten(0, 1), stats_T4, group=group)
        else:
            stats_RT4 = stats_T4.unsqueeze(0)
        logp_T, entropy_T, log_normalizer_T = merge_statistics(stats_RT4)

        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_TV, targets_T, log_normalizer_T, entropy_T)
        ctx.first, ctx.valid, ctx.temperature = first, valid, temperature
        return logp_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        grad_logp_T, grad_entropy_T = grads
        logits_TV, targets_T, log_normalizer_T, entropy_T = ctx.saved_tensors
        grad_TV = torch.zeros_like(logits_TV)  # padding columns stay zero
        owned_T, column_T = owned_targets(targets_T - ctx.first, ctx.valid)
        for rows in _blocks(logits_TV) if ctx.valid else ():
            log_p_bV = _scaled(logits_TV[rows, : ctx.valid], ctx.temperature).sub_(log_normalizer_T[rows, None])
            p_bV = log_p_bV.exp()
            grad_bV = torch.zeros_like(p_bV)
            if grad_logp_T is not None:
                grad_bV.addcmul_(p_bV, grad_logp_T[rows, None], value=-1)
                target_b1 = (grad_logp_T[rows] * owned_T[rows]).unsqueeze(1)
                grad_bV.scatter_add_(1, column_T[rows, None], target_b1)
            if grad_entropy_T is not None:
                grad_bV.addcmul_(p_bV, log_p_bV.add_(entropy_T[rows, None]).mul_(grad_entropy_T[rows, None]), value=-1)
            grad_TV[rows, : ctx.valid] = grad_bV.div_(ctx.temperature)
        return grad_TV, None, None, None, None


def _local_statistics(logits_TV: Tensor, local_targets_T: Tensor, valid: int, temperature: float) -> Tensor:
    """(m, s, q, g) of this rank's first `valid` columns, [T, 4]. g is −inf where another rank owns the target."""
    dtype = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    stats_T4 = torch.empty(logits_TV.shape[0], 4, dtype=dtype, device=logits_TV.device)
    m_T, s_T, q_T, g_T = stats_T4.unbind(1)
    if valid == 0:
        # A shard of padding only. Its maximum is the lowest finite number, not −inf: the merge multiplies it by s = 0.
        m_T.fill_(torch.finfo(dtype).min)
        s_T.zero_()
        q_T.zero_()
        g_T.fill_(-torch.inf)
        return stats_T4
    owned_T, column_T = owned_targets(local_targets_T, valid)
    for rows in _blocks(logits_TV):
        z_bV = _scaled(logits_TV[rows, :valid], temperature)
        z_b = z_bV.gather(1, column_T[rows, None]).squeeze(1)
        g_T[rows] = torch.where(owned_T[rows], z_b, -torch.inf)
        m_T[rows] = z_bV.amax(1)
        z_bV.sub_(m_T[rows, None])
        e_bV = z_bV.exp()
        s_T[rows] = e_bV.sum(1)
        q_T[rows] = torch.linalg.vecdot(e_bV, z_bV)
    return stats_T4


def merge_statistics(stats_RT4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of all ranks to (logπ, entropy, log normalizer), each [T]."""
    m_RT, s_RT, q_RT, g_RT = stats_RT4.unbind(2)
    m_T = m_RT.amax(0)
    shift_RT = m_RT - m_T
    scale_RT = shift_RT.exp()
    log_s_T = (scale_RT * s_RT).sum(0).log()
    q_T = (scale_RT * (q_RT + shift_RT * s_RT)).sum(0)  # Σ exp(z − M)·(z − M)
    log_normalizer_T = m_T + log_s_T
    g_T = g_RT.amax(0)
    logp_T = torch.where(g_T == -torch.inf, torch.nan, g_T - log_normalizer_T)
    return logp_T, log_s_T - q_T / log_s_T.exp(), log_normalizer_T


def owned_targets(local_targets_T: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Whether this shard holds the target, and a column that is safe to index in either case."""
    owned_T = (local_targets_T >= 0) & (local_targets_T < valid)
    return owned_T, torch.where(owned_T, local_targets_T, 0)


def _scaled(logits_bV: Tensor, temperature: float) -> Tensor:
    """logits / temperature as a new tensor of at least float32, which the caller may overwrite."""
    dtype = torch.float64 if logits_bV.dtype == torch.float64 else torch.float32
    return logits_bV.to(dtype, copy=True).div_(temperature)


def _blocks(logits_TV: Tensor) -> Iterator[slice]:
    num_tokens, num_columns = logits_TV.shape
    step = max(1, BLOCK_ELEMENTS // num_columns)
    return (slice(start, start + step) for start in range(0, num_tokens, step))
