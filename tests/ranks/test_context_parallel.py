"""Context parallelism equals the unsharded computation: the core attention, and whole updates against transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.training.packing import TrainSequence
from tests.ranks.test_train_step import DELTA, LR, drpo, make_sequences, reference_update, run_config
from tests.support.launch import run_ranks
from tests.support.tiny_models import VOCAB_SIZE, write

pytestmark = pytest.mark.distributed

# With these limits the ratio of some sequences is clipped and that of others is not.
GSPO = {"loss": "gspo", "loss_args": {"eps_low": 0.5, "eps_high": 1.0}}
SP = {"tensor": 2, "sequence_parallel": True}


@dataclass(frozen=True)
class Case:
    """One update of a family's tiny model. `sequences` names an entry of SEQUENCES."""

    family: str
    parallel: dict[str, Any]
    algorithm: dict[str, Any] = field(default_factory=dict)
    sequences: str = "mixed"
    recompute: str = "none"

    def config(self, root: Path) -> RunConfig:
        plain = run_config(root / self.family, self.parallel).model_dump()
        plain["model"]["recompute"] = self.recompute
        # Routers choose their experts, as transformers' do.
        plain["model"]["routing_replay"] = False if self.family in ("qwen3_moe", "deepseek_v3") else None
        return RunConfig.model_validate(plain | {"algorithm": plain["algorithm"] | self.algorithm})


TWO_RANKS = [
    Case("llama", {"context": 2}),
    Case("qwen3", {"context": 2}),
    Case("qwen3", {"context": 2}, recompute="full"),
    Case("qwen3", {"context": 2}, recompute="selective"),
    Case("qwen3", {"context": 2}, {"projection": {"backend": "dense"}}),
    Case("qwen3", {"context": 2}, GSPO),
    Case("qwen3", {"context": 2}, GSPO | {"projection": {"backend": "dense"}}),
    Case("qwen3", {"context": 2}, sequences="on one rank"),
    Case("qwen3", {"context": 2}, GSPO, sequences="on one rank"),
    Case("qwen3_moe", {"context": 2}),
    Case("qwen3_moe", {"context": 2, "expert": 2}),
    Case("deepseek_v3", {"context": 2}),
    Case("deepseek_v3", {"context": 2, "expert": 2, "moe_dispatcher": "allgather"}),
]
FOUR_RANKS = [
    Case("qwen3", {"context": 2, **SP}),
    Case("qwen3", {"context": 2, "tensor": 2}),
    Case("llama", {"context": 2, "pipeline": 2}),
    Case("qwen3", {"context": 2, "data": 2}),
    Case("qwen3", {"context": 4}),
    Case("qwen3", {"context": 2, "pipeline": 2}, GSPO),
    Case("qwen3", {"context": 2, "data": 2}, GSPO),
    Case("deepseek_v3", {"context": 2, **SP, "expert": 4}),
]


def short_answers() -> list[TrainSequence]:
    """Of five positions, padded to eight for two ranks, the fourth and fifth are sampled: rank 1 holds both."""
    rng = np.random.default_rng(5)
    return [
        TrainSequence(
            # Token 0 is the padding token, to which transformers gives no gradient.
            token_ids_L=rng.integers(1, VOCAB_SIZE, 6).astype(np.int32),
            sampled_L=np.arange(6) >= 4,
            logmu_L=(-rng.uniform(4, 8, 6) * (np.arange(6) >= 4)).astype(np.float32),
            version_L=np.zeros(6, dtype=np.int32),
            advantage=float(rng.normal()),
            weight=1 / 8,
        )
        for _ in range(4)
    ]


SEQUENCES = {"mixed": make_sequences(VOCAB_SIZE), "on one rank": short_answers()}


def gspo(logp_N: torch.Tensor, logmu_N: torch.Tensor, advantage: float) -> torch.Tensor:
    s = (logp_N - logmu_N).mean().exp()
    loss = -torch.minimum(advantage * s, advantage * s.clamp(1 - 0.5, 1 + 1.0))
    return loss.expand(len(logp_N))


def updates_on_ranks(root: str, cases: list[Case]) -> list[dict[str, Any]]:
    """What each case's update leaves: its metrics over all ranks, and the weights on rank 0."""
    import torch.distributed as dist

    from drpo_megatron.algorithms import TokenStats, summarize
    from drpo_megatron.platform import distributed

    reports = []
    for index, case in enumerate(cases):
        config = case.config(Path(root))
        if index == 0:
            distributed.initialize(config.layout, timeout_s=60, seed=0)
        else:
            distributed.change_layout(config.layout, timeout_s=60, seed=0)
        from drpo_megatron.training.step import Policy
        from drpo_megatron.weights.exporter import iter_hf_tensors

        policy = Policy(config)
        result = policy.update(SEQUENCES[case.sequences], version=3)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, result.stats)
        with_stats = [s for s in everyone if s is not None]
        reports.append(
            {
                "tokens": [s.logp_N.numel() for s in with_stats],
                "metrics": summarize(TokenStats.cat(with_stats), DELTA),
                "grad_norm": result.grad_norm,
                "after": {n: t.numpy().copy() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b},
            }
        )
    distributed.shutdown()
    return reports


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in {case.family for case in TWO_RANKS + FOUR_RANKS}:
        write(family, root / family)
    return root


