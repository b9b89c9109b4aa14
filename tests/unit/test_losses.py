"""Losses against closed forms in float64, written out here independently of the implementation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from drpo_megatron.algorithms import LOSSES, LossInputs, evaluate, loss_parameters, make_loss

DELTA = 0.2
ARGS: dict[str, dict[str, float]] = {
    "drpo": {"delta": DELTA},
    "mask_drpo": {"delta": DELTA},
    "drpo_kl": {"delta": DELTA},
    "drpo_tv": {"delta": DELTA},
    "cispo": {"eps_high": 0.5},
}


def bound(name: str):
    return make_loss(name, ARGS.get(name, {}))


def inputs(logp: Tensor, logmu: Tensor, advantages: Tensor, mask: Tensor | None = None, ids: Tensor | None = None):
    return LossInputs(
        logp_T=logp.detach().clone().requires_grad_(),
        logmu_T=logmu,
        advantages_T=advantages,
        mask_T=torch.ones_like(logp, dtype=torch.bool) if mask is None else mask,
        sequence_ids_T=torch.zeros_like(logp, dtype=torch.int64) if ids is None else ids,
        num_sequences=1 if ids is None else int(ids.max()) + 1,
    )


def random_inputs(dtype: torch.dtype = torch.float64, n: int = 4000) -> LossInputs:
    """Tokens from certain to very rare, near and far from the sampler, advantages of both signs and zero."""
    g = torch.Generator().manual_seed(0)
    logmu = -((torch.rand(n, generator=g, dtype=torch.float64) * 4 - 2).exp() ** 2) * torch.rand(n, generator=g)
    shift = torch.randn(n, generator=g) * 10 ** (torch.rand(n, generator=g) * 4 - 3)
    logp = (logmu + shift.clamp(-19.5, 19.5)).clamp(max=-1e-4)
    advantages = torch.randn(n, generator=g, dtype=torch.float64)
    advantages[::17] = 0.0
    extreme_logp = torch.tensor([-1e-9, -1e-9, -44.0, -0.5, -0.5, -15.0], dtype=torch.float64)
    extreme_logmu = torch.tensor([-19.9, -1e-9, -25.1, -19.0, -0.5, -1e-3], dtype=torch.float64)
    logp, logmu = torch.cat([logp, extreme_logp]), torch.cat([logmu, extreme_logmu])
    advantages = torch.cat([advantages, torch.tensor([1.0, -2.0, 1.0, -1.0, 3.0, -1.0], dtype=torch.float64)])
    ids = torch.arange(len(logp)) * 40 // len(logp)
    return inputs(logp.to(dtype), logmu.to(dtype), advantages.to(dtype), ids=ids)


def close(actual: Tensor, expected: Tensor, relative: float = 1e-12) -> None:
    assert torch.isfinite(actual).all()
    error = ((actual - expected).abs() / (1 + expected.abs())).max()
    assert error < relative, f"relative error {error:.2e}"


# Closed form of the coefficient ∂L/∂logπ of each per-token loss, in terms of A, r, π, μ.
def masked_by(beyond: Tensor, A: Tensor, r: Tensor) -> Tensor:
    return torch.where((A * (r - 1) > 0) & beyond, 0.0, -A * r)


def binary_kl(p: Tensor, mu: Tensor) -> Tensor:
    p, mu = p.clamp(max=1 - 1e-6), mu.clamp(max=1 - 1e-6)
    return mu * torch.log(mu / p) + (1 - mu) * torch.log((1 - mu) / (1 - p))


COEFFICIENTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "pg": lambda A, r, p, mu: -A * r,
    "drpo": lambda A, r, p, mu: -A * r * (1 - torch.sign(A * (r - 1)) * (p - mu).abs() / DELTA),
    "mask_drpo": lambda A, r, p, mu: torch.where(
        (A * (r - 1) > 0) & ((p - mu).abs() > DELTA), -A * r * (1 - (p - mu).abs() / DELTA), -A * r
    ),
    "drpo_kl": lambda A, r, p, mu: (
        -A * r + A.abs() / DELTA * torch.where(p < 1 - 1e-6, (p - mu.clamp(max=1 - 1e-6)) / (1 - p), 0.0)
    ),
    "drpo_tv": lambda A, r, p, mu: -A * r + A.abs() / DELTA * torch.sign(p - mu) * p,
    "spo": lambda A, r, p, mu: -A * r + A.abs() * (r - 1) * r / 0.2,
    "dppo_tv": lambda A, r, p, mu: masked_by((p - mu).abs() > 0.15, A, r),
    "dppo_kl": lambda A, r, p, mu: masked_by(binary_kl(p, mu) > 0.05, A, r),
    "grpo": lambda A, r, p, mu: torch.where(((A > 0) & (r > 1.28)) | ((A < 0) & (r < 0.8)), 0.0, -A * r),
    "cispo": lambda A, r, p, mu: -A * r.clamp(max=1.5),
}


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_gradient_is_the_closed_form(name: str) -> None:
    x = random_inputs()
    out = evaluate(bound(name), x)
    A, p, mu = x.advantages_T, x.logp_T.detach().exp(), x.logmu_T.exp()
    expected = COEFFICIENTS[name](A, p / mu, p, mu)
    # The binary KL divides by 1 − π, which double precision holds to 1e-16 / 1e-6 where π is nearly 1.
    close(out.coefficient_T, expected, 1e-9 if name == "drpo_kl" else 1e-12)
    (through_loss,) = torch.autograd.grad(out.loss_T.sum(), x.logp_T)
    assert torch.equal(through_loss, out.coefficient_T)
    assert not out.coefficient_T.requires_grad and not out.weight_T.requires_grad
    signal = A != 0
    close(out.weight_T[signal], (-expected / (A * p / mu))[signal], 1e-7 if name == "drpo_kl" else 1e-11)
    assert (out.weight_T[~signal] == 1).all() and (~signal).any()


def test_every_loss_is_covered() -> None:
    assert set(LOSSES) == set(COEFFICIENTS) | {"gspo"}


def test_drpo_weight_range_sign_and_boundary() -> None:
    for delta in (0.15, 0.6, 12.5):
        w = evaluate(make_loss("drpo", {"delta": delta}), random_inputs()).weight_T
        assert w.min() >= 1 - 1 / delta - 1e-12 and w.max() <= 1 + 1 / delta + 1e-12
        assert w.min() < 1 < w.max()
        assert (w < 0).any() == (delta < 1)


@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_drpo_is_stationary_at_mu_plus_delta(advantage: float) -> None:
    mu = torch.tensor([0.3, 0.4, 0.55], dtype=torch.float64)
    target = mu + math.copysign(DELTA, advantage)
    x = inputs(target.log(), mu.log(), torch.full_like(mu, advantage))
    close(evaluate(bound("drpo"), x).coefficient_T, torch.zeros_like(mu))
    # It is the minimum: gradient descent on the probability itself arrives there from μ.
    logits = torch.logit(mu).requires_grad_()
    for _ in range(3000):
        x = LossInputs(
            torch.nn.functional.logsigmoid(logits),
            mu.log(),
            torch.full_like(mu, advantage),
            x.mask_T,
            x.sequence_ids_T,
            1,
        )
        (g,) = torch.autograd.grad(bound("drpo")(x).sum(), logits)
        logits = (logits - 0.2 * g).detach().requires_grad_()
    close(logits.sigmoid().detach(), target, 1e-6)


def test_mask_drpo_is_drpo_beyond_the_boundary_and_pg_inside() -> None:
    x = random_inputs()
    p, mu = x.logp_T.detach().exp(), x.logmu_T.exp()
    beyond = (x.advantages_T * (p - mu) > 0) & ((p - mu).abs() > DELTA)
    assert 100 < beyond.sum() < len(p) - 100
    masked, full, plain = (evaluate(bound(n), x) for n in ("mask_drpo", "drpo", "pg"))
    for field in ("loss_T", "coefficient_T", "weight_T"):
        expected = torch.where(beyond, getattr(full, field), getattr(plain, field))
        assert torch.equal(getattr(masked, field), expected)


def test_gspo_equals_a_loop_over_sequences() -> None:
    g = torch.Generator().manual_seed(1)
    n = 60
    ids = torch.randint(0, 7, (n,), generator=g)
    ids[ids == 3] = 4  # sequence 3 is empty
    mask = torch.rand(n, generator=g) > 0.3
    logmu = -torch.rand(n, generator=g, dtype=torch.float64) * 3
    shift = torch.tensor([3e-3, -3e-3, 1e-4, 0.0, 0.0, -1e-4, 30.0], dtype=torch.float64)
    x = inputs(logmu + shift[ids], logmu, torch.randn(7, generator=g, dtype=torch.float64)[ids], mask, ids)
    out = evaluate(make_loss("gspo", {}), x)
    assert x.num_sequences == 7
    reference = x.logp_T.detach().clone().requires_grad_()
    expected = torch.zeros(n, dtype=torch.float64)
    for i in range(7):
        rows = (ids == i) & mask
        if not rows.any():
            continue
        s = (reference[rows] - logmu[rows]).mean().clamp(-20, 20).exp()
        A = x.advantages_T[rows]
        expected[rows] = -torch.min(s * A, s.clamp(1 - 3e-4, 1 + 4e-4) * A)
    close(out.loss_T, expected.detach())
    (gradient,) = torch.autograd.grad(expected.sum(), reference)
    close(out.coefficient_T, gradient)
    assert (gradient[mask] == 0).any() and (gradient[mask] != 0).any(), "both sides of the clip must occur"


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_on_policy_gradient_is_minus_advantage(name: str) -> None:
    """At π = μ no regularizer, mask or clip acts: every loss is the same policy gradient, certain tokens included."""
    logp = torch.tensor([0.0, -1e-9, -1e-3, -0.7, -5.0, -30.0], dtype=torch.float64)
    A = torch.tensor([1.0, -2.0, 0.5, -0.25, 3.0, -1.0], dtype=torch.float64)
    out = evaluate(bound(name), inputs(logp, logp, A, ids=torch.tensor([0, 0, 1, 1, 1, 2])))
    # gspo shares a sequence's advantage, so its tokens carry the sequence's mean.
    expected = (
        torch.tensor([-0.5, -0.5, 3.25 / 3, 3.25 / 3, 3.25 / 3, -1.0], dtype=torch.float64) if name == "gspo" else A
    )
    close(out.coefficient_T, -expected)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_and_silent_on_masked_tokens(name: str, dtype: torch.dtype) -> None:
    x = random_inputs(dtype, 500)
    mask = torch.arange(len(x.logp_T)) % 3 > 0
    logp = x.logp_T.detach().clone()
    clean = replace(x, mask_T=mask)
    logp[~mask] = torch.tensor(float("nan"), dtype=dtype)
    logmu = torch.where(mask, x.logmu_T, float("-inf"))
    dirty = replace(
        clean, logp_T=logp.requires_grad_(), logmu_T=logmu, sequence_ids_T=torch.where(mask, x.sequence_ids_T, 99)
    )
    out, reference = evaluate(bound(name), dirty), evaluate(bound(name), clean)
    assert out.loss_T.dtype == torch.float32
    for t in (out.loss_T, out.coefficient_T, out.weight_T):
        assert torch.isfinite(t).all()
    assert (out.loss_T[~mask] == 0).all() and (out.coefficient_T[~mask] == 0).all() and (out.weight_T[~mask] == 1).all()
    assert torch.equal(out.loss_T, reference.loss_T) and torch.equal(out.coefficient_T, reference.coefficient_T)
    assert (out.coefficient_T[mask] != 0).any()


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("num_padding", [0, 3])
def test_a_micro_batch_without_tokens(name: str, num_padding: int) -> None:
    t = torch.zeros(num_padding)
    x = LossInputs(t.clone().requires_grad_(), t, t + 1, t.bool(), t.long(), num_sequences=0)
    out = evaluate(bound(name), x)
    assert out.loss_T.shape == (num_padding,) and not out.loss_T.any() and not out.coefficient_T.any()


def test_ratio_clamps_at_20_nats() -> None:
    logmu = torch.tensor([-60.0, -60.0, -1.0, -1.0], dtype=torch.float64)
    logp = logmu + torch.tensor([19.0, 25.0, -19.0, -25.0], dtype=torch.float64)
    out = evaluate(make_loss("pg", {}), inputs(logp, logmu, -torch.ones(4, dtype=torch.float64)))
    close(out.loss_T, torch.tensor([19.0, 20.0, -19.0, -20.0], dtype=torch.float64).exp())
    assert out.coefficient_T[1] == out.coefficient_T[3] == 0 and (out.coefficient_T[[0, 2]] > 0).all()


def test_evaluate_without_a_graph() -> None:
    x = random_inputs()
    frozen = replace(x, logp_T=x.logp_T.detach())
    with torch.no_grad():
        out = evaluate(bound("drpo"), frozen)
    assert torch.equal(out.coefficient_T, evaluate(bound("drpo"), x).coefficient_T)


def test_registry_signatures() -> None:
    for name, function in LOSSES.items():
        first, *rest = inspect.signature(function).parameters.values()
        assert first.name == "x" and all(p.kind is p.KEYWORD_ONLY for p in rest), name
    assert loss_parameters("drpo") == {"delta": None}
    assert loss_parameters("grpo") == {"eps_low": 0.2, "eps_high": 0.28}


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("drop", {}, "did you mean 'drpo'"),
        ("zzzz", {}, "choose from"),
        ("drpo", {}, "needs delta"),
        ("drpo", {"delat": 1.0}, "did you mean 'delta'"),
        ("pg", {"delta": 1.0}, "no parameter 'delta'"),
        ("drpo", {"delta": 0.0}, "positive number"),
        ("drpo", {"delta": float("nan")}, "positive number"),
        ("drpo", {"delta": "0.2"}, "positive number"),
        ("drpo", {"delta": True}, "positive number"),
    ],
)
def test_make_loss_refuses(name: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loss(name, args)
