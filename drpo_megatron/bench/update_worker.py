"""The rank of `bench update`: updates of each configuration, one after the other.

    python -m drpo_megatron.bench.update_worker CONFIG...

Prints a JSON list, for each configuration {seconds, positions, flops, peak_flops_per_s, peak_bytes, planned_bytes,
grad_norm}; the bytes are null on a CPU, grad_norm is that of the first update.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.bench.plan_worker import sequences
from drpo_megatron.bench.update import CPU_MODEL, GPU_MODEL, REPETITIONS, WARM_UP
from drpo_megatron.config import load_config
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.memory import trainer_memory
from drpo_megatron.plan.workload import Workload
from drpo_megatron.platform import device, distributed, has_cuda, peak_flops_per_s, peak_memory_bytes, spec_backend
from drpo_megatron.training.step import Policy


def write_model(path: Path) -> None:
    """Random weights, made on the device: a processor would take longer for them than the bench does."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with device():
        model = Qwen3ForCausalLM(Qwen3Config(**(GPU_MODEL if has_cuda() else CPU_MODEL)))
    model.to(torch.bfloat16 if has_cuda() else torch.float32).save_pretrained(path)


def measure(config: RunConfig) -> dict[str, Any]:
    before = torch.cuda.memory_allocated() if has_cuda() else 0
    policy = Policy(config)
    batch = sequences(config, policy.hf)
    first = policy.update(batch, 0)
    for version in range(1, WARM_UP):
        policy.update(batch, version)
    if has_cuda():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for version in range(WARM_UP, WARM_UP + REPETITIONS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = policy.update(batch, version)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": seconds,
        "positions": result.positions,
        "flops": result.flops,
        "peak_flops_per_s": peak_flops_per_s(),
        "peak_bytes": peak_memory_bytes() - before if has_cuda() else None,
        "planned_bytes": planned(config, policy.hf) if has_cuda() else None,
        "grad_norm": first.grad_norm,
    }


def planned(config: RunConfig, hf: HFModelConfig) -> float:
    """Bytes of model states, activations and loss, as `drpo plan` has them."""
    lengths = {
        "prompt_tokens": config.data.max_prompt_tokens,
        "response_tokens": config.rollout.sampling.max_new_tokens - 1,
    }
    assumed = Assumptions.of(config, [f"{name}={tokens}" for name, tokens in lengths.items()])
    (stage,) = trainer_memory(config, hf, Workload.of(config, assumed), assumed, spec_backend())
    return stage.states.total + stage.peak.total


def main() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    paths = [Path(argument) for argument in sys.argv[1:]]
    configs: list[RunConfig] = []
    measured = []
    for path in paths:
        if not configs:
            write_model(path.parent / "model")
        configs.append(load_config(path))
        if len(configs) == 1:
            distributed.initialize(configs[0].layout)
        measured.append(measure(configs[-1]))
        print(f"{path.stem}: {measured[-1]}", file=sys.stderr, flush=True)
        gc.collect()
        if has_cuda():
            torch.cuda.empty_cache()
    print(json.dumps(measured), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
