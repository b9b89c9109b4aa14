"""What a rank holds, as Megatron-Core's sharded state: weights, optimizer, schedule, counters, random numbers.

Everything is named over the whole model, so that ranks of another layout find their part.

Several ranks on GPUs have not been run: see docs/gpu-checklist.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import queue
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from drpo_megatron.checkpoint.manifest import CheckpointError
from drpo_megatron.training.step import Policy

# Names of the optimizer's tensors then do not tell how many optimizers a layout takes: experts have one of their own
# where they are divided over other ranks than the rest.
_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

_KIND_BEFORE = {"optimizer.moments_dtype": "float32"}
"""What holds of checkpoints that were written before there was the setting."""


def _metadata() -> dict[str, Any]:
    """A copy for each call: Megatron-Core writes its process groups into it."""
    return dict(_RESHARDABLE)


def optimizer_kind(policy: Policy) -> dict[str, Any]:
    """What a checkpoint of this optimizer can be read into, by setting. Layouts may differ, this may not; without the
    distributed optimizer, experts of their own ranks have an optimizer of their own, and its state does not move.
    """
    settings = policy.config.optimizer
    distributed = settings.distributed
    return {
        "optimizer.distributed": distributed,
        "optimizer.moments_dtype": settings.moments_dtype,
        "model.dtype": policy.config.model.dtype,
        "number of optimizers, which parallel.expert and optimizer.distributed decide": None
        if distributed
        else len(_parts(policy)),
    }


def begin_save(policy: Policy, directory: Path) -> AsyncRequest:
    """Plan the save of this rank's part into `directory`, an empty one.

    Run the request, or fork the process that does, before training goes on: it refers to the tensors that training
    changes. Collective over all ranks. What the request does needs no other rank, until its `finalize_fns`, which are
    collective again. Those and the planning use the default process group.
    """
    # Megatron-Core's own queue is a server process, which outlives a trainer that is killed.
    if isinstance(filesystem_async._results_queue, _Results):
        filesystem_async._results_queue.close()  # of a save in which this rank had nothing to write
    filesystem_async._results_queue = _Results()
    strategy = FullyParallelSaveStrategyWrapper(
        _UncopiedSave(), parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return dist_checkpointing.save(
        _state(policy, is_loading=False),
        str(directory),
        strategy,
        async_sharded_save=True,
        async_strategy="mcore",  # its successor is a package of its own, for GPUs
        content_metadata=_metadata() | optimizer_kind(policy),
    )


class _UncopiedSave(TorchDistSaveShardedStrategy):
    """Megatron-Core copies every host tensor that is a part of another (all parameters and main weights, the halves of
    gated MLPs) while training waits, lest torch write the other whole. The fork that writes has a snapshot of memory
    already: these tensors get a storage that ends where they do.
    """

    def async_save(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, async_strategy: str = "mcore"
    ) -> AsyncRequest:
        for leaf in nested_values(sharded_state_dict):
            if isinstance(leaf, ShardedTensor) and leaf.data is not None:
                leaf.data = with_own_storage(leaf.data)
        return super().async_save(sharded_state_dict, checkpoint_dir, async_strategy)


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage holds nothing else; `tensor` itself where that needs a copy."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() == 0:
        return tensor
    memory = tensor.detach().view(-1).view(torch.uint8).numpy()
    return torch.from_numpy(memory).view(tensor.dtype).view(tensor.shape)


class _Results(logging.Handler):
    """What the writer says to the planner: in memory that a fork shares, because a pipe holds too little and nobody
    reads it meanwhile, and a disk may be full. An error is put with what was logged of its cause, which it lacks.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._file = os.fdopen(os.memfd_create("checkpoint-results"), "w+b", buffering=0)
        self._messages: list[str] = []
        filesystem_async.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def put(self, results: Any) -> None:
        if isinstance(results, Exception) and self._messages:
            results = RuntimeError(self._messages[0])
        with memoryview(pickle.dumps(results)) as rest:
            while rest:
                rest = rest[self._file.write(rest) :]

    def get_nowait(self) -> Any:
        self._file.seek(0)
        written = self._file.read()
        self.close()
        if not written:
            raise queue.Empty
        return pickle.loads(written)

    def close(self) -> None:
        filesystem_async.logger.removeHandler(self)
        self._file.close()
        super().close()


