"""What recomputation computes again, and what precision the optimizer works in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import run_ranks
from tests.support.parity import Case, Updates, configuration, write_models

pytestmark = pytest.mark.distributed

RECOMPUTE = {
    (model, how): Case(how, model, {}, {"model.recompute": how})
    for model in ("qwen3", "deepseek_v3")
    for how in ("none", "selective", "full")
}
SMALL_LR = 1e-6
BF16 = {
    sharded: Case(
        "bf16", "qwen3", {}, {"model.dtype": "bfloat16", "optimizer.distributed": sharded, "optimizer.lr": SMALL_LR}
    )
    for sharded in (True, False)
}


def calls(root: Path, case: Case, updates: Updates) -> dict[str, int]:
    """Forward calls of the core attention and of the MLPs' output projection in one update, and micro-batches."""
    from megatron.core.transformer.mlp import MLP

    from drpo_megatron.models.attention import SDPACoreAttention
    from drpo_megatron.training.step import Policy

    policy = Policy(configuration(case, root / case.model))
    counts: Counter[str] = Counter()
    for module in policy.modules[0].modules():
        if isinstance(module, (SDPACoreAttention, MLP)):
            name = "attention" if isinstance(module, SDPACoreAttention) else "mlp"
            module.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    policy.update(updates[0], version=0)
    return dict(counts)


def main_weights(root: Path, case: Case, updates: Updates) -> dict[str, Any]:
    """Three bf16 updates that are too small for a bf16 weight to see."""
    import torch

    from drpo_megatron.training.step import Policy

    policy = Policy(configuration(case, root / case.model))
    parameters = list(policy.modules[0].parameters())
    before = [p.detach().clone() for p in parameters]
    mains = [p.main_param.detach().clone() for p in parameters]
    applied = [policy.update(sequences, version=i).applied for i, sequences in enumerate(updates)]
    moved = [float((p.main_param - m).abs().max()) for p, m in zip(parameters, mains, strict=True)]
    large = [p.detach().abs() > 0.1 for p in parameters]
    return {
        "applied": all(applied),
        "parameters": {p.dtype for p in parameters},
        "mains": {m.dtype for m in mains},
        "gradients": {p.main_grad.dtype for p in parameters},
        "least_moved": min(moved),
        # Half a unit in the last place of 0.1 in bf16 is 2e-4.
        "large_weights_stay": all(torch.equal(p[w], b[w]) for p, b, w in zip(parameters, before, large, strict=True)),
        "rounded": all(torch.equal(p.main_param.bfloat16().flatten(), p.flatten()) for p in parameters),
    }


def on_one_rank(root: Path, updates: dict[str, Updates]) -> Any:
    from drpo_megatron.platform import distributed
    from drpo_megatron.platform.layout import ParallelLayout

    distributed.initialize(ParallelLayout(), seed=0)
    counted = {key: calls(root, case, updates[case.model]) for key, case in RECOMPUTE.items()}
    precision = {sharded: main_weights(root, case, updates[case.model]) for sharded, case in BF16.items()}
    distributed.shutdown()
    return counted, precision


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("models")
    return run_ranks(1, on_one_rank, root, write_models(root, ["qwen3", "deepseek_v3"]))[0]


@pytest.mark.parametrize("model", ["qwen3", "deepseek_v3"])
def test_recomputation_runs_again_what_it_says(model: str, report: Any) -> None:
    counted, _ = report
    none, selective, full = (counted[model, how] for how in ("none", "selective", "full"))
    assert none["attention"] % 4 == 0 and none["attention"] > 0  # layers × micro-batches
    assert selective == none | {"attention": 2 * none["attention"]}
    assert full == {name: 2 * count for name, count in none.items()}


@pytest.mark.parametrize("sharded", [True, False])
def test_main_weights_are_float32(sharded: bool, report: Any) -> None:
    """Updates below the resolution of bf16 are kept in the main weights, and weights are those, rounded."""
    import torch

    _, precision = report
    got = precision[sharded]
    assert got["applied"] and got["parameters"] == {torch.bfloat16}
    assert got["mains"] == got["gradients"] == {torch.float32}
    assert 0 < got["least_moved"] <= 3 * SMALL_LR * 1.01
    assert got["large_weights_stay"] and got["rounded"]
