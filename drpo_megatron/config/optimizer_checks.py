"""What the settings of the optimizer must satisfy together. Each function yields one line a problem."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from drpo_megatron import platform
from drpo_megatron.config.schema import RunConfig


def overlap_problems(config: RunConfig) -> Iterator[str]:
    """Communication that is overlapped, and what it needs."""
    optimizer = config.optimizer
    if optimizer.overlap_param_gather and not optimizer.distributed:
        yield (
            "optimizer.overlap_param_gather: is true with optimizer.distributed = false, where every rank updates all "
            "parameters and nothing is gathered; turn it off, or shard the optimizer"
        )
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        # Megatron-Core's buckets serve both directions, and without this they are one.
        yield (
            "optimizer.overlap_param_gather: is true with optimizer.overlap_grad_reduce = false, and parameters are "
            "gathered by the buckets of the gradients; turn both on"
        )
    if optimizer.bucket_parameters is not None and not optimizer.overlap_grad_reduce:
        yield (
            f"optimizer.bucket_parameters: {optimizer.bucket_parameters} has no effect with "
            "optimizer.overlap_grad_reduce = false, which reduces everything at once; remove it, or turn the overlap on"
        )


def state_problems(config: RunConfig) -> Iterator[str]:
    """Moments below float32, which only Transformer Engine's Adam updates."""
    optimizer = config.optimizer
    if not optimizer.reduced_state:
        return
    name = "exp_avg_dtype" if optimizer.exp_avg_dtype != "float32" else "exp_avg_sq_dtype"
    state = f"optimizer.{name}: is {getattr(optimizer, name)}"
    if not optimizer.distributed:
        yield (
            f"{state} with optimizer.distributed = false, and only the distributed optimizer of Megatron-Core has such "
            "moments; turn optimizer.distributed on, or set it to float32"
        )
    if config.model.dtype != "bfloat16":
        # Its main weights of float32 parameters are copies that no update reaches, and a checkpoint would keep those.
        yield (
            f"{state} with model.dtype = {config.model.dtype}, and it is for bfloat16 weights; set model.dtype to "
            "bfloat16, or it to float32"
        )
    if "fp8" in (optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype) and config.rollout.placement == "colocated":
        yield (
            f"{state} with rollout.placement = colocated, and FP8 moments cannot be moved to the host and back; set it "
            "to bfloat16, or place the servers on devices of their own"
        )
    if platform.compute_capability() is None:
        yield (
            f"{state} and this machine has no CUDA device, which Transformer Engine's Adam needs; set it to float32, "
            "which runs anywhere"
        )
    elif importlib.util.find_spec("transformer_engine") is None:
        yield (
            f"{state}, which needs Transformer Engine's Adam, and transformer_engine is not installed; install "
            "transformer-engine[pytorch], or set it to float32"
        )
