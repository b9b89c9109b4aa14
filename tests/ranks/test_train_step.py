"""One DRPO update, on several layouts, against a plain torch + transformers update of the same sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.training.packing import TrainSequence
from tests.support.launch import run_ranks
from tests.support.tiny_models import VOCAB_SIZE, write

pytestmark = pytest.mark.distributed

TEMPERATURE, DELTA, LR, CLIP = 0.7, 0.3, 1e-2, 0.5
# Adam's first step is lr·g/(|g| + eps): with the usual tiny eps it is the sign of the gradient, and rounding in a
# gradient that is 0 in exact arithmetic (the key bias) would decide it. This eps keeps the step proportional to small
# gradients.
EPS = 1e-3


def run_config(model: Path, parallel: dict[str, Any], **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "step",
            "model": {"path": model, "dtype": "float32"},
            "data": {"source": {"type": "jsonl", "path": "unused.jsonl"}},
            "reward": {"type": "math_verify"},
            "rollout": {
                "prompts_per_step": 4,
                "samples_per_prompt": 2,
                "sampling": {"max_new_tokens": 8, "temperature": TEMPERATURE},
            },
            "algorithm": {"loss": "drpo", "loss_args": {"delta": DELTA}},
            "parallel": parallel,
            "optimizer": {"lr": LR, "clip_grad": CLIP, "eps": EPS},
            "training": {"steps": 1, "tokens_per_micro_batch": 32, "max_skipped_updates": 2, **training},
        }
    )


def make_sequences(vocab_size: int) -> list[TrainSequence]:
    rng = np.random.default_rng(3)
    sequences = []
    for _ in range(8):
        prompt, response = int(rng.integers(2, 7)), int(rng.integers(1, 9))
        length = prompt + response
        sampled = np.arange(length) >= prompt
        sequences.append(
            TrainSequence(
                token_ids_L=rng.integers(0, vocab_size, length).astype(np.int32),
                sampled_L=sampled,
                logmu_L=(-rng.uniform(4, 8, length) * sampled).astype(np.float32),
                version_L=np.zeros(length, dtype=np.int32),
                advantage=float(rng.normal()),
                weight=1 / (8 * response),
            )
        )
    return sequences


def drpo(logp_N: torch.Tensor, logmu_N: torch.Tensor, advantage: float) -> torch.Tensor:
    r_N = (logp_N - logmu_N).exp()
    return -advantage * r_N + abs(advantage) * logmu_N.exp() * (r_N - 1) ** 2 / (2 * DELTA)


def reference_update(
    model_path: Path, sequences: list[TrainSequence], loss: Callable[..., Any] = drpo
) -> dict[str, Any]:
    """The same update in float64 by transformers' forward, one sequence at a time, autograd and torch's AdamW.

    loss: (log π, log μ, advantage) of a sequence's sampled tokens to their losses. Weights have the names in the files.
    """
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64, experts_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, eps=EPS)
    total = torch.zeros((), dtype=torch.float64)
    for s in sequences:
        tokens_L = torch.from_numpy(s.token_ids_L.astype(np.int64))
        logp_LV = torch.log_softmax(model(tokens_L[None, :-1]).logits[0] / TEMPERATURE, -1)
        logp_L = logp_LV.gather(1, tokens_L[1:, None])[:, 0]
        mask_L, logmu_L = torch.from_numpy(s.sampled_L[1:]), torch.from_numpy(s.logmu_L[1:])
        total = total + s.weight * loss(logp_L[mask_L], logmu_L[mask_L], s.advantage).sum()
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    weights = revert_weight_conversion(model, {n: p.detach().clone() for n, p in model.named_parameters()})
    return {"loss": float(total.detach()), "grad_norm": float(norm), "weights": weights}


def update_on_ranks(model_path: str, parallels: list[dict[str, Any]], sequences: list[TrainSequence]) -> list[Any]:
    """For each layout: the update's loss, gradient norm, and the weights after it; then a poisoned update."""
    import torch.distributed as dist

    from drpo_megatron.algorithms import TokenStats, summarize
    from drpo_megatron.platform import distributed

    reports = []
    for index, parallel in enumerate(parallels):
        config = run_config(Path(model_path), parallel)
        if index == 0:
            distributed.initialize(config.layout, timeout_s=60, seed=0)
        else:
            distributed.change_layout(config.layout, timeout_s=60, seed=0)
        from drpo_megatron.training.step import Policy
        from drpo_megatron.weights.exporter import iter_hf_tensors

        policy = Policy(config)
        result = policy.update(sequences, version=3)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, result.stats)
        stats = TokenStats.cat([s for s in everyone if s is not None])
        after = {n: t.clone() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}

        poisoned = [*sequences[:-1], TrainSequence(**{**vars(sequences[-1]), "advantage": float("nan")})]
        skipped = policy.update(poisoned, version=3)
        unchanged = {n: t.clone() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}
        stopped = ""
        try:
            policy.update(poisoned, version=3)
        except FloatingPointError as error:
            stopped = str(error)
        reports.append(
            {
                "metrics": summarize(stats, DELTA),
                "tokens": stats.logp_N.numel(),
                "grad_norm": result.grad_norm,
                "after": after,
                "skipped": not skipped.applied and all(torch.equal(after[n], unchanged[n]) for n in after),
                "stopped": stopped,
            }
        )
    distributed.shutdown()
    return reports


@pytest.mark.parametrize(
    ("family", "world", "parallels"),
    [
        # tied embeddings: two gradients for one weight, on two stages
        ("qwen2", 2, [{"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"data": 2}]),
        ("qwen2", 4, [{"tensor": 2, "pipeline": 2, "sequence_parallel": True}, {"tensor": 2, "data": 2}]),
        # norms on heads: replicated weights whose gradients are partial on each tensor-parallel rank
        ("qwen3", 2, [{"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}]),
        ("llama", 4, [{"pipeline": 2, "data": 2}]),
    ],
    ids=["qwen2-two-ranks", "qwen2-four-ranks", "qwen3-two-ranks", "llama-four-ranks"],
)
def test_update_equals_the_unsharded_one(
    tmp_path: Path, family: str, world: int, parallels: list[dict[str, Any]]
) -> None:
    path = tmp_path / family
    write(family, path)
    sequences = make_sequences(VOCAB_SIZE)
    expected = reference_update(path, sequences)
    tokens = sum(int(s.sampled_L.sum()) for s in sequences)
    reports = run_ranks(world, update_on_ranks, str(path), parallels, sequences)
    for parallel, report in zip(parallels, reports[0], strict=True):
        assert report["tokens"] == tokens, parallel
        assert report["metrics"]["loss/mean"] == pytest.approx(expected["loss"], abs=1e-5), parallel
        assert report["metrics"]["staleness/max"] == 3
        assert report["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), parallel
        assert report["after"].keys() == expected["weights"].keys(), parallel
        for name, weight in expected["weights"].items():
            difference = (report["after"][name] - weight).abs().max()
            assert float(difference) < 1e-3 * LR, (parallel, name)
        assert report["skipped"], parallel
        assert "2 updates in a row" in report["stopped"], parallel