def load(policy: Policy, directory: Path, *, same_layout: bool) -> bool:
    """Fill the policy from `directory`, and with `same_layout` the random-number generators. Collective over all ranks.

    Returns whether the checkpoint has more than weights; without, the optimizer starts anew. Raises CheckpointError for
    one of another kind of optimizer.
    """
    content = dist_checkpointing.load_content_metadata(str(directory)) or {}
    if "optimizer.distributed" not in content:
        state = dist_checkpointing.load({"model": _model_state(policy)}, str(directory))
        _load_model(policy, state)
        policy.optimizer.reload_model_params()
        return False
    for key, now in optimizer_kind(policy).items():
        written = content.get(key, _KIND_BEFORE.get(key))
        if written != now:
            raise CheckpointError(
                f"{directory} was written with {key} = {written}, now it is {now}; set it as it was, or convert "
                "the checkpoint to a Hugging Face directory and start from that"
            )
    state = dist_checkpointing.load(_state(policy, is_loading=True, with_random=same_layout), str(directory))
    _load_model(policy, state)
    _load_optimizer(policy, state["optimizer"], state["optimizer_steps"])
    policy.scheduler.load_state_dict(state["scheduler"])
    policy.guard.skipped_total, policy.guard.skipped_in_a_row = state["skipped"]
    if same_layout:
        _set_random_state(state["random"])
    return True


def _load_optimizer(policy: Policy, state: Any, steps: int) -> None:
    """Megatron-Core's own, made right for a layout with another number of optimizers, and for torch's AdamW, which it
    takes where there is neither TE nor Apex: that one has its count of steps beside the moments of every parameter.
    """
    parts = _parts(policy)
    if not isinstance(parts[0], DistributedOptimizer):
        policy.optimizer.load_state_dict(state)
        return
    states = [state] if len(parts) == 1 else [state[i] for i in range(len(parts))]
    for part, of_part in zip(parts, states, strict=True):
        of_part["param_state_sharding_type"] = _RESHARDABLE["distrib_optim_sharding_type"]
        # The settings of now; the schedule sets the learning rate.
        of_part["optimizer"] = part.state_dict()["optimizer"]
        for group in of_part["optimizer"]["param_groups"]:
            group["step"] = steps
        copy, adamw = part._set_main_param_and_optimizer_states, isinstance(part.optimizer, torch.optim.AdamW)
        if adamw:
            # It copies every tensor of the state, and has no count among what it read.
            part._set_main_param_and_optimizer_states = lambda p, tensors, copy=copy: copy(p, {"step": None} | tensors)
        elif getattr(part.optimizer, "store_param_remainders", False):
            # The low halves of main weights are int16. Megatron-Core writes their values as float32 and would read
            # them so, which Transformer Engine refuses.
            part._set_main_param_and_optimizer_states = lambda p, tensors, copy=copy: copy(
                p, tensors | ({"param": tensors["param"].to(torch.int16)} if p.dtype == torch.bfloat16 else {})
            )
        part.load_state_dict(of_part)
        part.__dict__.pop("_set_main_param_and_optimizer_states", None)
        if adamw:
            for of_parameter in part.optimizer.state.values():
                # One tensor for all parameters would count a step for each of them.
                of_parameter["step"] = of_parameter["step"].clone()


def _optimizer_steps(policy: Policy) -> int:
    """Of Adam's bias correction: one each applied update."""
    for part in _parts(policy):
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
        for of_parameter in part.optimizer.state.values():
            return int(of_parameter["step"])
    return 0


