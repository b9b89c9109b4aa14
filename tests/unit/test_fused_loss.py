"""The fused projection and loss of one rank, against autograd through whole logits in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from drpo_megatron.algorithms import LOSSES, SEQUENCE_LEVEL_LOSSES, LossInputs, evaluate, make_loss
from drpo_megatron.vocab_parallel import fused_logprobs, fused_policy_loss, torch_kernels
from drpo_megatron.vocab_parallel import tail as tail_module
from drpo_megatron.vocab_parallel.chunks import chunk_tokens

T, H, PADDED, VOCAB = 23, 8, 48, 41
TEMPERATURE = 0.7
ARGS: dict[str, dict[str, float]] = {
    "drpo": {"delta": 0.05},
    "mask_drpo": {"delta": 0.05},
    "drpo_kl": {"delta": 0.05},
    "drpo_tv": {"delta": 0.05},
    "cispo": {"eps_high": 0.3},
}
BUDGET_OF_7_TOKENS = 7 * PADDED * 8  # in float64: 23 tokens are four chunks, and 23 is not a multiple of any


def problem(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64)
    weight = torch.randn(PADDED, H, generator=g, dtype=torch.float64) * scale
    targets = torch.randint(0, VOCAB, (T,), generator=g)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    logp = torch.log_softmax(hidden @ weight[:VOCAB].T / TEMPERATURE, -1).gather(1, targets[:, None])[:, 0]
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": targets,
        # π on both sides of μ and of the trust region
        "logmu": (logp + 0.8 * torch.sin(3.0 * torch.arange(T))).clamp(max=-1e-3),
        "advantages": torch.cos(2.0 * torch.arange(T, dtype=torch.float64)),
        "weights": torch.linspace(0.01, 0.09, T, dtype=torch.float64),
        "mask": torch.rand(T, generator=g) > 0.3,
    }


def reference(p: dict[str, Tensor], loss: str, entropy_coefficient: float) -> dict[str, Tensor]:
    """Loss and gradients in float64 from log_softmax over whole logits."""
    hidden, weight = (p[k].double().clone().requires_grad_() for k in ("hidden", "weight"))
    mask = p["mask"]
    log_p = torch.log_softmax(hidden[mask] @ weight[:VOCAB].T / TEMPERATURE, -1)
    logp = log_p.gather(1, p["targets"][mask, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    total = objective(p, loss, entropy_coefficient, logp, entropy)
    grad_hidden, grad_weight = torch.autograd.grad(total, (hidden, weight))
    return {
        "loss": total.detach(),
        "logp": logp.detach(),
        "entropy": entropy.detach(),
        "hidden": grad_hidden,
        "weight": grad_weight,
    }


def objective(p: dict[str, Tensor], loss: str, entropy_coefficient: float, logp: Tensor, entropy: Tensor) -> Tensor:
    mask = p["mask"]
    x = LossInputs(
        logp_T=logp,
        logmu_T=p["logmu"][mask],
        advantages_T=p["advantages"][mask],
        mask_T=torch.ones_like(logp, dtype=torch.bool),
        sequence_ids_T=torch.arange(T)[mask] // 6,
        num_sequences=4,
    )
    weights = p["weights"][mask]
    outputs = evaluate(make_loss(loss, ARGS.get(loss, {})), x)
    return (weights * outputs.loss_T).sum() - entropy_coefficient * (weights * entropy).sum()


def fused(p: dict[str, Tensor], loss: str, entropy_coefficient: float, **options: Any) -> dict[str, Any]:
    """The same through the fused operation: gradients in the forward, or recomputed for a sequence-level loss."""
    hidden, weight = (p[k].clone().requires_grad_() for k in ("hidden", "weight"))
    common: dict[str, Any] = {
        "mask_T": p["mask"],
        "group": None,
        "vocab_size": VOCAB,
        "temperature": TEMPERATURE,
        "memory_budget": BUDGET_OF_7_TOKENS,
    } | options
    tail = None
    recompute = common.pop("recompute", False)
    if recompute or loss in SEQUENCE_LEVEL_LOSSES:
        logp, entropy = fused_logprobs(hidden, weight, p["targets"], **common)
        total = objective(p, loss, entropy_coefficient, logp, entropy)
    else:
        result = fused_policy_loss(
            hidden,
            weight,
            p["targets"],
            loss_function=make_loss(loss, ARGS.get(loss, {})),
            logmu_T=p["logmu"],
            advantages_T=p["advantages"],
            weights_T=p["weights"],
            entropy_coefficient=entropy_coefficient,
            **common,
        )
        total, logp, entropy, tail = result.loss, result.logp_N, result.entropy_N, result.tail
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "loss": total.detach(),
        "logp": logp.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": weight.grad,
        "tail": tail,
    }


def assert_equal(actual: dict[str, Any], expected: dict[str, Tensor], tolerance: float, what: str = "") -> None:
    for name, e in expected.items():
        a = actual[name]
        assert a.shape == e.shape, f"{what} {name}: {a.shape} instead of {e.shape}"
        error = ((a.double() - e).abs() / (1e-3 + e.abs().max())).max() if e.numel() else torch.zeros(())
        assert error < tolerance, f"{what} {name}: {error:.1e}"


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_equals_autograd(loss: str, entropy_coefficient: float) -> None:
    p = problem()
    expected = reference(p, loss, entropy_coefficient)
    assert expected["hidden"].abs().max() > 1e-4 and expected["weight"].abs().max() > 1e-4
    actual = fused(p, loss, entropy_coefficient)
    assert_equal(actual, expected, 1e-12)
    assert (actual["weight"][VOCAB:] == 0).all() and (actual["hidden"][~p["mask"]] == 0).all()
    recomputed = fused(p, loss, entropy_coefficient, recompute=True)
    assert_equal(recomputed, expected, 1e-12, "recomputed")


def test_gradcheck_of_recomputed_logprobs() -> None:
    """Against finite differences, with arbitrary upstream gradients of both outputs."""
    p = problem()

    def operation(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fused_logprobs(
            hidden,
            weight,
            p["targets"],
            mask_T=p["mask"],
            group=None,
            vocab_size=VOCAB,
            temperature=TEMPERATURE,
            memory_budget=BUDGET_OF_7_TOKENS,
        )

    inputs = (p["hidden"].requires_grad_(), p["weight"].requires_grad_())
    assert torch.autograd.gradcheck(operation, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_lower_precision(dtype: torch.dtype, tolerance: float, recompute: bool) -> None:
    p = problem(dtype)
    for entropy_coefficient in (0.0, 0.3):
        expected = reference(p, "drpo", entropy_coefficient)
        actual = fused(p, "drpo", entropy_coefficient, recompute=recompute)
        assert actual["hidden"].dtype == actual["weight"].dtype == dtype
        assert actual["logp"].dtype == torch.float32
        assert_equal(actual, expected, tolerance)


def test_bitwise_repeatable_and_independent_of_block(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("loss", "logp", "entropy", "hidden", "weight")
    p = problem(torch.float32)
    first, second = fused(p, "drpo", 0.1), fused(p, "drpo", 0.1)
    for name in names:
        assert torch.equal(first[name], second[name]), name
    # In float64: tiles of other sizes are other products, whose sums float32 rounds in another order.
    p = problem()
    whole = fused(p, "drpo", 0.1)
    monkeypatch.setattr(torch_kernels, "CACHE_ELEMENTS", 3 * PADDED)
    monkeypatch.setattr(torch_kernels, "COLUMN_BLOCK", 7)
    blocked = fused(p, "drpo", 0.1)
    for name in names:
        assert torch.allclose(whole[name], blocked[name], rtol=1e-11, atol=1e-13), name


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    p = problem()
    p["mask"] = torch.arange(T) < tokens
    actual = fused(p, "drpo", 0.3)
    assert_equal(actual, reference(p, "drpo", 0.3), 1e-12)
    assert len(actual["logp"]) == tokens
    if tokens == 0:
        assert actual["loss"] == 0 and (actual["weight"] == 0).all() and (actual["hidden"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("recompute", [False, True])
def test_logits_of_1e4(dtype: torch.dtype, recompute: bool) -> None:
    """Soft-maxes that are one-hot, on the target and elsewhere: targets 1e4 nats below the maximum included."""
    p = problem(dtype, scale=3e3)
    logits = p["hidden"].double() @ p["weight"].double().T
    assert logits.max() > 1e4 and logits.min() < -1e4
    p["targets"][2:8] = logits[2:8, :VOCAB].argmax(1)
    p["logmu"] = torch.full((T,), -0.5, dtype=torch.float64)
    for entropy_coefficient in (0.0, 0.1):
        actual = fused(p, "drpo", entropy_coefficient, recompute=recompute)
        # the loss of a ratio is exponential in logπ, which float32 knows to 1e-3 nats at 1e4
        assert_equal(actual, reference(p, "drpo", entropy_coefficient), 1e-9 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("exponentiate", [False, True])
@pytest.mark.parametrize("spread", [1.0, 30.0, 1e3])
def test_statistics_of_columns_in_blocks(monkeypatch: pytest.MonkeyPatch, spread: float, exponentiate: bool) -> None:
    """The maximum is raised from block to block where logits grow by more than the headroom, and nowhere else."""
    monkeypatch.setattr(torch_kernels, "COLUMN_BLOCK", 8)
    monkeypatch.setattr(torch_kernels, "CACHE_ELEMENTS", 16)
    rows, columns, temperature = 7, 60, 0.8
    logits = torch.randn(rows, columns, dtype=torch.float64)
    logits[:3] += torch.linspace(-spread, spread, columns, dtype=torch.float64)
    logits[3:5] -= torch.linspace(-spread, spread, columns, dtype=torch.float64)
    targets = torch.tensor([0, 59, 30, -1, 8, 7, 60])
    buffer = torch.full_like(logits, torch.nan)
    stats = torch_kernels.project(
        logits, torch.eye(columns, dtype=torch.float64), targets, temperature, buffer, exponentiate=exponentiate
    )
    z = logits / temperature
    m, g = stats[:, 0], stats[:, 3]
    assert bool((z.amax(1) <= m + torch_kernels.HEADROOM).all()) and bool((m <= z.amax(1)).all())
    shifted = z - m[:, None]
    torch.testing.assert_close(stats[:, 1], shifted.exp().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats[:, 2], (shifted.exp() * shifted).sum(1), rtol=1e-10, atol=1e-10)
    if exponentiate:
        torch.testing.assert_close(buffer, shifted.exp(), rtol=1e-12, atol=1e-300)
    owned = torch.tensor([True, True, True, False, True, True, False])
    assert bool((g[~owned] == -torch.inf).all())
    torch.testing.assert_close(g[owned], z[owned].gather(1, targets[owned, None]).squeeze(1), rtol=1e-12, atol=0)
    if spread == 1.0:
        assert torch.equal(m, z[:, :8].amax(1))


def test_main_grad_receives_the_gradient() -> None:
    """Two micro-batches add up in a float32 main_grad; autograd gets a placeholder that DDP's hook does not add."""
    p = problem(torch.bfloat16)
    exact = reference(p, "drpo", 0.0)
    weight = torch.nn.Parameter(p["weight"].clone())
    weight.main_grad = torch.zeros(PADDED, H)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    options: dict[str, Any] = {
        "loss_function": make_loss("drpo", ARGS["drpo"]),
        "logmu_T": p["logmu"],
        "advantages_T": p["advantages"],
        "weights_T": p["weights"],
        "mask_T": p["mask"],
        "group": None,
        "vocab_size": VOCAB,
        "temperature": TEMPERATURE,
        "memory_budget": BUDGET_OF_7_TOKENS,
    }
    for expected_sum in (1, 2):
        fused_policy_loss(p["hidden"], weight, p["targets"], **options).loss.backward()
        assert_equal({"weight": weight.main_grad}, {"weight": expected_sum * exact["weight"]}, 2e-2)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad and weight.grad is not None and weight.grad.dtype == torch.bfloat16  # type: ignore[attr-defined]
    weight.zero_out_wgrad, weight.grad = True, None  # type: ignore[attr-defined]
    fused_policy_loss(p["hidden"], weight, p["targets"], **options).loss.backward()
    assert weight.grad is None
    loss = fused_policy_loss(p["hidden"], weight, p["targets"], **options).loss
    with pytest.raises(RuntimeError, match="scale weights_T"):
        (2 * loss).backward()