@pytest.mark.parametrize("cases", [TWO_RANKS, FOUR_RANKS], ids=["2 ranks", "4 ranks"])
def test_update_equals_the_unsharded_one(models: Path, cases: list[Case]) -> None:
    world = cases[0].config(models).layout.world_size
    reports = run_ranks(world, updates_on_ranks, str(models), cases, timeout_s=400)[0]
    references: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for case, report in zip(cases, reports, strict=True):
        sequence_level = case.algorithm.get("loss") == "gspo"
        key = (case.family, case.sequences, sequence_level)
        if key not in references:
            loss = gspo if sequence_level else drpo
            references[key] = reference_update(models / case.family, SEQUENCES[case.sequences], loss)
        expected = references[key]
        trained = sum(int(s.sampled_L.sum()) for s in SEQUENCES[case.sequences])
        layout = case.config(models).layout
        # Tensor rank 0 of the last stage has them, for each data and context parallel rank its own.
        assert len(report["tokens"]) == layout.data * layout.context, case
        assert sum(report["tokens"]) == trained, case
        if case.sequences == "on one rank":
            assert report["tokens"] == [0, trained]
        # Relative: the sum is of a few tokens with large ratios, computed in float32.
        assert report["metrics"]["loss/mean"] == pytest.approx(expected["loss"], rel=5e-6, abs=1e-6), case
        assert report["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), case
        assert expected["weights"].keys() <= report["after"].keys(), case
        for name, weight in expected["weights"].items():
            difference = (torch.from_numpy(report["after"][name]) - weight).abs().max()
            assert float(difference) < 1e-3 * LR, (case, name)


BOUNDS = [0, 16, 16, 24, 40]  # one sequence is empty
HEADS, GROUPS, KEY_DIM, VALUE_DIM = 6, 2, 8, 5


def attention_tensors() -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, float64, of the whole pack."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, KEY_DIM), (GROUPS, KEY_DIM), (GROUPS, VALUE_DIM), (HEADS * VALUE_DIM,))
    return [torch.randn(BOUNDS[-1], *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attention_on_ranks() -> tuple[np.ndarray, list[np.ndarray]]:
    """Where this rank's tokens are in the pack; the output and the gradients of query, key and value there."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from drpo_megatron.models.context_attention import context_attention, context_positions
    from drpo_megatron.platform import distributed
    from drpo_megatron.platform.layout import ParallelLayout

    distributed.initialize(ParallelLayout(context=4), timeout_s=60)
    mine = context_positions(BOUNDS, dist.get_rank(), 4)
    query, key, value, gradient = (t[mine] for t in attention_tensors())
    leaves = [t.requires_grad_() for t in (query, key, value)]
    group = parallel_state.get_context_parallel_group()
    output = context_attention(*leaves, BOUNDS, group=group, softmax_scale=0.3)
    output.backward(gradient)
    with pytest.raises(ValueError, match="cu_seqlens ends at 24, and 4 context-parallel ranks hold 10 tokens each"):
        context_attention(*leaves, BOUNDS[:-1], group=group, softmax_scale=0.3)
    distributed.shutdown()
    return mine.numpy(), [t.detach().numpy() for t in (output, *(leaf.grad for leaf in leaves))]


def test_core_attention_equals_attention_over_whole_sequences() -> None:
    """Grouped queries, values narrower than keys; forward and all three gradients to float64's rounding."""
    query, key, value, gradient = attention_tensors()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    pieces = []
    for start, end in ((0, 16), (16, 24), (24, 40)):
        q, k, v = (t[start:end].transpose(0, 1) for t in leaves)
        k, v = (t.repeat_interleave(HEADS // GROUPS, dim=0) for t in (k, v))
        pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(0, 1))
    output = torch.cat(pieces).flatten(1)
    output.backward(gradient)
    expected = [t.detach().numpy() for t in (output, *(leaf.grad for leaf in leaves))]
    ranks = run_ranks(4, attention_on_ranks)
    assert sorted(np.concatenate([mine for mine, _ in ranks]).tolist()) == list(range(BOUNDS[-1]))
    for mine, actual in ranks:
        for ours, whole in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, whole[mine], rtol=0, atol=1e-12)
