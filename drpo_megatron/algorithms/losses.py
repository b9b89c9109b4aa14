"""Policy losses: one plain function a loss, all with the same signature, and the registry `LOSSES` that names them.

Notation (T tokens; every tensor is [T]): μ = exp(logmu_T) is the rollout engine's probability of the sampled token and
π = exp(logp_T) the policy's, both at the sampling temperature; r = exp(clamp(logπ − logμ, ±20)) is differentiable and
not truncated further; A is the advantage; D = |π − μ| the binary total variation. An update *diverges* when
A·(r − 1) > 0: it moves π further from μ. A loss returns L_T, to be minimised, zero where `mask_T` is false. How token
losses become one number is decided in `aggregation.py`.

Sources: DRPO arXiv 2606.09821, DPPO 2602.04879, SPO 2401.16025, GRPO 2402.03300 with DAPO's clip-higher 2503.14476,
GSPO 2507.18071, CISPO 2506.13585.

To add a loss, write one function here under `@loss`: its name is the name in the configuration, its keyword-only
parameters (positive numbers) are the settings, and metrics and gradients need nothing else. A function elsewhere is
named as `module:function` (docs/extending.md); it is a token-level loss.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drpo_megatron.config.functions import import_function

MAX_LOG_RATIO = 20.0
"""Nats. exp(20) ≈ 5e8 stays finite when squared in float32; beyond it the ratio, and so its gradient, is constant."""

_CERTAIN = math.log1p(-1e-6)
"""Binary KL divides by 1 − π: probabilities above 1 − 1e-6 count as 1 − 1e-6, where float32 still resolves 1 − π."""


@dataclass(frozen=True)
class LossInputs:
    """What a loss may look at. All tensors are [T] on one device.

    logp_T: log π of the sampled tokens in nats, differentiable, float32 (float64 is kept, lower precision is widened).
    logmu_T: log μ in nats. advantages_T: constants. mask_T (bool): tokens to train on. sequence_ids_T (int64): the
    sequence in [0, num_sequences) that a masked-in token belongs to.
    """

    logp_T: Tensor
    logmu_T: Tensor
    advantages_T: Tensor
    mask_T: Tensor
    sequence_ids_T: Tensor
    num_sequences: int


@dataclass(frozen=True)
class LossOutputs:
    """One evaluated loss. All tensors are [T].

    loss_T: L, differentiable, zero where the mask is false.
    coefficient_T: c = ∂(Σ L)/∂logπ, detached.
    weight_T: w = −c / (A·r), what the loss makes of the policy gradient A·r·∇logπ (2606.09821 Eq. 9), detached. It is
        1 where A = 0 or the mask is false: such a token has no gradient to weigh, and diagnostics leave it out of the
        quantiles. Beyond the ratio's clamp c is 0, and so is w.
    """

    loss_T: Tensor
    coefficient_T: Tensor
    weight_T: Tensor


LossFunction = Callable[[LossInputs], Tensor]
"""A loss whose parameters are bound: `LossInputs -> L_T`."""

LOSSES: dict[str, Callable[..., Tensor]] = {}
"""Name → loss, as written below, parameters unbound."""

SEQUENCE_LEVEL_LOSSES = frozenset({"gspo"})
"""Losses that need all tokens of a sequence in one `LossInputs`."""


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register `function` in `LOSSES` under its own name."""
    LOSSES[function.__name__] = function
    return function


@dataclass(frozen=True)
class _Terms:
    """The quantities the losses are written in; masked-out tokens have A = 0, π = μ = 1, so every loss is 0 there."""

    A_T: Tensor
    r_T: Tensor
    logp_T: Tensor
    logmu_T: Tensor
    mu_T: Tensor

    @property
    def diverging_T(self) -> Tensor:
        return self.A_T * (self.r_T.detach() - 1) > 0

    @property
    def total_variation_T(self) -> Tensor:
        return (self.logp_T.exp() - self.mu_T).abs()


