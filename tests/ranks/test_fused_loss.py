"""The fused operation at TP 1, 2 and 4 against unsharded torch.log_softmax in float64 and against the dense path.

One launch of four gloo ranks runs every check; a rank that is wrong raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from drpo_megatron.algorithms import make_loss
from tests.ranks.test_vocab_parallel import (
    PADDED,
    TEMPERATURE,
    VOCAB_SIZES,
    Collectives,
    Groups,
    T,
    assert_close,
    drpo_objective,
    full_problem,
    shard,
    unsharded,
)
from tests.support.launch import run_ranks
from tests.support.tiny_models import write

WORLD = 4
CHUNK = 5  # tokens
ENTROPY_COEFFICIENT, DELTA = 0.1, 0.05  # of drpo_objective
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


class Problem:
    """One case on this rank: its shards, and what unsharded autograd in float64 says about them."""

    def __init__(self, vocab_size: int, dtype: torch.dtype, group: Any, sequence_parallel: bool) -> None:
        hidden, weight, self.targets, self.mask = full_problem(vocab_size, dtype)
        hidden64, weight64 = hidden.double().clone().requires_grad_(), weight.double().clone().requires_grad_()
        self.logp, self.entropy = unsharded(hidden64[self.mask] @ weight64.T, self.targets[self.mask], vocab_size)
        self.loss = drpo_objective(self.logp, self.entropy)
        grad_hidden, grad_weight = torch.autograd.grad(self.loss, (hidden64, weight64))
        self.grad_hidden = shard(grad_hidden, group) if sequence_parallel else grad_hidden
        self.grad_weight = shard(grad_weight, group)
        self.hidden = shard(hidden, group) if sequence_parallel else hidden
        self.weight = shard(weight, group)
        steps = torch.arange(int(self.mask.sum()))
        self.logmu = self._spread((self.logp.detach() + 0.8 * torch.sin(3.0 * steps)).clamp(max=-1e-3))
        self.advantages = self._spread(torch.cos(2.0 * steps).double())
        in_flight = 1 if group is None else 2
        self.options: dict[str, Any] = {
            "mask_T": self.mask,
            "group": group,
            "vocab_size": vocab_size,
            "temperature": TEMPERATURE,
            "sequence_parallel": sequence_parallel,
            "memory_budget": in_flight * CHUNK * len(self.weight) * hidden.element_size(),
        }

    def _spread(self, values_N: Tensor) -> Tensor:
        """[N] to [T]; what is masked out must not matter."""
        return torch.full((T,), torch.nan, dtype=torch.float64).masked_scatter(self.mask, values_N)

    @property
    def num_chunks(self) -> int:
        return -(-int(self.mask.sum()) // CHUNK)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()

    def fused(self, hidden: Tensor, weight: Tensor, **options: Any) -> Any:
        from drpo_megatron.vocab_parallel import fused_policy_loss

        weights = torch.full((T,), 1 / int(self.mask.sum()), dtype=torch.float64)
        return fused_policy_loss(
            hidden,
            weight,
            self.targets,
            loss_function=make_loss("drpo", {"delta": DELTA}),
            logmu_T=self.logmu,
            advantages_T=self.advantages,
            weights_T=weights,
            **({"entropy_coefficient": ENTROPY_COEFFICIENT} | self.options | options),
        )


def check_layout(group: Any, vocab_size: int, dtype: torch.dtype, sequence_parallel: bool) -> None:
    """Values, both gradients and the number of collectives, in both modes."""
    from drpo_megatron.vocab_parallel import fused_logprobs, project_logprobs

    tp = 1 if group is None else group.size()
    p, tolerance = Problem(vocab_size, dtype, group, sequence_parallel), TOLERANCES[dtype]
    what = f"TP {tp}, {dtype}, vocabulary {vocab_size}, sequence parallel {sequence_parallel}"

    def same(name: str, actual: Tensor, expected: Tensor) -> None:
        scale = 1.0 if actual.numel() == 0 or dtype != torch.bfloat16 else float(1 + expected.abs().max())
        assert_close(actual / scale, expected.detach() / scale, tolerance, f"{what}: {name}")

    hidden, weight = p.leaves()
    with Collectives() as forward:
        result = p.fused(hidden, weight)
    with Collectives() as backward:
        result.loss.backward()
    assert sum(forward.calls.values()) == (p.num_chunks if tp > 1 else 0) + sequence_parallel, (
        f"{what}: {forward.calls}"
    )
    assert sum(backward.calls.values()) == (tp > 1), f"{what}: {backward.calls}"
    assert hidden.grad is not None and weight.grad is not None
    for name, actual, expected in (
        ("loss", result.loss, p.loss),
        ("logp", result.logp_N, p.logp),
        ("entropy", result.entropy_N, p.entropy),
        ("hidden gradient", hidden.grad, p.grad_hidden),
        ("weight gradient", weight.grad, p.grad_weight),
    ):
        same(name, actual, expected)
    again_hidden, again_weight = p.leaves()
    p.fused(again_hidden, again_weight).loss.backward()
    assert torch.equal(again_hidden.grad, hidden.grad) and torch.equal(again_weight.grad, weight.grad), what

    # A main_grad that already holds something gets the gradient added, and autograd only a placeholder.
    accumulating = torch.nn.Parameter(p.weight.clone())
    accumulating.main_grad = torch.ones_like(
        p.weight, dtype=weight.grad.dtype if dtype == torch.float64 else torch.float32
    )  # type: ignore[attr-defined]
    p.fused(p.hidden.clone().requires_grad_(), accumulating).loss.backward()
    same("main_grad", accumulating.main_grad - 1, p.grad_weight)  # type: ignore[attr-defined]

    recomputed, dense = p.leaves(), p.leaves()
    options = {k: v for k, v in p.options.items() if k != "memory_budget"}
    for name, leaves, (logp, entropy) in (
        ("recomputed", recomputed, fused_logprobs(*recomputed, p.targets, **p.options)),
        ("dense", dense, project_logprobs(*dense, p.targets, **options)),
    ):
        same(f"{name} logp", logp, p.logp)
        same(f"{name} entropy", entropy, p.entropy)
        # μ from the exact log-prob: rounding must not move the point where the gradient is taken
        n = len(logp)
        surrogate = torch.autograd.grad(drpo_objective(p.logp, p.entropy), (p.logp, p.entropy), retain_graph=True)
        torch.autograd.backward((logp, entropy), [g.to(logp.dtype) for g in surrogate])
        assert n == int(p.mask.sum()) and leaves[0].grad is not None and leaves[1].grad is not None
        same(f"{name} hidden gradient", leaves[0].grad, p.grad_hidden)
        same(f"{name} weight gradient", leaves[1].grad, p.grad_weight)


def check_nothing_to_train(groups: Groups) -> None:
    for tp, group in groups.items():
        p = Problem(50, torch.float32, group, False)
        hidden, weight = p.leaves()
        none = torch.zeros(T, dtype=torch.bool)
        result = p.fused(hidden, weight, mask_T=none)
        result.loss.backward()
        assert result.loss == 0 and len(result.logp_N) == 0, f"TP {tp}"
        assert (hidden.grad == 0).all() and (weight.grad == 0).all(), f"TP {tp}"


def check_not_finite(groups: Groups) -> None:
    """Every rank of the group reports the token; a NaN in one rank's weight reaches the others too."""
    p = Problem(64, torch.float32, groups[4], False)
    token = int(p.mask.nonzero()[7])
    hidden = p.hidden.clone()
    hidden[token, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"rank {dist.get_rank()}, token {token} .*hidden state"):
        p.fused(hidden.requires_grad_(), p.weight)
    weight = p.weight.clone()
    if dist.get_rank() == 2:
        weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="output weight"):
        p.fused(p.hidden.clone().requires_grad_(), weight)


