"""The parallel layout of the trainer. No torch, no Megatron: the configuration is checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """How the ranks are divided. Sizes are numbers of ranks; `virtual_pipeline` is the number of chunks a stage.

    Megatron's order of ranks is tensor, context, expert, data, pipeline, from the fastest to the slowest. Raises
    ValueError for a combination that Megatron-Core cannot build.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    data: int = 1
    sequence_parallel: bool = False

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
            raise ValueError("parallel.sequence_parallel needs tensor >= 2: turn it off or raise parallel.tensor")
        dense = self.tensor * self.context * self.data
        if dense % (self.expert * self.expert_tensor):
            raise ValueError(
                f"parallel.expert × expert_tensor = {self.expert * self.expert_tensor} must divide "
                f"tensor × context × data = {dense}"
            )

    @property
    def world_size(self) -> int:
        """Number of trainer ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def stages(self) -> int:
        """Number of model chunks over all pipeline stages."""
        return self.pipeline * (self.virtual_pipeline or 1)