def test_upstream_gradient_scales_both() -> None:
    p = problem()
    hidden, weight = (p[k].clone().requires_grad_() for k in ("hidden", "weight"))
    options: dict[str, Any] = {"logmu_T": p["logmu"], "advantages_T": p["advantages"], "weights_T": p["weights"]}
    result = fused_policy_loss(
        hidden,
        weight,
        p["targets"],
        loss_function=make_loss("pg", {}),
        mask_T=p["mask"],
        group=None,
        vocab_size=VOCAB,
        temperature=TEMPERATURE,
        **options,
    )
    (3 * result.loss).backward(retain_graph=True)
    expected = reference(p, "pg", 0.0)
    assert_equal(
        {"hidden": hidden.grad, "weight": weight.grad}, {k: 3 * expected[k] for k in ("hidden", "weight")}, 1e-12
    )
    with pytest.raises(RuntimeError, match="once"):
        result.loss.backward()
    assert not result.logp_N.requires_grad and not result.entropy_N.requires_grad


def test_without_gradients() -> None:
    """Under no_grad only the loss is computed; a frozen weight gets no gradient and the hidden states theirs."""
    p = problem()
    expected = reference(p, "drpo", 0.3)
    weight = torch.nn.Parameter(p["weight"].clone())
    weight.main_grad = torch.zeros_like(p["weight"])  # type: ignore[attr-defined]
    options: dict[str, Any] = {
        "loss_function": make_loss("drpo", ARGS["drpo"]),
        "logmu_T": p["logmu"],
        "advantages_T": p["advantages"],
        "weights_T": p["weights"],
        "mask_T": p["mask"],
        "group": None,
        "vocab_size": VOCAB,
        "temperature": TEMPERATURE,
        "entropy_coefficient": 0.3,
    }
    with torch.no_grad():
        loss = fused_policy_loss(p["hidden"], weight, p["targets"], **options).loss
    assert not loss.requires_grad and torch.allclose(loss, expected["loss"], rtol=1e-12)
    assert (weight.main_grad == 0).all()  # type: ignore[attr-defined]
    hidden = p["hidden"].clone().requires_grad_()
    fused_policy_loss(hidden, weight.requires_grad_(False), p["targets"], **options).loss.backward()
    assert_equal({"hidden": hidden.grad}, {"hidden": expected["hidden"]}, 1e-12)
    assert (weight.main_grad == 0).all() and weight.grad is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("recompute", [False, True])
