"""What FP8 does to a policy's numbers, looked at in one update: each quantized tensor, and the gradient.

Tensors are seen where products are emulated, which runs on any device. Transformer Engine's kernels do not show theirs:
of them there is the gradient alone (not run: no GPU).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config
from torch import Tensor

from drpo_megatron.fp8 import numerics
from drpo_megatron.fp8.emulation import Role, emulated_layers
from drpo_megatron.fp8.numerics import Quantized
from drpo_megatron.models.builder import unwrap
from drpo_megatron.records import Metrics
from drpo_megatron.weights.families import global_name
from drpo_megatron.weights.importer import first_of_chunk


@dataclass(frozen=True)
class TensorHealth:
    """One operand of one layer, over the tokens that were seen.

    layer: its name in the whole model. amax: largest absolute value. saturated, underflow: shares of the `values`
    values (`numerics.Health`).
    """

    layer: str
    role: Role
    amax: float
    saturated: float
    underflow: float
    values: int


@dataclass(frozen=True)
class UpdateHealth:
    """tensors: of this rank's layers. gradient_cosine: between the update's gradient in FP8 and the one that the same
    batch has without, over all parameters; the same on every rank.
    """

    tensors: list[TensorHealth]
    gradient_cosine: float


@contextlib.contextmanager
def unquantized(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Products are in the model's dtype inside."""
    quantizers = [layer.quantizer for chunk in chunks for layer in emulated_layers(unwrap(chunk)).values()]
    config = get_model_config(chunks[0])
    recipe = config.fp8
    for quantizer in quantizers:
        quantizer.active = False
    config.fp8 = None  # what Megatron-Core asks before it enters Transformer Engine's context
    try:
        yield
    finally:
        config.fp8 = recipe
        for quantizer in quantizers:
            quantizer.active = True


@contextlib.contextmanager
def watched(chunks: Sequence[torch.nn.Module]) -> Iterator[list[TensorHealth]]:
    """A list that grows by every tensor that is quantized inside. Slow: the device is waited for each time."""
    seen: list[TensorHealth] = []

    def observe(layer: str, role: Role, x_MK: Tensor, quantized: Quantized) -> None:
        seen.append(TensorHealth(layer, role, *numerics.health(x_MK, quantized), values=x_MK.numel()))

    layers = [
        (global_name(name, *first_of_chunk(chunk)), layer)
        for chunk in chunks
        for name, layer in emulated_layers(unwrap(chunk)).items()
    ]
    for name, layer in layers:
        layer.quantizer.observer = partial(observe, name)
    try:
        yield seen
    finally:
        for _, layer in layers:
            layer.quantizer.observer = None


def merged(tensors: Iterable[TensorHealth]) -> list[TensorHealth]:
    """One a layer and role: the largest amax, the mean shares."""
    key = attrgetter("layer", "role")
    return [_merge(list(group)) for _, group in itertools.groupby(sorted(tensors, key=key), key)]


def _merge(group: list[TensorHealth]) -> TensorHealth:
    values = sum(t.values for t in group)
    return TensorHealth(
        group[0].layer,
        group[0].role,
        max(t.amax for t in group),
        sum(t.saturated * t.values for t in group) / max(values, 1),
        sum(t.underflow * t.values for t in group) / max(values, 1),
        values,
    )


Gradients = list[tuple[dist.ProcessGroup, list[Tensor]]]


def gradients_of(optimizer: MegatronOptimizer) -> Gradients:
    """A copy of this rank's part of the reduced gradient, each value on one rank of the group beside it."""
    optimizer.prepare_grads()
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        (part.get_grad_stats_parallel_group(), [g.float().clone() for g in part.get_grads_for_grad_norm()])
        for part in parts
    ]


def cosine(one: Gradients, other: Gradients) -> float:
    """Between two gradients of one optimizer. Collective. NaN where one is 0 or not finite."""
    dot_and_squares = torch.zeros(3, dtype=torch.float64)
    for (group, mine), (_, theirs) in zip(one, other, strict=True):
        sums = torch.zeros(3, dtype=torch.float32, device=mine[0].device if mine else None)
        for a, b in zip(mine, theirs, strict=True):
            sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
        dist.all_reduce(sums, group=group)
        dot_and_squares += sums.cpu().double()
    dot, a2, b2 = dot_and_squares.tolist()
    return dot / math.sqrt(a2 * b2) if a2 * b2 > 0 else math.nan


class HealthLog:
    """Rank 0's view over the looks of a run."""

    def __init__(self) -> None:
        self._amax: dict[tuple[str, Role], float] = {}

    def add(self, ranks: Sequence[UpdateHealth]) -> tuple[list[TensorHealth], Metrics]:
        """The tensors of all ranks' looks at one update, and `fp8/*` of docs/metrics.md."""
        tensors = merged(t for rank in ranks for t in rank.tensors)
        metrics = {"fp8/gradient_cosine": ranks[0].gradient_cosine}
        if not tensors:
            return tensors, metrics
        metrics |= {
            "fp8/amax_max": max(t.amax for t in tensors),
            "fp8/saturated_max": max(t.saturated for t in tensors),
            "fp8/underflow_max": max(t.underflow for t in tensors),
        }
        now = {(t.layer, t.role): t.amax for t in tensors}
        jumps = [abs(math.log2(now[key] / before)) for key, before in self._amax.items() if before and now.get(key)]
        if jumps:
            metrics["fp8/amax_jump_max"] = max(jumps)
        self._amax = now
        return tensors, metrics