def check_sparse(groups: Groups) -> None:
    """Each rank leaves out columns of its own shard; the sum of the ranks' bounds holds for the summed gradient."""
    g = torch.Generator().manual_seed(1)
    tokens, hidden_size, columns, likely = 256, 32, 2048, 300
    weight = torch.randn(columns, hidden_size, generator=g)
    weight[likely:, 0] = -9
    targets = torch.randint(0, likely, (tokens,), generator=g)
    hidden = 0.3 * weight[targets] + 0.3 * torch.randn(tokens, hidden_size, generator=g)
    hidden[:, 0] = 1
    from drpo_megatron.vocab_parallel import fused_policy_loss

    group, gradients, tolerance = groups[4], [], 0.05
    mine = shard(weight, group)
    for tail_tolerance in (0.0, tolerance):
        leaves = hidden.clone().requires_grad_(), mine.clone().requires_grad_()
        result = fused_policy_loss(
            *leaves,
            targets,
            loss_function=make_loss("pg", {}),
            logmu_T=torch.full((tokens,), -1.0),
            advantages_T=torch.cos(torch.arange(tokens) * 2.0),
            weights_T=torch.full((tokens,), 1 / tokens),
            mask_T=torch.ones(tokens, dtype=torch.bool),
            group=group,
            vocab_size=columns,
            memory_budget=2 * 64 * len(mine) * 4,
            tail_tolerance=tail_tolerance,
        )
        result.loss.backward()
        gradients.append([t.grad for t in leaves])
    bounds = torch.tensor([result.tail.hidden_bound, result.tail.weight_bound, result.tail.kept_share])
    everyone = [torch.empty(3) for _ in range(WORLD)]
    dist.all_gather(everyone, bounds)
    (exact_hidden, exact_weight), (sparse_hidden, sparse_weight) = gradients
    assert (sparse_hidden - exact_hidden).norm() <= sum(b[0] for b in everyone) + 1e-6
    assert (sparse_weight - exact_weight).norm() <= result.tail.weight_bound + 1e-6
    assert result.tail.bound <= tolerance and min(float(b[2]) for b in everyone) < 0.5, everyone


