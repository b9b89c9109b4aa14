"""What tests train with: a configuration of one small step, and a global batch of random sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.training.packing import TrainSequence
from tests.support.tiny_models import VOCAB_SIZE

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
    """Eight unrelated sequences: prompts of 2 to 6 tokens, responses of 1 to 8, log μ far from any log π."""
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


def short_answers(number: int) -> list[TrainSequence]:
    """Of five positions, padded to eight for two context-parallel ranks, the fourth and fifth are sampled: rank 1
    holds both.
    """
    rng = np.random.default_rng(100 + number)
    return [
        TrainSequence(
            # Token 0 is the padding token, to which transformers gives no gradient.
            token_ids_L=rng.integers(3, VOCAB_SIZE, 6).astype(np.int32),
            sampled_L=np.arange(6) >= 4,
            logmu_L=(-rng.uniform(4, 8, 6) * (np.arange(6) >= 4)).astype(np.float32),
            version_L=np.zeros(6, dtype=np.int32),
            advantage=float(rng.normal()),
            weight=1 / 8,
            row=row,
        )
        for row in range(4)
    ]
