"""One rank of `bench plan`: two updates of a layout, and the bytes that were allocated at their fullest moment.

Started by torchrun. Rank 0 prints a JSON list, for each rank {stage, states, peak} in bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity, profile, record_function

from drpo_megatron.config import load_config
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform import distributed
from drpo_megatron.training.packing import TrainSequence
from drpo_megatron.training.step import Policy

UPDATES = "updates of the bench"


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


def run(config: RunConfig) -> dict[str, int]:
    """Two updates: the first makes the optimizer's state, the second needs it and everything else."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        policy = Policy(config)
        batch = sequences(config, policy.hf)
        policy.update(batch, 0)
        with record_function(UPDATES):
            policy.update(batch, 1)
    states, peak = timeline(profiler)
    return {"stage": parallel_state.get_pipeline_model_parallel_rank(), "states": states, "peak": peak}


def timeline(profiler: Any) -> tuple[int, int]:
    """(bytes allocated when the marked part began, most bytes allocated in it), since the profile began."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == UPDATES)
    held = states = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() < begin:
                states = held
            peak = max(peak, held) if event.start_ns() >= begin else held
    return states, peak


def main() -> None:
    config = load_config(Path(sys.argv[1]))
    torch.set_num_threads(1)
    distributed.initialize(config.layout)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, run(config))
    if dist.get_rank() == 0:
        print(json.dumps(gathered), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
