"""The parallel layout of the trainer. No torch, no Megatron: the configuration is checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ParallelLayout:
    """How the ranks are divided. Sizes are numbers of ranks; `virtual_pipeline` is the number of chunks a stage.

    `first_stage_layers` and `last_stage_layers` give those two pipeline stages another number of layers than the rest.
    Megatron's order of ranks is tensor, context, expert, data, pipeline, from the fastest to the slowest. Raises
    ValueError for a combination that Megatron-Core cannot build.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    moe_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    data: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context", "expert", "expert_tensor", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}: set it to 1 or more")
        if self.virtual_pipeline is not None and (self.virtual_pipeline < 2 or self.pipeline < 2):
            raise ValueError(
                f"parallel.virtual_pipeline is {self.virtual_pipeline} with pipeline {self.pipeline}: "
                "it needs pipeline >= 2 and at least 2 chunks a stage; set it to null for the plain schedule"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel is true with parallel.tensor = 1, and it needs tensor >= 2: turn it off or "
                "raise parallel.tensor"
            )
        for name in ("first_stage_layers", "last_stage_layers"):
            layers = getattr(self, name)
            if layers is not None and (layers < 1 or self.pipeline < 2):
                raise ValueError(
                    f"parallel.{name} is {layers} with pipeline {self.pipeline}: it needs 1 layer or more and "
                    "pipeline >= 2; set it to null for equal stages"
                )
        dense = self.tensor * self.context * self.data
        if dense % (self.expert * self.expert_tensor):
            raise ValueError(
                f"parallel.expert × expert_tensor = {self.expert * self.expert_tensor} must divide "
                f"tensor × context × data = {dense}, the ranks of a pipeline stage: lower it, or raise parallel.data"
            )

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def stages(self) -> int:
        """Number of model chunks over all pipeline stages."""
        return self.pipeline * (self.virtual_pipeline or 1)

    def layers_per_stage(self, num_layers: int) -> list[int]:
        """Transformer layers of each pipeline stage, all its chunks together. ValueError when they cannot be divided.

        The layers that `first_stage_layers` and `last_stage_layers` leave are divided equally over the other stages
        (Megatron-Core's `num_layers_in_first_pipeline_stage` and `num_layers_in_last_pipeline_stage`).
        """
        first, last = self.first_stage_layers, self.last_stage_layers
        remaining = num_layers - (first or 0) - (last or 0)
        equal_stages = self.pipeline - (first is not None) - (last is not None)
        if remaining < equal_stages or (remaining % equal_stages if equal_stages else remaining):
            given = "".join(
                f", {name} = {layers}"
                for name, layers in (("first_stage_layers", first), ("last_stage_layers", last))
                if layers is not None
            )
            raise ValueError(
                f"{num_layers} layers do not divide over pipeline = {self.pipeline} stages{given}: {remaining} are "
                f"left for {equal_stages} equal ones; choose a divisor, or set first_stage_layers and last_stage_layers"
            )
        middle = [remaining // equal_stages] * equal_stages if equal_stages else []
        stages = [*([] if first is None else [first]), *middle, *([] if last is None else [last])]
        chunks = self.virtual_pipeline or 1
        if any(layers % chunks for layers in stages):
            raise ValueError(
                f"{num_layers} layers do not divide over virtual_pipeline = {chunks} chunks a stage: the stages have "
                f"{stages} layers; choose a divisor of all of them"
            )
        return stages
