"""Processes, groups and seeds: from torchrun's environment variables to Megatron-Core's process groups."""

from __future__ import annotations

import math
import os
import pickle
import random
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from drpo_megatron import platform
from drpo_megatron.platform import determinism
from drpo_megatron.platform.layout import ParallelLayout

_control: dist.ProcessGroup | None = None


def initialize(
    layout: ParallelLayout,
    *,
    timeout_s: float = 600.0,
    seed: int = 1,
    control_timeout_s: float = 86400.0,
    deterministic: bool = False,
) -> None:
    """Join the job and build the process groups of `layout`.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (torchrun sets them). `timeout_s` bounds every
    collective of the training groups, in seconds; `control_timeout_s` those of `control_group()`, where ranks wait for
    rank 0 through a whole rollout. `deterministic` is `platform.determinism.enable`. Raises RuntimeError outside
    torchrun and for an environment that is not deterministic, ValueError when the layout does not have as many ranks as
    the job.
    """
    global _control
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not set: start the trainer through torchrun")
    world_size = int(os.environ["WORLD_SIZE"])
    _check_world(layout, world_size)
    if deterministic:
        determinism.enable()
    platform.activate()
    device = platform.device()
    torch.cuda.set_device(device)
    dist.init_process_group(
        platform.backend(), rank=int(os.environ["RANK"]), world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    if platform.has_cuda():
        # Ties NCCL to this rank's device, and a broken network fails here. init_process_group's `device_id` would do it
        # too, but then every later group is split off this one, by all of its ranks: the weight group's are not there.
        dist.all_reduce(torch.zeros(1, device=device))
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=control_timeout_s))
    assert isinstance(control, dist.ProcessGroup), "every rank is in it"
    _control = control
    _build_groups(layout, timeout_s)
    _seed_everything(seed)


def change_layout(layout: ParallelLayout, *, timeout_s: float = 600.0, seed: int = 1) -> None:
    """Replace the model-parallel groups by those of another layout of the same processes. Earlier models are void."""
    _check_world(layout, dist.get_world_size())
    _destroy_groups()
    _build_groups(layout, timeout_s)
    _seed_everything(seed)


def control_group() -> dist.ProcessGroup:
    """The gloo group over all ranks for Python objects and barriers outside the training step."""
    if _control is None:
        raise RuntimeError("the process groups do not exist: call drpo_megatron.platform.distributed.initialize first")
    return _control


def from_rank_0(value: Any) -> Any:
    """Rank 0's `value`, on every rank. The value must pickle; over gloo, so it may wait as long as a rollout takes."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control_group())
    return box[0]


def to_rank_0(value: Any) -> list[Any]:
    """`value` of every rank, in their order, on rank 0; an empty list on the others. Collective; by pickling.

    Ranks with little to say send little: torch's `gather_object` pads all of them to the longest.
    """
    group, world = control_group(), dist.get_world_size()
    if world == 1:
        return [value]
    mine = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    size = torch.tensor([len(mine)])
    if dist.get_rank() != 0:
        dist.gather(size, dst=0, group=group)
        dist.send(mine, dst=0, group=group)
        return []
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.gather(size, sizes, dst=0, group=group)
    values = [value]
    for rank in range(1, world):
        theirs = torch.empty(int(sizes[rank]), dtype=torch.uint8)
        dist.recv(theirs, src=rank, group=group)
        values.append(pickle.loads(theirs.numpy()))
    return values


def shutdown() -> None:
    """Destroy all process groups. Collective; does nothing when they do not exist."""
    global _control
    if not dist.is_initialized():
        return
    _destroy_groups()
    dist.destroy_process_group()
    _control = None


def _destroy_groups() -> None:
    """End Megatron-Core's groups. It forgets them, but torch does not: each would keep its threads, some sixty for a
    layout, which wake a hundred times a second.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and group is not _control:
            dist.destroy_process_group(group)


def _check_world(layout: ParallelLayout, world_size: int) -> None:
    if layout.world_size != world_size:
        raise ValueError(
            f"the layout has {layout.world_size} ranks (tensor {layout.tensor} × pipeline {layout.pipeline} × context "
            f"{layout.context} × data {layout.data}) and the job {world_size}: start one process a rank of the layout"
        )


def _build_groups(layout: ParallelLayout, timeout_s: float) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
    )


def _seed_everything(seed: int) -> None:
    """One seed for Python, numpy and torch on all ranks; Megatron-Core derives the tensor-parallel ones from it."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
