"""Output projection, log-prob, entropy, policy loss and both gradients as one operation over vocabulary shards.

For a chunk of C tokens, with z = h·Wᵀ/τ on this rank's columns and p the soft-max over all of them,

    logπ = z_y − log Z       ∂L/∂z_v = c·(1[v = y] − p_v) − e·p_v·(log p_v + H)       c = ∂L/∂logπ, e = ∂L/∂H

and ∂h = ∂L/∂z·W/τ, ∂W = (∂L/∂z)ᵀ·h/τ. The logits of one chunk live in one buffer that becomes their gradient and is
then used again: nothing of size [tokens, vocabulary] exists. The only communication of a chunk is an all-gather of four
floats a token (see `logprob`), while the next chunk's logits are multiplied.

* `fused_policy_loss`: a token-level loss knows c from logπ alone, so a chunk is finished at once: three products. Kept
  for the backward pass: ∂h, N·H elements of the hidden states' dtype, and nothing else; the weight's gradient is where
  it ends.
* `fused_logprobs`: c comes from outside, later, and the logits are multiplied again: four products. Kept: the hidden
  states, N·H elements, and 20 bytes a token (32 in float64).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drpo_megatron.algorithms import SEQUENCE_LEVEL_LOSSES, LossFunction, LossInputs, loss_and_coefficient
from drpo_megatron.vocab_parallel.chunks import DEFAULT_MEMORY_BUDGET, Shard, WeightGradient
from drpo_megatron.vocab_parallel.head import select_tokens, trained_tokens
from drpo_megatron.vocab_parallel.projection import ChunkedGradients, ChunkedProjection
from drpo_megatron.vocab_parallel.tail import TailReport


@dataclass(frozen=True)
class FusedLoss:
    """loss: scalar, differentiable. logp_N, entropy_N: of the masked-in tokens in nats, detached. tail: what the
    sparse backward left out.
    """

    loss: Tensor
    logp_N: Tensor
    entropy_N: Tensor
    tail: TailReport


def fused_policy_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    loss_function: LossFunction,
    logmu_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    mask_T: Tensor,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    entropy_coefficient: float = 0.0,
    sequence_parallel: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    tail_tolerance: float = 0.0,
) -> FusedLoss:
    """Σ w·L(logπ) − entropy_coefficient·Σ w·H over the masked-in tokens, for a token-level loss L.

    hidden_TH, weight_VH, targets_T, mask_T, group, vocab_size, temperature, sequence_parallel: as `project_logprobs`;
    float32, bfloat16 or float64. logmu_T, advantages_T: see `LossInputs`. weights_T: w, the aggregation's, [T].
    memory_budget: bytes for the logits in flight. tail_tolerance: largest relative error bound of a chunk's gradients
    (see `tail`); 0 is exact.

    Both gradients are computed here, so the backward pass only scales and hands them over. Where the weight has a
    `main_grad` (Megatron DDP) its gradient is added there at once, and the upstream gradient must then be 1. Without
    grad mode only the loss is computed.

    Raises ValueError for a sequence-level loss, shapes or shards that do not match, and a target outside the
    vocabulary; FloatingPointError, naming rank and token, when a hidden state is not finite.
    """
    function = loss_function.func if isinstance(loss_function, functools.partial) else loss_function
    if getattr(function, "__name__", "") in SEQUENCE_LEVEL_LOSSES:
        raise ValueError("a sequence-level loss needs all log-probs of a sequence at once: use fused_logprobs")
    if tail_tolerance < 0:
        raise ValueError(f"tail_tolerance is a relative error and cannot be negative, got {tail_tolerance}")
    shard = Shard.of(weight_VH, group, vocab_size, temperature)
    trained_N = trained_tokens(targets_T, mask_T)
    hidden_NH = select_tokens(hidden_TH, targets_T, trained_N, group, sequence_parallel)
    grad_mode = torch.is_grad_enabled()
    with torch.no_grad():
        work = ChunkedProjection(hidden_NH.detach(), weight_VH.detach(), targets_T[trained_N], shard, memory_budget)
        backward = ChunkedGradients(
            work,
            grad_hidden=grad_mode and hidden_NH.requires_grad,
            grad_weight=grad_mode and weight_VH.requires_grad,
            main_grad_VH=getattr(weight_VH, "main_grad", None),
            tail_tolerance=tail_tolerance,
        )
        logmu_N, advantages_N, weights_N = (t[trained_N] for t in (logmu_T, advantages_T, weights_T))
        everywhere_N, one_sequence_N = torch.ones_like(trained_N, dtype=torch.bool), torch.zeros_like(trained_N)
        loss = torch.zeros((), dtype=work.dtype, device=hidden_NH.device)
        for chunk in work.with_statistics(exponentiate=backward.needed):
            rows = chunk.rows
            inputs = LossInputs(
                logp_T=work.logp_N[rows],
                logmu_T=logmu_N[rows],
                advantages_T=advantages_N[rows],
                mask_T=everywhere_N[rows],
                sequence_ids_T=one_sequence_N[rows],
                num_sequences=1,
            )
            loss_C, coefficient_C = loss_and_coefficient(loss_function, inputs)
            weights_C = weights_N[rows]
            loss += (weights_C * loss_C.detach()).sum()
            grad_entropy_C = None
            if entropy_coefficient:
                loss -= entropy_coefficient * (weights_C * work.entropy_N[rows]).sum()
                grad_entropy_C = (-entropy_coefficient * weights_C).to(work.dtype)
            if backward.needed:
                grad_logp_C = (weights_C * coefficient_C).to(work.dtype)
                backward.chunk_(chunk, grad_logp_C, grad_entropy_C, exponentiated=True)
        work.check(trained_N)
    if backward.needed:
        loss = _HandOver.apply(hidden_NH, weight_VH, loss, backward)
    return FusedLoss(loss, work.logp_N, work.entropy_N, backward.tail)


def fused_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    mask_T: Tensor,
    group: ProcessGroup | None,
    vocab_size: int,
    temperature: float = 1.0,
    sequence_parallel: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
    """`(logp_N, entropy_N)` as `project_logprobs`, both differentiable, with the logits computed again in the backward.

    The weight's gradient goes to its `main_grad` where there is one. Raises as `fused_policy_loss`.
    """
    shard = Shard.of(weight_VH, group, vocab_size, temperature)
    trained_N = trained_tokens(targets_T, mask_T)
    hidden_NH = select_tokens(hidden_TH, targets_T, trained_N, group, sequence_parallel)
    main_grad_VH = getattr(weight_VH, "main_grad", None)
    logp_N, entropy_N = _Recomputed.apply(
        hidden_NH, weight_VH, targets_T[trained_N], trained_N, shard, memory_budget, main_grad_VH
    )
    return logp_N, entropy_N


def _returned_weight_gradient(weight_VH: Tensor, gradient: WeightGradient) -> Tensor | None:
    """What autograd gets for the weight. With `main_grad` a placeholder, which runs the hooks that Megatron's DDP
    waits for and which those do not add (megatron.core.tensor_parallel.layers does the same).
    """
    if not gradient.in_main_grad:
        return gradient.total_VH.to(weight_VH.dtype)
    weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron-Core marks parameters so
    if getattr(weight_VH, "zero_out_wgrad", False):
        # Tied to the embedding on this rank, whose gradient runs the hooks and is added by them.
        return None
    return torch.empty_like(weight_VH)


class _HandOver(torch.autograd.Function):
    """Gives autograd the gradients that exist already."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, loss: Tensor, backward: ChunkedGradients) -> Tensor:
        ctx.weight, ctx.gradients = weight_VH, (backward.grad_hidden_NH, backward.weight)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss hands its gradients over once: compute the loss again")
        (grad_hidden_NH, weight), ctx.gradients = ctx.gradients, None
        (upstream,) = grads
        if weight is not None and weight.in_main_grad and float(upstream) != 1.0:
            raise RuntimeError(
                f"the gradient of the fused loss is {float(upstream)} and not 1, but the weight's gradient is in "
                "main_grad already: scale weights_T and entropy_coefficient instead of the loss"
            )
        if grad_hidden_NH is not None:
            grad_hidden_NH.mul_(upstream)
        grad_weight_VH = None
        if weight is not None:
            if not weight.in_main_grad:
                weight.total_VH.mul_(upstream)
            grad_weight_VH = _returned_weight_gradient(ctx.weight, weight)
        return grad_hidden_NH, grad_weight_VH, None, None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        trained_N: Tensor,
        shard: Shard,
        memory_budget: int,
        main_grad_VH: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        work = ChunkedProjection(hidden_NH, weight_VH, targets_N, shard, memory_budget)
        for _ in work.with_statistics(exponentiate=False):
            pass
        work.check(trained_N)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, work.logp_N, work.entropy_N, work.log_normalizer_N)
        ctx.weight, ctx.shard, ctx.memory_budget, ctx.main_grad_VH = weight_VH, shard, memory_budget, main_grad_VH
        return work.logp_N, work.entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_N, grad_entropy_N = grads
        hidden_NH, weight_VH, targets_N, logp_N, entropy_N, log_normalizer_N = ctx.saved_tensors
        work = ChunkedProjection(hidden_NH, weight_VH, targets_N, ctx.shard, ctx.memory_budget)
        work.logp_N, work.entropy_N, work.log_normalizer_N = logp_N, entropy_N, log_normalizer_N
        backward = ChunkedGradients(
            work,
            grad_hidden=ctx.needs_input_grad[0],
            grad_weight=ctx.needs_input_grad[1],
            main_grad_VH=ctx.main_grad_VH,
        )
        if grad_logp_N is None:
            grad_logp_N = torch.zeros_like(logp_N)
        for chunk in work.again():
            grad_entropy_C = None if grad_entropy_N is None else grad_entropy_N[chunk.rows]
            backward.chunk_(chunk, grad_logp_N[chunk.rows], grad_entropy_C, exponentiated=False)
        grad_weight_VH = None
        if backward.weight is not None:
            grad_weight_VH = _returned_weight_gradient(ctx.weight, backward.weight)
        return backward.grad_hidden_NH, grad_weight_VH, None, None, None, None, None
