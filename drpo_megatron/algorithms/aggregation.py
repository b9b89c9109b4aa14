"""From token losses to one number: the weight every token of a sequence has in the loss of the global batch.

`loss = Σ_t weight[sequence of t] · L_t` over all tokens of all ranks and micro-batches. The weights are computed once
from the lengths of the whole global batch, so the loss and its gradient do not depend on data or context parallelism,
micro-batch size, packing or pipeline schedule; nothing is divided afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]


def token_mean(lengths_S: NDArray[np.int64], *, horizon: int) -> Weights:
    """Mean over all tokens of the global batch: every token weighs 1 / Σ lengths. `horizon` is not used."""
    return np.full(len(lengths_S), 1.0 / lengths_S.sum())


def seq_mean_token_mean(lengths_S: NDArray[np.int64], *, horizon: int) -> Weights:
    """Mean over a sequence's tokens, then over sequences: 1 / (S · length). `horizon` is not used."""
    return 1.0 / (np.count_nonzero(lengths_S) * np.maximum(lengths_S, 1))


def seq_mean_token_sum_norm(lengths_S: NDArray[np.int64], *, horizon: int) -> Weights:
    """Sum over a sequence's tokens / horizon, then mean over sequences: 1 / (S · horizon). DRPO's recipe, at 8192."""
    return np.full(len(lengths_S), 1.0 / (np.count_nonzero(lengths_S) * horizon))


AGGREGATIONS: dict[str, Callable[..., Weights]] = {
    f.__name__: f for f in (token_mean, seq_mean_token_mean, seq_mean_token_sum_norm)
}


def sequence_weights(name: str, lengths: Sequence[int], *, horizon: int) -> Weights:
    """The weight of every token of each sequence, float64 [S].

    lengths: trained tokens of ALL sequences of the global batch. A sequence of length 0 has nothing to weigh: its
    weight is 0 and it does not count in S. horizon: the divisor of `seq_mean_token_sum_norm` in tokens, so that a
    token weighs the same in a short and in a long response. Raises ValueError for an unknown name, a negative length,
    a horizon below 1, or a batch without any token.
    """
    if name not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {name!r}: choose from {', '.join(AGGREGATIONS)}")
    lengths_S = np.asarray(lengths, dtype=np.int64)
    if lengths_S.sum() == 0 or lengths_S.min() < 0:
        raise ValueError("no trained token in the global batch, or a negative length: check the response masks")
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1 token, got {horizon}")
    return np.where(lengths_S > 0, AGGREGATIONS[name](lengths_S, horizon=horizon), 0.0)
