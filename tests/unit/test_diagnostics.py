"""Diagnostics against plain NumPy on the whole batch, and independence of how tokens fall into records."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from drpo_megatron.algorithms import LossInputs, TokenStats, evaluate, make_loss, summarize

DELTA = 0.1
N = 1000


def record(rows: slice) -> TokenStats:
    g = torch.Generator().manual_seed(0)
    logmu = -torch.rand(N, generator=g) * 4
    logp = (logmu + 0.3 * torch.randn(N, generator=g)).clamp(max=-1e-3)
    advantages = torch.randint(-1, 2, (N,), generator=g).float()
    mask = torch.rand(N, generator=g) > 0.25
    entropy, staleness = torch.rand(N, generator=g), torch.randint(0, 4, (N,), generator=g).float()
    weights = torch.rand(N, generator=g) / N
    x = LossInputs(
        logp[rows].requires_grad_(),
        logmu[rows],
        advantages[rows],
        mask[rows],
        torch.zeros(N, dtype=torch.int64)[rows],
        1,
    )
    out = evaluate(make_loss("drpo", {"delta": DELTA}), x)
    return TokenStats.of(x, out, entropy[rows], weights[rows], staleness[rows])


def test_against_numpy() -> None:
    stats = record(slice(None))
    m = summarize(stats, DELTA)
    logp, logmu, A = (t.double().numpy() for t in (stats.logp_N, stats.logmu_N, stats.advantages_N))
    assert 700 < len(logp) < 800, "masked-out tokens are not in the record"
    p, mu = np.exp(logp), np.exp(logmu)
    r = p / mu
    w = (1 - np.sign(A * (r - 1)) * np.abs(p - mu) / DELTA)[A != 0]
    loss = -A * r + np.abs(A) * mu * (r - 1) ** 2 / (2 * DELTA)
    expected = {
        "drpo/weight_q01": np.percentile(w, 1),
        "drpo/weight_q50": np.percentile(w, 50),
        "drpo/weight_q99": np.percentile(w, 99),
        "drpo/corrective_frac": (w < 0).sum() / len(r),
        "drpo/beyond_delta_frac": np.mean(np.abs(p - mu) > DELTA),
        "mismatch/k1": np.mean(np.log(mu / p)),
        "mismatch/k3": np.mean(r - 1 - np.log(r)),
        "mismatch/abs_dlogp_mean": np.mean(np.abs(logp - logmu)),
        "mismatch/abs_dlogp_max": np.max(np.abs(logp - logmu)),
        "mismatch/tv": np.mean(np.abs(p - mu)),
        "mismatch/ess": r.sum() ** 2 / (len(r) * (r**2).sum()),
        "ratio/max_abs_dev": np.max(np.abs(r - 1)),
        "policy/entropy": stats.entropy_N.double().mean().item(),
        "staleness/mean": stats.staleness_N.double().mean().item(),
        "staleness/max": 3.0,
    }
    assert set(m) == set(expected) | {"loss/mean"}
    for name, value in expected.items():
        assert m[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    assert 0 < m["drpo/corrective_frac"] < 0.5 and 0 < m["drpo/beyond_delta_frac"] < 1 and 0.5 < m["mismatch/ess"] < 1
    weights = stats.objective_N.double().numpy() / np.where(loss == 0, 1, loss)
    assert (weights >= -1e-9).all() and weights.max() <= 1.01 / N, "the objective is the token loss times its weight"
    assert m["loss/mean"] == pytest.approx(stats.objective_N.double().sum().item(), rel=1e-12)


def test_records_concatenate_in_any_order_and_travel_as_one_matrix() -> None:
    whole = summarize(record(slice(None)), DELTA)
    parts = [record(slice(a, b)) for a, b in ((400, 1000), (0, 3), (3, 400))]
    joined = TokenStats.from_matrix(TokenStats.cat(parts).matrix())
    for name, value in summarize(joined, DELTA).items():
        assert value == pytest.approx(whole[name], rel=1e-10, abs=1e-12), name


def test_kl_estimators_point_from_the_sampler_to_the_policy() -> None:
    """On all outcomes weighted by μ, k1 and k3 are the exact KL(μ ‖ π)."""
    mu = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    p = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    tokens = torch.tensor([0, 0, 1, 2])  # frequencies are μ
    zeros = torch.zeros(4)
    stats = TokenStats(zeros, zeros + 1, zeros, p.log()[tokens], mu.log()[tokens], zeros, zeros)
    m = summarize(stats, None)
    exact = (mu * (mu / p).log()).sum().item()
    assert m["mismatch/k1"] == pytest.approx(exact) and m["mismatch/k3"] == pytest.approx(exact)
    assert "drpo/beyond_delta_frac" not in m
    assert m["drpo/weight_q01"] == m["drpo/weight_q99"] == 1.0, "no token has an advantage"


def test_on_policy_is_exactly_zero_mismatch() -> None:
    logp = -torch.rand(10)
    zeros = torch.zeros(10)
    m = summarize(TokenStats(zeros, zeros + 1, zeros, logp, logp, zeros, zeros), DELTA)
    for name in ("mismatch/k1", "mismatch/k3", "mismatch/tv", "mismatch/abs_dlogp_max", "ratio/max_abs_dev"):
        assert m[name] == 0, name
    assert m["mismatch/ess"] == 1


def test_empty_is_refused() -> None:
    with pytest.raises(ValueError, match="no token statistics"):
        TokenStats.cat([])
    with pytest.raises(ValueError, match="no trained tokens"):
        summarize(TokenStats(*[torch.zeros(0)] * 7), DELTA)


def test_statistics_are_pickled_once() -> None:
    """They travel to rank 0 so: fields that were views of one matrix would each carry all of it."""
    matrix = torch.randn(7, 1000)
    stats = TokenStats.from_matrix(matrix)
    assert torch.equal(stats.matrix(), matrix)
    assert len(pickle.dumps(stats)) < 1.5 * matrix.nbytes
