"""One update with shared prefixes equals the same one packed plainly, in every layout, and transformers' in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.training.packing import TrainSequence
from tests.support import references
from tests.support.launch import run_ranks
from tests.support.pool import LIMIT_S
from tests.support.tiny_models import VOCAB_SIZE, write
from tests.support.updates import DELTA, LR, run_config

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
SP = {"tensor": 2, "sequence_parallel": True}
VPP = {"pipeline": 2, "virtual_pipeline": 2}
# family, layout, other settings
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"data": 2}, {}),
    ("llama", VPP, {}),
    ("qwen2", SP, {}),
    ("qwen2", {"pipeline": 2}, {"recompute": "full"}),
    ("qwen3", SP, {"recompute": "full"}),
    ("qwen3", {"tensor": 2}, {"recompute": "selective", "loss": "gspo"}),
    ("qwen3", {"pipeline": 2}, {}),
    ("qwen3_moe", {"data": 2, "expert": 2}, {}),
    ("qwen3_moe", SP, {}),
    ("deepseek_v3", SP, {}),
    ("deepseek_v3", {"pipeline": 2}, {"recompute": "full"}),
]


def grouped_sequences() -> list[TrainSequence]:
    """Groups of four: one with a long response and one with a short prompt, one whose prompt is a single token, one
    with a token that the policy did not sample, and a group in which one sample has another prompt.
    """
    rng = np.random.default_rng(7)
    sequences = []
    for group, (prompt, responses) in enumerate(
        [(23, (5, 9, 60, 1)), (2, (11, 3, 11, 11)), (1, (4, 6, 2, 8)), (31, (7, 7, 7, 7)), (12, (3, 10, 8, 40))]
    ):
        shared = rng.integers(0, VOCAB_SIZE, prompt)
        for sample, response in enumerate(responses):
            own = rng.integers(0, VOCAB_SIZE, prompt) if (group, sample) == (4, 2) else shared
            sampled = np.arange(prompt + response) >= prompt
            if group == 3:
                sampled[prompt + sample] = False
            sequences.append(
                TrainSequence(
                    token_ids_L=np.concatenate([own, rng.integers(0, VOCAB_SIZE, response)]).astype(np.int32),
                    sampled_L=sampled,
                    logmu_L=(-rng.uniform(4, 8, prompt + response) * sampled).astype(np.float32),
                    version_L=np.zeros(prompt + response, dtype=np.int32),
                    advantage=float(rng.normal()),
                    weight=1 / (20 * response),
                    prompt_length=prompt,
                )
            )
    return sequences


def copies(layout: ParallelLayout, parameter: torch.nn.Parameter) -> int:
    """Ranks that hold the same part of a parameter. Where there are several, each has the whole gradient of its own
    shard only.
    """
    if getattr(parameter, "allreduce", True):
        return layout.data
    return layout.tensor * layout.data // (layout.expert * layout.expert_tensor)


def updates_on_ranks(directory: str, sequences: list[TrainSequence]) -> list[list[Any]]:
    """[case][mode] → what one update computed and left behind on this rank."""
    import torch.distributed as dist

    from drpo_megatron.algorithms import TokenStats, summarize
    from drpo_megatron.config.schema import RunConfig
    from drpo_megatron.platform import distributed

    reports = []
    for index, (family, parallel, settings) in enumerate(CASES):
        base = run_config(Path(directory) / family, parallel, tokens_per_micro_batch=128).model_dump()
        base["model"]["recompute"] = settings.get("recompute", "none")
        # Routers choose their experts, as transformers' do.
        base["model"]["routing_replay"] = False if family in ("qwen3_moe", "deepseek_v3") else None
        if "loss" in settings:
            base["algorithm"] |= {"loss": settings["loss"], "loss_args": {}}
        of_case = []
        for mode in ("never", "always"):
            base["training"]["shared_prefix"] = mode
            config = RunConfig.model_validate(base)
            change = distributed.initialize if (index, mode) == (0, "never") else distributed.change_layout
            change(config.layout, timeout_s=LIMIT_S, seed=0)
            from drpo_megatron.training.step import Policy
            from drpo_megatron.weights.exporter import iter_hf_tensors

            policy = Policy(config)
            result = policy.update(sequences, version=3)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, result.stats)
            stats = TokenStats.cat([s for s in everyone if s is not None])
            # log μ is another one for every token: it tells which token is which.
            order = stats.logmu_N.argsort()
            of_case.append(
                {
                    "logmu": stats.logmu_N[order].numpy(),
                    "logp": stats.logp_N[order].numpy(),
                    "loss": summarize(stats, DELTA)["loss/mean"],
                    "grad_norm": result.grad_norm,
                    "flops": result.flops,
                    "saved": result.tokens_saved_frac,
                    "gradients": {
                        f"{chunk}.{name}": parameter.main_grad.numpy().copy()
                        for chunk, module in enumerate(policy.modules)
                        for name, parameter in module.named_parameters()
                        if copies(config.layout, parameter) == 1
                    },
                    "after": {n: t.numpy().copy() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b},
                }
            )
        reports.append(of_case)
    distributed.shutdown()
    return reports


def test_update_with_shared_prefixes_equals_the_plain_one(tmp_path: Path) -> None:
    sequences = grouped_sequences()
    for family in {family for family, _, _ in CASES}:
        write(family, tmp_path / family)
    reports = run_ranks(2, updates_on_ranks, str(tmp_path), sequences)
    expected_of = {family: references.train(tmp_path / family, [sequences]) for family in ("llama", "qwen2", "qwen3")}
    for rank, of_rank in enumerate(reports):
        for (family, parallel, settings), (plain, shared) in zip(CASES, of_rank, strict=True):
            case = (rank, family, parallel, settings)
            assert np.array_equal(plain["logmu"], shared["logmu"]), case
            assert np.abs(plain["logp"] - shared["logp"]).max() < TOLERANCE, case
            assert shared["loss"] == pytest.approx(plain["loss"], abs=TOLERANCE), case
            assert shared["grad_norm"] == pytest.approx(plain["grad_norm"], rel=TOLERANCE), case
            assert plain["saved"] == 0 and 0.1 < shared["saved"] < 0.5, case
            assert shared["flops"] < 0.8 * plain["flops"], case
            for name, gradient in plain["gradients"].items():
                difference = np.abs(shared["gradients"][name] - gradient).max()
                assert difference < TOLERANCE * plain["grad_norm"], (*case, name)
            for name, weight in plain["after"].items():
                assert np.abs(shared["after"][name] - weight).max() < TOLERANCE, (*case, name)
            if rank == 0 and family in expected_of and "loss" not in settings:
                expected = expected_of[family]
                assert shared["loss"] == pytest.approx(expected.losses[0], abs=TOLERANCE), case
                assert shared["grad_norm"] == pytest.approx(expected.grad_norms[0], rel=1e-4), case
                for name, weight in expected.weights.items():
                    difference = (torch.from_numpy(shared["after"][name]) - weight).abs().max()
                    assert float(difference) < 1e-3 * LR, (*case, name)
