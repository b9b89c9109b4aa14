"""What shared prefixes save: the train step of the SmolLM2 recipe, with them and packed plainly.

Sequences have the recipe's shape (prompts of 46 tokens, responses of up to 12, 8 × 8 samples, two updates), the weights
are the real ones. Both ways alternate in one process of one thread and one rank, once with float32 parameters and once
with bfloat16. A sample of a speed-up is the quotient of two neighbours in time. Seconds are those that the process
computed, so that its neighbours on the machine do not count.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from drpo_megatron.bench.report import Figure, run_worker

if TYPE_CHECKING:
    from drpo_megatron.training.packing import TrainSequence

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2-arithmetic.yaml"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PROMPT, RESPONSES = 46, (10, 12)
REPETITIONS = 5


def measure() -> dict[str, Figure]:
    """Raises CalledProcessError when a worker fails; its message is on stderr."""
    from drpo_megatron.models.recipes import ensure_model

    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = ensure_model("smollm2_135m", Path(directory) / "smollm2-135m")
        for name, dtype in DTYPES.items():
            figures |= figures_of(name, run_worker("drpo_megatron.bench.prefix", model, dtype, REPETITIONS))
    return figures


def figures_of(name: str, samples: dict[str, list[float]]) -> dict[str, Figure]:
    """From one worker's result: the ratio of tokens, the speed-up, and the speed-up as a share of that ratio."""
    (tokens,) = samples["tokens"]
    speedups = [plain / shared for plain, shared in zip(samples["never"], samples["always"], strict=True)]
    return {
        "shared_prefix_tokens_ratio": Figure.of([tokens]),
        f"shared_prefix_speedup_{name}": Figure.of(speedups),
        f"shared_prefix_speedup_over_tokens_{name}": Figure.of([s / tokens for s in speedups], ">= 0.8"),
    }


def synthetic_updates(count: int, groups: int, samples: int, vocabulary: int) -> list[list[TrainSequence]]:
    """`count` updates of `groups` × `samples` random sequences of the recipe's shape."""
    import numpy as np

    from drpo_megatron.training.packing import TrainSequence

    rng = np.random.default_rng(0)
    updates = []
    for _ in range(count):
        sequences = []
        for _ in range(groups):
            prompt = rng.integers(0, vocabulary, PROMPT)
            for response in rng.integers(RESPONSES[0], RESPONSES[1] + 1, samples).tolist():
                length = PROMPT + response
                sequences.append(
                    TrainSequence(
                        token_ids_L=np.concatenate([prompt, rng.integers(0, vocabulary, response)]).astype(np.int32),
                        sampled_L=np.arange(length) >= PROMPT,
                        logmu_L=np.full(length, -10.0, dtype=np.float32),
                        version_L=np.zeros(length, dtype=np.int32),
                        advantage=float(rng.normal()),
                        weight=1 / (groups * samples * response),
                        prompt_length=PROMPT,
                    )
                )
        updates.append(sequences)
    return updates


def run(model: Path, dtype: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of a step in each mode, one an alternation, and `tokens`: the ratio of the positions they compute."""
    import torch

    from drpo_megatron.config import load_config
    from drpo_megatron.platform import distributed

    overrides = [f"model.path={model}", f"model.dtype={dtype}", "parallel.pipeline=1"]
    config = load_config(RECIPE, overrides)
    distributed.initialize(config.layout)
    torch.set_num_threads(1)

    from drpo_megatron.training.step import Policy

    policy = Policy(config)
    rollout, count = config.rollout, config.training.updates_per_batch
    updates = synthetic_updates(
        count, rollout.prompts_per_step // count, rollout.samples_per_prompt, policy.hf.vocab_size
    )
    modes = ("never", "always")
    positions = dict.fromkeys(modes, 0)

    def seconds(mode: str) -> float:
        policy.sharing = mode  # type: ignore[assignment]
        start = time.process_time()
        positions[mode] = sum(policy.update(sequences, version=0).positions for sequences in updates)
        return time.process_time() - start

    for mode in modes:
        seconds(mode)
    samples: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(repetitions):
        for mode in modes:
            samples[mode].append(seconds(mode))
    distributed.shutdown()
    return samples | {"tokens": [positions["never"] / positions["always"]]}


if __name__ == "__main__":
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