def test_errors(recompute: bool) -> None:
    p = problem()
    p["mask"][:] = torch.arange(T) % 2 == 1
    poisoned = p | {"hidden": p["hidden"].clone()}
    poisoned["hidden"][9, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"rank 0, token 9 .*\(1 of 11 trained tokens\): the hidden state"):
        fused(poisoned, "drpo", 0.0, recompute=recompute)
    poisoned = p | {"weight": p["weight"].clone()}
    poisoned["weight"][0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="output weight"):
        fused(poisoned, "drpo", 0.0, recompute=recompute)
    poisoned = p | {"targets": p["targets"].clone()}
    poisoned["targets"][5] = VOCAB
    with pytest.raises(ValueError, match=r"token 5 .*target 41 is outside"):
        fused(poisoned, "drpo", 0.0, recompute=recompute)
    with pytest.raises(ValueError, match="cannot hold a vocabulary of 49"):
        fused(p, "drpo", 0.0, recompute=recompute, vocab_size=PADDED + 1)
    poisoned = p | {"hidden": p["hidden"][:5]}
    with pytest.raises(ValueError, match="sequence_parallel"):
        fused(poisoned, "drpo", 0.0, recompute=recompute)


def test_refusals() -> None:
    p = problem()
    with pytest.raises(ValueError, match="negative"):
        fused(p, "drpo", 0.0, tail_tolerance=-1.0)
    with pytest.raises(ValueError, match="fused_logprobs"):
        fused_policy_loss(
            p["hidden"],
            p["weight"],
            p["targets"],
            loss_function=make_loss("gspo", {}),
            logmu_T=p["logmu"],
            advantages_T=p["advantages"],
            weights_T=p["weights"],
            mask_T=p["mask"],
            group=None,
            vocab_size=VOCAB,
        )


