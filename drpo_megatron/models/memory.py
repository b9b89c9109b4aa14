"""Memory of the model states on one rank: what training holds before the first activation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drpo_megatron.platform.layout import ParallelLayout

if TYPE_CHECKING:  # `drpo plan` counts without building anything, and does without torch
    import torch

    from drpo_megatron.config.schema import RunConfig

# grad_reduce_in_fp32 of the data-parallel wrapper.
_GRADIENT_BYTES = 4
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class AdamBytes:
    """Bytes a parameter: its main weight, where it is not float32 itself, and both moments."""

    main_weight: int = 4
    moments: int = 8

    @classmethod
    def of(cls, config: RunConfig) -> AdamBytes:
        fp8 = config.fp8
        if config.optimizer.moments_dtype == "float32":
            return cls()
        # Megatron-Core keeps whole main weights for parameters that the other FP8 recipes quantize.
        remainders = fp8.recipe in (None, "delayed") or fp8.backend == "emulate"
        return cls(main_weight=2 if remainders else 4, moments=4)


FLOAT32_ADAM = AdamBytes()


@dataclass(frozen=True)
class ModelStateMemory:
    """Bytes on one rank. Activations, logits in flight, communication buffers and the allocator's slack come on top."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: ModelStateMemory) -> ModelStateMemory:
        return ModelStateMemory(
            self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer
        )


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter belongs to one expert-parallel rank; Megatron-Core marks those with `allreduce = False`."""
    return not getattr(parameter, "allreduce", True)


def optimizer_shards(layout: ParallelLayout, expert: bool) -> int:
    """Ranks that hold copies of a parameter, over which the distributed optimizer divides its state.

    Dense parameters are copied over data and context parallel ranks; expert ones over what expert parallelism leaves.
    """
    dense_ranks = layout.tensor * layout.context * layout.data
    return dense_ranks // (layout.expert * layout.expert_tensor) if expert else layout.context * layout.data


def state_memory(elements: int, weight_bytes: int, shards: int, adam: AdamBytes = FLOAT32_ADAM) -> ModelStateMemory:
    """Bytes of `elements` parameters of `weight_bytes` each, whose optimizer state is divided over `shards` ranks.

    Main gradients are float32; a float32 parameter is its own main weight.
    """
    main_weight = 0 if weight_bytes == _FLOAT32_BYTES else adam.main_weight
    optimizer = elements * (main_weight + adam.moments) / shards
    return ModelStateMemory(elements * weight_bytes, elements * _GRADIENT_BYTES, round(optimizer))


def model_state_memory(
    model_chunks: Sequence[torch.nn.Module], layout: ParallelLayout, *, distributed_optimizer: bool = True
) -> ModelStateMemory:
    """Bytes of this rank's chunks, built on any device: `state_memory` of its parameters, in their own dtypes.

    Megatron-Core pads each gradient bucket so that it divides over the ranks, less than a kilobyte a bucket and rank,
    which is not counted.
    """
    elements: Counter[tuple[int, int]] = Counter()
    for chunk in model_chunks:
        for parameter in chunk.parameters():
            shards = optimizer_shards(layout, is_expert(parameter)) if distributed_optimizer else 1
            elements[parameter.element_size(), shards] += parameter.numel()
    parts = [state_memory(count, weight_bytes, shards) for (weight_bytes, shards), count in elements.items()]
    return sum(parts, ModelStateMemory(0, 0, 0))
