"""One rank of `bench plan`: two updates of a layout, and the bytes that the fullest moment of the second takes.

Started by torchrun. Rank 0 prints a JSON list, for each rank {stage, states, peak} in bytes above what the process has
before it builds the policy.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from drpo_megatron.bench.resident import anonymous, of_files, peak, reset_peak
from drpo_megatron.config import load_config
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform import distributed
from drpo_megatron.training.packing import TrainSequence
from drpo_megatron.training.step import Policy

_PR_SET_THP_DISABLE = 41


def sequences(config: RunConfig, hf: HFModelConfig) -> list[TrainSequence]:
    """An update's sequences, all as long as prompt and response may be together.

    The experts of a mixture go round, so that each is given as many tokens.
    """
    prompt, response = config.data.max_prompt_tokens, config.rollout.sampling.max_new_tokens
    length = prompt + response
    generator = np.random.default_rng(0)
    experts = None
    if hf.moe is not None:
        top_k, layers = hf.moe.top_k, sum(hf.moe.layers)
        choices = np.arange((length - 1) * top_k).reshape(length - 1, 1, top_k) % hf.moe.num_experts
        experts = np.broadcast_to(choices, (length - 1, layers, top_k)).astype(np.int16)
    count = config.rollout.prompts_per_step // config.training.updates_per_batch * config.rollout.samples_per_prompt
    return [
        TrainSequence(
            token_ids_L=generator.integers(0, hf.vocab_size, length, dtype=np.int32),
            sampled_L=np.arange(length) >= prompt,
            logmu_L=np.full(length, -5.0, dtype=np.float32),
            version_L=np.zeros(length, dtype=np.int32),
            advantage=1.0,
            weight=1.0 / (count * length),
            prompt_length=prompt,
            routed_experts_PLK=experts,
        )
        for _ in range(count)
    ]


def measure(config: RunConfig) -> dict[str, int]:
    """Build the policy and update it twice: the first update makes the optimizer's state, the second needs that and
    everything else.

    Memory is resident memory without that of files, whose pages, of libraries, are all there after the first update.
    """
    _load_what_is_loaded_late()
    gc.collect()
    reset_peak()
    before = anonymous()
    policy = Policy(config)
    batch = sequences(config, policy.hf)
    policy.update(batch, 0)
    gc.collect()
    reset_peak()
    states = anonymous()
    policy.update(batch, 1)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {"stage": stage, "states": states - before, "peak": peak() - of_files() - before}


def _load_what_is_loaded_late() -> None:
    """Modules and libraries that torch loads when a backward and an optimizer run for the first time."""
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    torch.set_num_threads(1)
    # A huge page holds what was freed beside what was not.
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    distributed.initialize(config.layout)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, measure(config))
    if dist.get_rank() == 0:
        print(json.dumps(gathered), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
