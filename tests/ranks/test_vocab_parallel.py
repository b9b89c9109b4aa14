"""Vocabulary-parallel log-prob, entropy and projection at TP 1, 2 and 4 against unsharded torch.log_softmax.

One launch of four gloo ranks runs every check; each returns figures or raises on the rank that is wrong.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drpo_megatron.algorithms import LossInputs, evaluate, make_loss
from tests.support.launch import run_ranks

WORLD = 4
T, H, PADDED = 24, 12, 64
# Vocabulary sizes: nothing padded; the last TP 4 shard partly padded; two TP 4 shards and one TP 2 shard wholly padded.
VOCAB_SIZES = (64, 50, 30)
TEMPERATURE = 0.7
Groups = dict[int, Any]


class Collectives(TorchDispatchMode):
    """Counts the c10d operations that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def saved_into(saved: list[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Collects what the operations inside keep for their backward pass."""

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)


def full_problem(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [T, H], weight [PADDED, H], targets and mask [T], the same on every rank; logits some 20 nats apart."""
    g = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(T, H, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, H, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocab_size, (T,), generator=g)
    targets[:4] = torch.tensor([0, vocab_size - 1, 15, 16])  # both ends, and both sides of a TP 4 shard's border
    mask = torch.rand(T, generator=g) > 0.3
    return hidden, weight, targets, mask


def unsharded(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits[:, :vocab_size] / TEMPERATURE, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def shard(t: Tensor, group: Any, dim: int = 0) -> Tensor:
    return t if group is None else t.chunk(group.size(), dim)[group.rank()]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = ((actual.double() - expected.double()).abs() / (1 + expected.double().abs())).max()
    assert error < tolerance, f"{what}: error {error:.2e}"


def check_logits_function(groups: Groups, block: int) -> None:
    """Values, gradient of both outputs on every shard, one collective forward and none backward, one saved tensor."""
    from drpo_megatron.vocab_parallel import logprob

    with mock.patch.object(logprob, "BLOCK_ELEMENTS", block):
        _check_logits_function(groups, logprob.vocab_parallel_logprob_entropy)


def _check_logits_function(groups: Groups, logprob_entropy: Callable[..., tuple[Tensor, Tensor]]) -> None:
    grads_of: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "logp": lambda logp, entropy: (logp * torch.linspace(-1, 2, T, dtype=logp.dtype)).sum(),
        "entropy": lambda logp, entropy: (entropy * torch.linspace(2, -1, T, dtype=logp.dtype)).sum(),
        "both": lambda logp, entropy: (logp * entropy).sum(),
    }
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-2}
    for dtype, tolerance in tolerances.items():
        for vocab_size in VOCAB_SIZES:
            hidden, weight, targets, _ = full_problem(vocab_size, dtype)
            logits = hidden @ weight.T
            whole = logits.double().requires_grad_()  # the reference is float64 on the same, rounded, logits
            for tp, group in groups.items():
                for name, objective in grads_of.items():
                    what = f"TP {tp}, {dtype}, vocabulary {vocab_size}, gradient of {name}"
                    expected = unsharded(whole, targets, vocab_size)
                    (expected_grad,) = torch.autograd.grad(objective(*expected), whole)
                    local = shard(logits, group, dim=1).clone().requires_grad_()
                    saved: list[Tensor] = []
                    with saved_into(saved), Collectives() as forward:
                        actual = logprob_entropy(
                            local, targets, group=group, vocab_size=vocab_size, temperature=TEMPERATURE
                        )
                    wide = [t for t in saved if t.dim() == 2]
                    assert [t.data_ptr() for t in wide] == [local.data_ptr()], f"{what}: the logits are kept, once"
                    with Collectives() as backward:
                        (grad,) = torch.autograd.grad(objective(*actual), local)
                    assert sum(forward.calls.values()) == (tp > 1) and not backward.calls, f"{what}: {forward.calls}"
                    value_tolerance = 1e-12 if dtype == torch.float64 else 2e-5
                    for a, e, output in zip(actual, expected, ("logp", "entropy"), strict=True):
                        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                        assert_close(a, e, value_tolerance, f"{what}: {output}")
                    assert grad.dtype == dtype
                    assert_close(grad, shard(expected_grad, group, dim=1), tolerance, what)
                    first = 0 if group is None else group.rank() * local.shape[1]
                    assert (grad[:, max(vocab_size - first, 0) :] == 0).all(), f"{what}: padding has a gradient"


def check_extremes(groups: Groups) -> None:
    """Logits far apart stay exact, a foreign target is NaN, no tokens give no tokens."""
    from drpo_megatron.vocab_parallel import vocab_parallel_logprob_entropy

    logits = torch.zeros(3, PADDED)
    logits[0, 40], logits[1, 3], logits[2] = 3e4, -3e4, torch.linspace(-100, 100, PADDED)
    targets = torch.tensor([40, 3, 0])
    expected = torch.log_softmax(logits.double(), -1)
    for tp, group in groups.items():
        local = shard(logits, group, dim=1)
        logp, entropy = vocab_parallel_logprob_entropy(local, targets, group=group, vocab_size=PADDED)
        assert_close(logp, expected.gather(1, targets[:, None])[:, 0], 1e-6, f"TP {tp}: extreme logits")
        assert_close(entropy, -(expected.exp() * expected).sum(-1), 1e-6, f"TP {tp}: entropy of extreme logits")
        foreign = torch.tensor([-1, 50, 63])
        logp, _ = vocab_parallel_logprob_entropy(local, foreign, group=group, vocab_size=50)
        assert logp.isnan().all(), f"TP {tp}: targets outside the vocabulary"
        none = local[:0].clone().requires_grad_()
        logp, entropy = vocab_parallel_logprob_entropy(none, targets[:0], group=group, vocab_size=50)
        (grad,) = torch.autograd.grad((logp + entropy).sum(), none)
        assert logp.shape == entropy.shape == (0,) and grad.shape == none.shape
        with pytest.raises(ValueError, match="cannot hold a vocabulary of 65"):
            vocab_parallel_logprob_entropy(local, targets, group=group, vocab_size=65)
        with pytest.raises(ValueError, match="temperature"):
            vocab_parallel_logprob_entropy(local, targets, group=group, vocab_size=50, temperature=0.0)


def drpo_objective(logp_N: Tensor, entropy_N: Tensor) -> Tensor:
    """A DRPO loss with an entropy bonus; μ lies around π, so that both sides of the boundary occur."""
    n = len(logp_N)
    steps = torch.arange(n)
    logmu_N = (logp_N.detach() + 0.8 * torch.sin(3.0 * steps)).clamp(max=-1e-3)
    x = LossInputs(
        logp_T=logp_N,
        logmu_T=logmu_N,
        advantages_T=torch.cos(2.0 * steps).to(logp_N.dtype),
        mask_T=torch.ones(n, dtype=torch.bool),
        sequence_ids_T=torch.zeros(n, dtype=torch.int64),
        num_sequences=1,
    )
    return evaluate(make_loss("drpo", {"delta": 0.05}), x).loss_T.sum() / n - 0.1 * entropy_N.mean()


def check_head(groups: Groups) -> dict[str, float]:
    """DRPO through the sharded head, with and without sequence parallelism: loss, hidden gradient, weight gradient."""
    from drpo_megatron.vocab_parallel import project_logprobs

    losses: dict[str, float] = {}
    for dtype, tolerance in {torch.float64: 1e-12, torch.float32: 2e-5}.items():
        for vocab_size in VOCAB_SIZES:
            hidden, weight, targets, mask = full_problem(vocab_size, dtype)
            hidden64, weight64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
            selected = unsharded(hidden64[mask] @ weight64.T, targets[mask], vocab_size)
            expected = drpo_objective(*selected)
            expected_hidden, expected_weight = torch.autograd.grad(expected, (hidden64, weight64))
            assert (expected_hidden[mask].abs().amax(1) > 1e-8).all()
            for tp, group in groups.items():
                for sequence_parallel in (False, True) if tp > 1 else (False,):
                    what = f"TP {tp}, {dtype}, vocabulary {vocab_size}, sequence parallel {sequence_parallel}"
                    mine = shard(hidden, group) if sequence_parallel else hidden
                    mine = mine.clone().requires_grad_()
                    rows = shard(weight, group).clone().requires_grad_()
                    with Collectives() as forward:
                        logp_N, entropy_N = project_logprobs(
                            mine,
                            rows,
                            targets,
                            mask_T=mask,
                            group=group,
                            vocab_size=vocab_size,
                            temperature=TEMPERATURE,
                            sequence_parallel=sequence_parallel,
                        )
                    assert_close(logp_N, selected[0], tolerance, f"{what}: logp")
                    assert_close(entropy_N, selected[1], tolerance, f"{what}: entropy")
                    loss = drpo_objective(logp_N, entropy_N)
                    with Collectives() as backward:
                        grad_hidden, grad_rows = torch.autograd.grad(loss, (mine, rows))
                    # Gathering the sequence is the only communication besides the log-prob's; backward sums the hidden
                    # gradient once.
                    assert sum(forward.calls.values()) == (tp > 1) + sequence_parallel, f"{what}: {forward.calls}"
                    assert sum(backward.calls.values()) == (tp > 1), f"{what}: {backward.calls}"
                    assert_close(loss, expected, tolerance, f"{what}: loss")
                    target_grad = shard(expected_hidden, group) if sequence_parallel else expected_hidden
                    assert_close(grad_hidden, target_grad, tolerance, f"{what}: hidden gradient")
                    assert_close(grad_rows, shard(expected_weight, group), tolerance, f"{what}: weight gradient")
                    if dtype == torch.float64 and not sequence_parallel:
                        losses[f"{vocab_size}/{tp}"] = loss.item()
    with pytest.raises(ValueError, match="sequence_parallel=True exactly when"):
        project_logprobs(hidden[:6], weight, targets, mask_T=mask, group=None, vocab_size=PADDED)
    return losses


def worker() -> dict[str, float]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks compute on the CPU, also where there is a GPU
    from drpo_megatron.platform import activate

    activate()
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: Groups = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    check_logits_function(groups, block=5 * 16)  # several blocks of rows, the last one smaller
    check_logits_function({2: groups[2]}, block=2**23)
    check_extremes(groups)
    losses = check_head(groups)
    dist.destroy_process_group()
    return losses


@pytest.mark.distributed
def test_sharded_equals_unsharded() -> None:
    results = run_ranks(WORLD, worker)
    assert all(r == pytest.approx(results[0], rel=1e-12) for r in results)
    assert set(results[0]) == {f"{v}/{tp}" for v in VOCAB_SIZES for tp in (1, 2, 4)}
    for v in VOCAB_SIZES:
        assert results[0][f"{v}/2"] == pytest.approx(results[0][f"{v}/1"], rel=1e-12)
        assert results[0][f"{v}/4"] == pytest.approx(results[0][f"{v}/1"], rel=1e-12)
