"""Memory of the model states on one rank: what training holds before the first activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drpo_megatron.platform.layout import ParallelLayout

# grad_reduce_in_fp32 of the data-parallel wrapper.
_GRADIENT_BYTES = 4
# Two Adam moments in float32.
_MOMENT_BYTES = 8
_MAIN_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class ModelStateMemory:
    """Bytes on one rank. Activations, logits in flight, communication buffers and the allocator's slack come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter belongs to one expert-parallel rank; Megatron-Core marks those with `allreduce = False`."""
    return not getattr(parameter, "allreduce", True)


def optimizer_shards(layout: ParallelLayout, expert: bool) -> int:
    """Ranks that hold copies of a parameter, over which the distributed optimizer divides its state.

    Dense parameters are copied over data and context parallel ranks; expert ones over what expert parallelism leaves.
    """
    dense_ranks = layout.tensor * layout.context * layout.data
    return dense_ranks // (layout.expert * layout.expert_tensor) if expert else layout.context * layout.data


def model_state_memory(
    model_chunks: Sequence[torch.nn.Module], layout: ParallelLayout, *, distributed_optimizer: bool = True
) -> ModelStateMemory:
    """Bytes of this rank's chunks, built on any device, under Adam with float32 main weights and main gradients.

    Weights have the parameters' dtype; a float32 parameter is its own main weight. Megatron-Core pads each gradient
    bucket so that it divides over the ranks, less than a kilobyte a bucket and rank, which is not counted.
    """
    weights = gradients = 0
    optimizer = 0.0
    for chunk in model_chunks:
        for parameter in chunk.parameters():
            elements = parameter.numel()
            weights += elements * parameter.element_size()
            gradients += elements * _GRADIENT_BYTES
            main_weight = 0 if parameter.dtype is torch.float32 else _MAIN_WEIGHT_BYTES
            shards = optimizer_shards(layout, is_expert(parameter)) if distributed_optimizer else 1
            optimizer += elements * (main_weight + _MOMENT_BYTES) / shards
    return ModelStateMemory(weights, gradients, round(optimizer))
