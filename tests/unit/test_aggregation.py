"""Aggregation weights against naive loops, and independence of how the batch is split."""

from __future__ import annotations

import numpy as np
import pytest

from drpo_megatron.algorithms import AGGREGATIONS, sequence_weights

HORIZON = 64
LENGTHS = [5, 1, 0, 12, 7, 30, 2, 9]


def naive(name: str, losses: list[np.ndarray]) -> float:
    present = [loss for loss in losses if len(loss)]
    if name == "token_mean":
        tokens = [value for loss in present for value in loss]
        return sum(tokens) / len(tokens)
    if name == "seq_mean_token_mean":
        return sum(sum(loss) / len(loss) for loss in present) / len(present)
    assert name == "seq_mean_token_sum_norm"
    return sum(sum(loss) / HORIZON for loss in present) / len(present)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_weights_reproduce_the_formula_however_the_batch_is_split(name: str) -> None:
    rng = np.random.default_rng(0)
    losses = [rng.normal(size=n) for n in LENGTHS]
    expected = naive(name, losses)
    weights = sequence_weights(name, LENGTHS, horizon=HORIZON)
    assert weights.dtype == np.float64 and weights.shape == (len(LENGTHS),)
    assert weights[2] == 0 and (np.delete(weights, 2) > 0).all()
    # Tokens are dealt to "ranks" and summed there, first by whole sequences (data parallel), then token by token
    # (context parallel, packing): the total is the formula each time.
    flat = [(w, value) for w, loss in zip(weights, losses, strict=True) for value in loss]
    for parts in (1, 2, 3, 5):
        by_sequence = [sum(weights[i] * losses[i].sum() for i in range(p, len(losses), parts)) for p in range(parts)]
        by_token = [sum(w * value for w, value in flat[p::parts]) for p in range(parts)]
        assert sum(by_sequence) == pytest.approx(expected, rel=1e-13)
        assert sum(by_token) == pytest.approx(expected, rel=1e-13)
    # A mean of the micro-batches' own means is something else, so the test above can fail.
    assert np.mean([naive(name, losses[:4]), naive(name, losses[4:])]) != pytest.approx(expected, rel=1e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="choose from token_mean"):
        sequence_weights("mean", [1], horizon=1)
    for lengths in ([], [0, 0], [3, -3], [4, -1]):
        with pytest.raises(ValueError, match="no trained token"):
            sequence_weights("token_mean", lengths, horizon=1)
    with pytest.raises(ValueError, match="horizon"):
        sequence_weights("seq_mean_token_sum_norm", [1], horizon=0)