@contextlib.contextmanager
def _positions_without_padding(policy: Policy) -> Iterator[None]:
    """Megatron-Core 0.19.2 gathers the optimizer's state of a buffer bucket by bucket, without the padding between two,
    and cuts parameters out of it by positions that count the padding: those behind the first bucket would be saved with
    their neighbours' numbers. The positions are others while it does that.
    """
    buffers = [b for part in _parts(policy) if isinstance(part, DistributedOptimizer) for b in part.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        before, begins = 0, []
        for bucket in buffer.buckets:
            begins.append(bucket.offset - before)
            before += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - begins[bucket], end - begins[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, positions in zip(buffers, padded, strict=True):
            buffer.param_index_map = positions


@contextlib.contextmanager
def _without_a_gather(policy: Policy, is_loading: bool) -> Iterator[None]:
    """A rank that shares its parameters' state with no other has it as it is to be saved: no passes over all of it,
    which training would wait for.
    """
    parts = [p for p in _parts(policy) if isinstance(p, DistributedOptimizer) and p.data_parallel_group.size() == 1]
    for part in parts if not is_loading else ():
        # Of this instance alone, until it is saved.
        part.sharded_param_state_fully_reshardable = partial(_own_state, part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in parts:
            vars(part).pop("sharded_param_state_fully_reshardable", None)


def _own_state(part: DistributedOptimizer, model: dict[str, Any], *_: Any) -> dict[int, Any]:
    """What Megatron-Core's method of that name makes: by number of the parameter, its tensors over the whole model."""
    tensors, _others = extract_sharded_tensors_and_factories(model)
    of_parameter = {sharded.data: sharded for sharded in nested_values(tensors)}
    state: dict[int, Any] = {}
    for buffer in part.buffers:
        for parameter in buffer.param_index_map:
            sharded = of_parameter[parameter]
            of_one: dict[str, Any] = {}
            for name, tensor in part._get_main_param_and_optimizer_states(parameter).items():
                if name != "step":
                    changes = {"key": f"optimizer.state.{name}.{sharded.key}", "data": tensor.view(parameter.shape)}
                    dtype = {} if isinstance(sharded, ShardedTensorFactory) else {"dtype": tensor.dtype}
                    of_one[name] = dataclasses.replace(sharded, **changes, **dtype)
            state[len(state)] = of_one
    return state


def _give_state(part: DistributedOptimizer) -> None:
    """Adam has none before its first step, and what is saved or loaded needs a place."""
    groups = part.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0  # nor does it decay weights then
        for parameter in group["params"]:
            # Of an update that was skipped, perhaps not finite. Transformer Engine's Adam reads it before `grad`.
            parameter.decoupled_grad = None
    part._init_optimizer_states_with_dummy_values()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = None
        if "step" in group:
            group["step"] = 0
    for of_parameter in part.optimizer.state.values():
        if "step" in of_parameter:
            of_parameter["step"].zero_()


def _parts(policy: Policy) -> list[Any]:
    return list(getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]))


def _state(policy: Policy, *, is_loading: bool, with_random: bool = True) -> dict[str, Any]:
    model = _model_state(policy)
    for part in _parts(policy):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            _give_state(part)
    with _positions_without_padding(policy), _without_a_gather(policy, is_loading):
        optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_metadata())
    state = {
        "model": model,
        "optimizer": optimizer,
        "optimizer_steps": 0 if is_loading else _optimizer_steps(policy),
        "scheduler": policy.scheduler.state_dict(),
        "skipped": (policy.guard.skipped_total, policy.guard.skipped_in_a_row),
    }
    if with_random:
        state["random"] = ShardedObject(
            "random", _random_state(), global_shape=(dist.get_world_size(),), global_offset=(dist.get_rank(),)
        )
    return state


def _model_state(policy: Policy) -> dict[str, Any]:
    """By number of the model chunk. The names of tensors count layers over the whole model."""
    return {str(i): module.sharded_state_dict(metadata=_metadata()) for i, module in enumerate(policy.modules)}


def _load_model(policy: Policy, state: dict[str, Any]) -> None:
    for i, module in enumerate(policy.modules):
        module.load_state_dict(state["model"][str(i)])


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])