def test_chunks_fit_the_budget() -> None:
    for ranks, in_flight in ((1, 1), (2, 2), (8, 2)):
        for tokens in (1, 500, 4096, 32768):
            size = chunk_tokens(tokens, 151936, 4, ranks, 256 * 2**20)
            assert size * in_flight * 151936 * 4 <= 256 * 2**20 and 1 <= size <= tokens
    assert chunk_tokens(442, 151936, 4, 1, 256 * 2**20) == 221  # two halves, not 441 and 1
    assert chunk_tokens(0, 100, 4, 1, 1) == chunk_tokens(5, 100, 4, 1, 1) == 1


def sharp_problem() -> dict[str, Tensor]:
    """A soft-max that is nearly empty, as a language model's: 512 tokens, 4096 columns, a few of them likely."""
    g = torch.Generator().manual_seed(1)
    tokens, hidden_size, columns = 512, 64, 4096
    weight = torch.randn(columns, hidden_size, generator=g)
    weight[columns // 8 :, 0] = -9  # words that hardly ever occur
    targets = torch.randint(0, columns // 8, (tokens,), generator=g)
    hidden = 0.2 * weight[targets] + 0.3 * torch.randn(tokens, hidden_size, generator=g)
    hidden[:, 0] = 1
    logp = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "logmu": logp - 0.1,
        "advantages": torch.cos(2.0 * torch.arange(tokens)),
        "weights": torch.full((tokens,), 1 / tokens),
        "mask": torch.ones(tokens, dtype=torch.bool),
    }


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.01])
def test_sparse_backward_is_within_its_bound(entropy_coefficient: float) -> None:
    p = sharp_problem()
    options: dict[str, Any] = {"vocab_size": 4096, "temperature": 1.0, "memory_budget": 128 * 4096 * 4}
    exact = fused(p, "drpo", entropy_coefficient, **options)
    assert exact["tail"].bound == 0 and exact["tail"].kept_share == 1
    kept = [1.0]
    for tolerance in (1e-3, 1e-2, 1e-1):
        sparse = fused(p, "drpo", entropy_coefficient, tail_tolerance=tolerance, **options)
        tail = sparse["tail"]
        assert torch.equal(sparse["loss"], exact["loss"]) and torch.equal(sparse["logp"], exact["logp"])
        kept.append(tail.kept_share)
        assert 0 <= tail.bound <= tolerance
        for name, bound in (("hidden", tail.hidden_bound), ("weight", tail.weight_bound)):
            error = float((sparse[name] - exact[name]).norm())
            assert error <= bound + 1e-5 * float(exact[name].norm()), (tolerance, name)
            assert error <= tolerance * float(exact[name].norm()), (tolerance, name)
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.5, kept
    assert tail.hidden_bound > 0 and tail.weight_bound > 0