def check_context_parallel(tensor: Any, context: Any) -> None:
    """TP 2 × CP 2: each context rank has its own tokens, and the sum of their weight gradients is the whole one."""
    p = Problem(64, torch.float64, tensor, False)
    mine = slice(T // 2 * context.rank(), T // 2 * (context.rank() + 1))
    hidden, weight = p.hidden[mine].clone().requires_grad_(), p.weight.clone().requires_grad_()
    from drpo_megatron.vocab_parallel import fused_policy_loss

    result = fused_policy_loss(
        hidden,
        weight,
        p.targets[mine],
        loss_function=make_loss("drpo", {"delta": DELTA}),
        logmu_T=p.logmu[mine],
        advantages_T=p.advantages[mine],
        weights_T=torch.full((T // 2,), 1 / int(p.mask.sum()), dtype=torch.float64),
        entropy_coefficient=ENTROPY_COEFFICIENT,
        **(p.options | {"mask_T": p.mask[mine]}),
    )
    result.loss.backward()
    loss = result.loss.detach().clone()
    for partial in (loss, weight.grad):
        dist.all_reduce(partial, group=context)
    assert_close(loss, p.loss.detach(), 1e-12, "CP 2: loss")
    assert_close(weight.grad, p.grad_weight, 1e-12, "CP 2: weight gradient")
    assert_close(hidden.grad, p.grad_hidden[mine], 1e-12, "CP 2: hidden gradient")


def worker() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks compute on the CPU, also where there is a GPU
    from drpo_megatron.platform import activate

    activate()
    dist.init_process_group("gloo")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups: Groups = {1: None, 2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    assert PADDED % WORLD == 0
    for dtype in TOLERANCES:
        for vocab_size in VOCAB_SIZES:
            for tp, group in groups.items():
                for sequence_parallel in (False, True) if tp > 1 else (False,):
                    check_layout(group, vocab_size, dtype, sequence_parallel)
    check_nothing_to_train(groups)
    check_not_finite(groups)
    check_sparse(groups)
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    check_context_parallel(groups[2], across[dist.get_rank() % 2])
    dist.destroy_process_group()


@pytest.mark.distributed
def test_sharded_fused_loss_equals_unsharded() -> None:
    run_ranks(WORLD, worker)


def train_once(model_path: str, parallels: list[dict[str, Any]], cases: list[dict[str, Any]]) -> list[list[Any]]:
    """[layout][case]: tail bound, gradient norm and exported weights after one update through the whole trainer."""
    from drpo_megatron.platform import distributed
    from tests.support.updates import make_sequences, run_config

    results: list[list[Any]] = []
    for index, parallel in enumerate(parallels):
        layout = run_config(Path(model_path), parallel).layout
        change = distributed.initialize if index == 0 else distributed.change_layout
        change(layout, seed=0)
        from drpo_megatron.training.step import Policy
        from drpo_megatron.weights.exporter import iter_hf_tensors

        results.append([])
        for algorithm in cases:
            config = run_config(Path(model_path), parallel)
            changed = config.algorithm.model_validate(config.algorithm.model_dump() | algorithm)
            policy = Policy(config.model_copy(update={"algorithm": changed}))
            update = policy.update(make_sequences(policy.hf.vocab_size), version=0)
            weights = {n: t.clone() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}
            results[-1].append((update.tail_bound, update.grad_norm, weights))
    distributed.shutdown()
    return results


@pytest.mark.distributed
def test_trainer_backends_agree(tmp_path: Path) -> None:
    """Fused and dense give one update: token-level and sequence-level losses, an entropy bonus, tied embeddings on one
    stage and on two. The sparse backward differs by no more than it reports.
    """
    path = tmp_path / "qwen2"
    write("qwen2", path)
    losses: list[dict[str, Any]] = [
        {"loss": "drpo", "loss_args": {"delta": 0.3}, "entropy_coefficient": 0.01},
        {"loss": "gspo", "loss_args": {}, "aggregation": "seq_mean_token_mean"},
    ]
    projections: list[dict[str, Any]] = [
        {"backend": "dense"},
        {"backend": "fused", "memory_budget_mb": 1},
        {"backend": "fused", "tail_tolerance": 0.3},
    ]
    cases = [loss | {"projection": projection} for loss in losses for projection in projections]
    parallels = [{"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}]
    by_layout = run_ranks(2, train_once, str(path), parallels, cases)[0]
    for parallel, results in zip(parallels, by_layout, strict=True):
        for first in (0, 3):
            dense, fused, sparse = results[first : first + 3]
            what = (parallel, cases[first]["loss"])
            assert fused[0] == 0 and fused[1] == pytest.approx(dense[1], rel=1e-4) and dense[1] > 0, what
            for name, weight in dense[2].items():
                assert (fused[2][name] - weight).abs().max() < 1e-5, (*what, name)
            assert sparse[0] <= 0.3 and sparse[1] == pytest.approx(dense[1], rel=0.3), what
