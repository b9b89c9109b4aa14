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


def moment_problems(config: RunConfig) -> Iterator[str]:
    """Moments in bfloat16 that would not be updated, whatever the machine."""
    optimizer, fp8 = config.optimizer, config.fp8
    if optimizer.moments_dtype == "float32":
        return
    name = f"optimizer.moments_dtype: is {optimizer.moments_dtype}"
    if not optimizer.distributed:
        yield (
            f"{name} with optimizer.distributed = false, and only the distributed optimizer of Megatron-Core has such "
            "moments; turn optimizer.distributed on, or set it to float32"
        )
    if config.model.dtype != "bfloat16":
        # Its main weights of float32 parameters are copies that no update reaches, and a checkpoint would keep those.
        yield (
            f"{name} with model.dtype = {config.model.dtype}, and it is for bfloat16 weights; set model.dtype to "
            "bfloat16, or it to float32"
        )
    if fp8.parameters and fp8.recipe == "delayed":
        yield (
            f"{name} with fp8.parameters = true and fp8.recipe = delayed, whose update in Transformer Engine takes "
            "float32 moments only; set it to float32, or choose another recipe"
        )


def moment_machine_problems(config: RunConfig) -> Iterator[str]:
    """What moments in bfloat16 need of this machine."""
    if config.optimizer.moments_dtype == "float32":
        return
    name = f"optimizer.moments_dtype: is {config.optimizer.moments_dtype}"
    if platform.compute_capability() is None:
        yield (
            f"{name} and this machine has no CUDA device, which Transformer Engine's Adam needs; set it to float32, "
            "which runs anywhere"
        )
    elif importlib.util.find_spec("transformer_engine") is None:
        yield (
            f"{name}, which needs Transformer Engine's Adam, and transformer_engine is not installed; install "
            "transformer-engine[pytorch], or set it to float32"
        )