def test_soft_and_sharp_rows_are_cut_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tokens are flat: their columns are not multiplied for the sharp ones, and the error stays bounded."""
    p = sharp_problem()
    p["hidden"][::2, 1:] *= 0.2
    p["hidden"][::2, 0] = 0.2
    p["logmu"] = torch.log_softmax(p["hidden"] @ p["weight"].T, -1).gather(1, p["targets"][:, None])[:, 0] - 0.1
    options: dict[str, Any] = {"vocab_size": 4096, "temperature": 1.0, "memory_budget": 512 * 4096 * 4}
    exact = fused(p, "drpo", 0.0, **options)
    kept = {}
    for groups in (1, 4):
        monkeypatch.setattr(tail_module, "ROW_GROUPS", groups)
        sparse = fused(p, "drpo", 0.0, tail_tolerance=0.05, **options)
        kept[groups] = sparse["tail"].kept_share
        for name, bound in (("hidden", sparse["tail"].hidden_bound), ("weight", sparse["tail"].weight_bound)):
            assert float((sparse[name] - exact[name]).norm()) <= bound, (groups, name)
    assert sparse["tail"].hidden_bound > 0 and kept[4] < 0.9 * kept[1], kept


def test_tokens_without_gradient_cost_nothing_in_the_sparse_backward() -> None:
    p = sharp_problem()
    p["advantages"][:256] = 0.0
    options: dict[str, Any] = {"vocab_size": 4096, "temperature": 1.0, "memory_budget": 512 * 4096 * 4}
    sparse = fused(p, "drpo", 0.0, tail_tolerance=0.05, **options)
    everything = fused(sharp_problem(), "drpo", 0.0, tail_tolerance=0.05, **options)
    assert sparse["tail"].kept_share < 0.75 * everything["tail"].kept_share
    assert (sparse["hidden"][:256] == 0).all()


def test_sparse_backward_in_bfloat16() -> None:
    """What is left out adds little to the rounding."""
    p = sharp_problem()
    p = p | {name: p[name].bfloat16() for name in ("hidden", "weight")}
    options: dict[str, Any] = {"vocab_size": 4096, "temperature": 1.0, "memory_budget": 128 * 4096 * 2}
    exact = fused({**p, "hidden": p["hidden"].float(), "weight": p["weight"].float()}, "drpo", 0.0, **options)
    rounded = fused(p, "drpo", 0.0, **options)
    sparse = fused(p, "drpo", 0.0, tail_tolerance=1e-2, **options)
    assert sparse["tail"].kept_share < 0.5
    for name in ("hidden", "weight"):
        rounding = (rounded[name].float() - exact[name]).norm()
        assert (sparse[name].float() - exact[name]).norm() <= 1.5 * rounding + 1e-2 * exact[name].norm(), name


def test_sparse_backward_of_a_flat_softmax_is_exact() -> None:
    p = problem()
    tail = fused(p, "drpo", 0.0, tail_tolerance=1e-6)["tail"]
    assert tail.exact_chunks == math.ceil(int(p["mask"].sum()) / 7) and tail.kept_share == 1 and tail.bound == 0
    assert_equal(fused(p, "drpo", 0.0, tail_tolerance=1e-6), reference(p, "drpo", 0.0), 1e-12)
