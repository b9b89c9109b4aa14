"""Metrics of the trained tokens: what each micro-batch keeps, and the one reduction to named floats.

A micro-batch leaves a `TokenStats`: a few detached float32 vectors over its trained tokens (28 bytes a token). Records
concatenate over micro-batches and ranks in any order; `summarize` then reduces the tokens of the global batch once, in
float64, so quantiles and ratios of sums are those of the global batch and not means of means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from drpo_megatron.algorithms.losses import MAX_LOG_RATIO, LossInputs, LossOutputs


@dataclass(frozen=True)
class TokenStats:
    """Trained tokens only, each field float32 [N], detached.

    objective_N: weight in the global batch × L (its sum is the loss). weight_N: w of `LossOutputs`. logp_N, logmu_N:
    nats. entropy_N: nats, of the whole next-token distribution. staleness_N: weight versions between sampling and
    training.
    """

    objective_N: Tensor
    weight_N: Tensor
    advantages_N: Tensor
    logp_N: Tensor
    logmu_N: Tensor
    entropy_N: Tensor
    staleness_N: Tensor

    @staticmethod
    def of(
        x: LossInputs, outputs: LossOutputs, entropy_T: Tensor, weights_T: Tensor, staleness_T: Tensor
    ) -> TokenStats:
        """The record of one micro-batch; tensors are [T] like those of `x`, weights_T is the aggregation's."""

        trained_N = x.mask_T.nonzero().squeeze(1)  # a GPU is waited for once, and not for each field

        def trained(t_T: Tensor) -> Tensor:
            return t_T.detach()[trained_N].float()

        return TokenStats(
            objective_N=trained(weights_T * outputs.loss_T),
            weight_N=trained(outputs.weight_T),
            advantages_N=trained(x.advantages_T),
            logp_N=trained(x.logp_T),
            logmu_N=trained(x.logmu_T),
            entropy_N=trained(entropy_T),
            staleness_N=trained(staleness_T),
        )

    @staticmethod
    def cat(records: Sequence[TokenStats]) -> TokenStats:
        """One record of all tokens. ValueError if there are no records."""
        if not records:
            raise ValueError("no token statistics to concatenate")
        return TokenStats(**{f.name: torch.cat([getattr(r, f.name) for r in records]) for f in fields(TokenStats)})

    def matrix(self) -> Tensor:
        """The fields as one float32 [F, N] tensor, to be sent in one collective."""
        return torch.stack([getattr(self, f.name) for f in fields(self)])

    @staticmethod
    def from_matrix(matrix_FN: Tensor) -> TokenStats:
        """Inverse of `matrix`. Each field has its own memory: of views, every one would be pickled as the whole."""
        rows = (row_N.clone() for row_N in matrix_FN)
        return TokenStats(**dict(zip([f.name for f in fields(TokenStats)], rows, strict=True)))


def summarize(stats: TokenStats, delta: float | None) -> dict[str, float]:
    """Reduce the tokens of the global batch to metrics. delta: the loss's `delta`, None for a loss without one.

    `loss/mean`: the aggregated loss. `drpo/weight_q*`: quantiles of w over tokens with A ≠ 0 (1 if there are none).
    `drpo/corrective_frac`: share of all tokens with w < 0. `drpo/beyond_delta_frac`: share with |π − μ| > δ, only with
    a delta. The `mismatch/*` compare the policy π with the sampler μ on tokens sampled from μ: `k1` = mean(logμ −
    logπ) and `k3` = mean(r − 1 − log r) both estimate KL(μ ‖ π) in nats a token, k1 unbiased, k3 never negative;
    `abs_dlogp_{mean,max}` in nats; `tv` = mean |π − μ|; `ess` = (Σr)²/(N·Σr²) in (0, 1], the effective share of the
    sample. `ratio/max_abs_dev` = max |r − 1|. `policy/entropy` in nats. `staleness/*` in weight versions. ValueError
    when there are no tokens.
    """
    if stats.logp_N.numel() == 0:
        raise ValueError("no trained tokens to summarize: every response mask is empty")
    s = TokenStats(**{f.name: getattr(stats, f.name).double().cpu() for f in fields(stats)})
    dlogp_N = s.logp_N - s.logmu_N
    log_r_N = dlogp_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    r_N = log_r_N.exp()
    tv_N = (s.logp_N.exp() - s.logmu_N.exp()).abs()
    signal_N = s.weight_N[s.advantages_N != 0].numpy()
    q01, q50, q99 = np.quantile(signal_N, (0.01, 0.5, 0.99)) if len(signal_N) else (1.0, 1.0, 1.0)
    metrics = {
        "loss/mean": s.objective_N.sum(),
        "drpo/weight_q01": q01,
        "drpo/weight_q50": q50,
        "drpo/weight_q99": q99,
        "drpo/corrective_frac": (s.weight_N < 0).double().mean(),
        "mismatch/k1": -dlogp_N.mean(),
        "mismatch/k3": (torch.expm1(log_r_N) - log_r_N).mean(),
        "mismatch/abs_dlogp_mean": dlogp_N.abs().mean(),
        "mismatch/abs_dlogp_max": dlogp_N.abs().max(),
        "mismatch/tv": tv_N.mean(),
        "mismatch/ess": r_N.sum() ** 2 / (len(r_N) * (r_N**2).sum()),
        "ratio/max_abs_dev": torch.expm1(log_r_N).abs().max(),
        "policy/entropy": s.entropy_N.mean(),
        "staleness/mean": s.staleness_N.mean(),
        "staleness/max": s.staleness_N.max(),
    }
    if delta is not None:
        metrics["drpo/beyond_delta_frac"] = (tv_N > delta).double().mean()
    return {name: float(value) for name, value in metrics.items()}
