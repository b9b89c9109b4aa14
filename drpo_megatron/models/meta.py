"""Any rank of any layout in one process: parameters with names, shapes and dtypes, on the meta device, without values.

This is how a layout of hundreds of GPUs is checked on one machine: each rank is built as it would be built there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from drpo_megatron.platform.layout import ParallelLayout

META = torch.device("meta")


def distinct_ranks(layout: ParallelLayout) -> list[int]:
    """One global rank for each pair of pipeline stage and expert-parallel rank, stages outermost.

    Every other rank holds parameters of the same shapes: another tensor-parallel slice, or a data-parallel copy.
    """
    ranks_a_stage = layout.world_size // layout.pipeline
    # In a stage the experts' own order counts: expert tensor first, then expert, then the copies.
    return [
        stage * ranks_a_stage + expert * layout.expert_tensor
        for stage in range(layout.pipeline)
        for expert in range(layout.expert)
    ]


@contextlib.contextmanager
def rank_on_meta(layout: ParallelLayout, rank: int) -> Iterator[None]:
    """Be `rank` of a job with `layout`: inside, `build_model(..., device=META)` makes that rank's model chunks.

    The process groups are torch's "fake" ones: every collective returns at once and moves nothing. Call
    `platform.activate()` before. Raises ValueError for a rank outside the layout, RuntimeError when this process has
    joined a job already.
    """
    if not 0 <= rank < layout.world_size:
        raise ValueError(f"rank {rank} is not in a layout of {layout.world_size} ranks: give one from 0 on")
    if dist.is_initialized():
        raise RuntimeError("this process has joined a job already: build on the meta device in a process of its own")
    current_device = torch.cuda.current_device
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            create_gloo_process_groups=False,
        )
        # Megatron-Core allocates every parameter on this device. A string, because Transformer Engine leaves its
        # parameters without storage only for a device that equals "meta".
        torch.cuda.current_device = lambda: "meta"  # type: ignore[assignment, return-value]  # a device all the same
        yield
    finally:
        torch.cuda.current_device = current_device
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