def _terms(x: LossInputs) -> _Terms:
    logp_T, logmu_T, A_T = (_masked(t, x.mask_T) for t in (x.logp_T, x.logmu_T, x.advantages_T))
    r_T = (logp_T - logmu_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return _Terms(A_T=A_T, r_T=r_T, logp_T=logp_T, logmu_T=logmu_T, mu_T=logmu_T.exp())


def _masked(t_T: Tensor, mask_T: Tensor) -> Tensor:
    # `where`, not a product: an inf or nan at a masked-out position must not reach the loss or its gradient.
    return torch.where(mask_T, t_T if t_T.dtype == torch.float64 else t_T.float(), 0.0)


def _binary_kl(x: _Terms) -> Tensor:
    """KL(Bernoulli(μ) ‖ Bernoulli(π)) in nats (2602.04879 Eq. 14), whose derivative by logπ is (π − μ)/(1 − π)."""
    logp_T, logmu_T = x.logp_T.clamp(max=_CERTAIN), x.logmu_T.clamp(max=_CERTAIN)
    log_not_p_T, log_not_mu_T = torch.log(-torch.expm1(logp_T)), torch.log(-torch.expm1(logmu_T))
    return logmu_T.exp() * (logmu_T - logp_T) - torch.expm1(logmu_T) * (log_not_mu_T - log_not_p_T)


@loss
def pg(x: LossInputs) -> Tensor:
    """Unregularized off-policy surrogate: −A·r."""
    t = _terms(x)
    return -t.A_T * t.r_T


@loss
def drpo(x: LossInputs, *, delta: float) -> Tensor:
    """DRPO, 2606.09821 Eq. 8: −A·r + |A|·μ·(r − 1)²/(2δ).

    Gradient −A·r·w·∇logπ with w = 1 − sign(A(r − 1))·|π − μ|/δ in [1 − 1/δ, 1 + 1/δ] (Table 1, Eq. 9); stationary at
    π = μ + sign(A)·δ. delta is a probability: with δ ≥ 1 that boundary cannot be reached, so it has no default.
    """
    t = _terms(x)
    return -t.A_T * t.r_T + t.A_T.abs() * t.mu_T * (t.r_T - 1) ** 2 / (2 * delta)


@loss
def mask_drpo(x: LossInputs, *, delta: float) -> Tensor:
    """Ablation of DRPO (2606.09821): its regularizer only on diverging updates with D > δ, elsewhere −A·r."""
    t = _terms(x)
    beyond_T = t.diverging_T & (t.total_variation_T > delta)
    return -t.A_T * t.r_T + beyond_T * t.A_T.abs() * t.mu_T * (t.r_T - 1) ** 2 / (2 * delta)


@loss
def drpo_kl(x: LossInputs, *, delta: float) -> Tensor:
    """Ablation of DRPO (2606.09821 Fig. 5): the binary KL in place of the quadratic, −A·r + |A|·KL(μ ‖ π)/δ.

    w = 1 − (π − μ)·sign(A)/(δ·r·(1 − π)): not bounded as π → 1. The divergence is DPPO's.
    """
    t = _terms(x)
    return -t.A_T * t.r_T + t.A_T.abs() * _binary_kl(t) / delta


@loss
def drpo_tv(x: LossInputs, *, delta: float) -> Tensor:
    """Ablation of DRPO (2606.09821 Fig. 5): the binary total variation in place of the quadratic, −A·r + |A|·|π − μ|/δ.

    w = 1 − sign(A(r − 1))·μ/δ: the brake does not grow with the distance. The subgradient at π = μ is 0.
    """
    t = _terms(x)
    return -t.A_T * t.r_T + t.A_T.abs() * t.total_variation_T / delta


@loss
def spo(x: LossInputs, *, eps: float = 0.2) -> Tensor:
    """SPO, 2401.16025: −A·r + |A|·(r − 1)²/(2ε). DRPO without the factor μ; w = 1 − sign(A(r − 1))·|r − 1|/ε."""
    t = _terms(x)
    return -t.A_T * t.r_T + t.A_T.abs() * (t.r_T - 1) ** 2 / (2 * eps)


@loss
def dppo_tv(x: LossInputs, *, delta: float = 0.15) -> Tensor:
    """DPPO with the binary total variation, 2602.04879 Eq. 11-13: −M·A·r, M = 0 iff diverging and |π − μ| > δ.

    The paper's δ is 0.15 in bf16 and 0.6 in end-to-end FP8.
    """
    t = _terms(x)
    return -t.A_T * t.r_T * ~(t.diverging_T & (t.total_variation_T > delta))


@loss
def dppo_kl(x: LossInputs, *, kl_delta: float = 0.05) -> Tensor:
    """DPPO with the binary KL, 2602.04879 Eq. 14: −M·A·r, M = 0 iff diverging and KL(μ ‖ π) > kl_delta (nats)."""
    t = _terms(x)
    return -t.A_T * t.r_T * ~(t.diverging_T & (_binary_kl(t) > kl_delta))


@loss
def grpo(x: LossInputs, *, eps_low: float = 0.2, eps_high: float = 0.28) -> Tensor:
    """GRPO with DAPO's clip-higher: −min(A·r, A·clip(r, 1 − ε_low, 1 + ε_high)). Drops the KL to a reference."""
    t = _terms(x)
    return -torch.minimum(t.A_T * t.r_T, t.A_T * t.r_T.clamp(1 - eps_low, 1 + eps_high))


@loss
def gspo(x: LossInputs, *, eps_low: float = 3e-4, eps_high: float = 4e-4) -> Tensor:
    """GSPO, 2507.18071: GRPO's clip on the sequence's ratio s = exp(mean over its tokens of logπ − logμ).

    Each token of a sequence carries −min(A·s, A·clip(s, 1 − ε_low, 1 + ε_high)), so `seq_mean_token_mean` gives the
    paper's objective. Every masked-in token of a sequence must be in `x`.
    """
    t = _terms(x)
    ids_T = torch.where(x.mask_T, x.sequence_ids_T, 0)
    zeros_S = t.logp_T.new_zeros(max(x.num_sequences, 1))  # a micro-batch may be padding only
    sums_S = zeros_S.index_add(0, ids_T, t.logp_T - t.logmu_T)
    lengths_S = zeros_S.index_add(0, ids_T, x.mask_T.to(zeros_S.dtype))
    s_S = (sums_S / lengths_S.clamp(min=1)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    s_T = s_S[ids_T]
    return -torch.minimum(t.A_T * s_T, t.A_T * s_T.clamp(1 - eps_low, 1 + eps_high))


@loss
def cispo(x: LossInputs, *, eps_high: float) -> Tensor:
    """CISPO, 2506.13585: −sg(min(r, 1 + ε_high))·A·logπ. The ratio is a detached weight with no lower bound.

    ε_high is tuned in the paper, which states no value for it.
    """
    t = _terms(x)
    return -t.r_T.detach().clamp(max=1 + eps_high) * t.A_T * t.logp_T


def loss_and_coefficient(loss_function: LossFunction, x: LossInputs) -> tuple[Tensor, Tensor]:
    """`loss_T` and `coefficient_T` of `LossOutputs`, by autograd whatever the loss."""
    with torch.enable_grad():
        x = x if x.logp_T.requires_grad else replace(x, logp_T=x.logp_T.detach().requires_grad_())
        loss_T = loss_function(x)
        (coefficient_T,) = torch.autograd.grad(loss_T.sum(), x.logp_T, retain_graph=True)
    return loss_T, coefficient_T


def evaluate(loss_function: LossFunction, x: LossInputs) -> LossOutputs:
    """Evaluate a loss with its coefficients and weights.

    `loss_T` is differentiable with respect to `x.logp_T` when that is; the coefficients are there in either case.
    """
    loss_T, coefficient_T = loss_and_coefficient(loss_function, x)
    with torch.no_grad():
        t = _terms(x)
        gradient_T = t.A_T * t.r_T
        has_signal_T = gradient_T != 0
        weight_T = torch.where(has_signal_T, -coefficient_T / torch.where(has_signal_T, gradient_T, 1.0), 1.0)
    return LossOutputs(loss_T=loss_T, coefficient_T=coefficient_T, weight_T=weight_T)


def loss_parameters(name: str) -> dict[str, float | None]:
    """The parameters of a loss and their defaults; None marks a required one. ValueError if there is no such loss."""
    parameters = list(inspect.signature(_function(name)).parameters.values())[1:]
    return {p.name: None if p.default is inspect.Parameter.empty else float(p.default) for p in parameters}


def make_loss(name: str, args: Mapping[str, Any]) -> LossFunction:
    """Bind the parameters `args` to the loss `name`.

    Raises ValueError, naming the nearest valid name, for an unknown loss, an unknown or missing parameter, or a value
    that is not a positive finite number.
    """
    parameters = loss_parameters(name)
    for key, value in args.items():
        if key not in parameters:
            raise ValueError(f"loss {name!r} has no parameter {key!r}{_nearest(key, parameters)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise ValueError(f"parameter {key!r} of loss {name!r} must be a positive number, got {value!r}")
    missing = [key for key, default in parameters.items() if default is None and key not in args]
    if missing:
        raise ValueError(f"loss {name!r} needs {', '.join(missing)}: set it in algorithm.loss_args")
    return functools.partial(_function(name), **{key: float(value) for key, value in args.items()})


def _function(name: str) -> Callable[..., Tensor]:
    """A loss of this file, or what `module:function` names."""
    if ":" in name:
        return import_function(name)
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}{_nearest(name, LOSSES)}")
    return LOSSES[name]


def _nearest(name: str, valid: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": choose from {', '.join(valid) or 'none'}"
