"""Who holds the devices when: servers on their own devices, or servers that take turns with the trainer on the same.

The turns of a step, colocated. The servers lack their KV cache from the start of training to the end of the sync, so
the fullest moment is the trainer's weights beside a server's:

    generate   servers: weights, KV cache     trainer: nothing
    train      servers: nothing               trainer: weights, gradients, optimizer state
    sync       servers: weights               trainer: weights

The probe after a sync is asked in a turn of the servers, and computed by the trainer in one more turn of the sync. An
evaluation is such a turn too.

What stays on a device either way: CUDA contexts, communicators, captured graphs, the modules' small buffers, and of
Transformer Engine's layers a placeholder for each shape of a weight's gradient.

Several ranks on GPUs have not been run: see docs/gpu-checklist.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.platform import device
from drpo_megatron.platform.distributed import control_group, from_rank_0
from drpo_megatron.rollout.memory import FleetMemory
from drpo_megatron.training.step import Policy

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    from drpo_megatron.training.experience import Experience


class Placement(Protocol):
    """The turns. Every method is collective, may be called again without effect, and survives dead servers: their
    memory is free, and who needs them next finds them dead.
    """

    def start(self, build: Callable[[], Policy]) -> Policy:
        """Wait for the servers and build the policy."""

    def after_sync(self) -> None:
        """The weights arrived and were compared: sampling goes on where the servers have devices of their own."""

    def for_generation(self) -> None:
        """The servers generate next, with weights that were pushed."""

    def for_training(self) -> None:
        """The trainer is whole on its devices: to train, and to write a checkpoint or the model."""

    def for_sync(self) -> None:
        """The trainer's weights and the servers' are both on their devices: to push them, and for a forward pass."""

    def for_probe(self) -> None:
        """The servers compute, with weights that were just pushed; sampling does not go on yet."""


def placement_of(config: RunConfig, experience: Experience | None) -> Placement:
    """`experience` is rank 0's; None on the other ranks."""
    if config.rollout.placement == "colocated" and config.rollout.from_dump is None:
        return Colocated(experience, config.sync.timeout_s)
    return Disaggregated(experience)


class Disaggregated:
    """Trainer and servers hold what they have."""

    def __init__(self, experience: Experience | None) -> None:
        self._experience = experience

    def start(self, build: Callable[[], Policy]) -> Policy:
        policy = build()  # while the servers load their weights
        if self._experience:
            self._experience.connect()
        return policy

    def after_sync(self) -> None:
        if self._experience:
            self._experience.go_on()

    def for_generation(self) -> None:
        pass

    def for_training(self) -> None:
        pass

    def for_sync(self) -> None:
        pass

    def for_probe(self) -> None:
        pass


class Colocated:
    """Whoever gives memory back does it on every rank before anyone takes it.

    SGLang sizes its KV cache by the memory it finds free, so servers start on empty devices: a dead one in the turn of
    generation, or when none is left.
    """

    def __init__(self, experience: Experience | None, timeout_s: float) -> None:
        self._experience = experience
        self._servers = FleetMemory(experience.fleet, timeout_s) if experience else None

    def start(self, build: Callable[[], Policy]) -> Policy:
        if self._experience and self._servers:
            self._experience.connect()
            self._servers.release("kv_cache", "weights")
        _barrier()
        policy = build()
        self._trainer = TrainerMemory(policy.chunks, policy.optimizer)
        return policy

    def after_sync(self) -> None:
        pass

    def for_generation(self) -> None:
        """Raises RuntimeError when no sync brought the servers' weights back."""
        goes_on = self._experience is not None and self._experience.fleet.is_lent
        self.for_probe()
        if self._experience and goes_on:
            self._experience.go_on()

    def for_training(self) -> None:
        if self._servers:
            self._servers.release("kv_cache", "weights")
        _barrier()
        self._trainer.to_device()

    def for_sync(self) -> None:
        while not from_rank_0(self._servers.release("kv_cache") if self._servers else None):
            self._trainer.to_host()
            _barrier()
            if self._servers:
                self._servers.wait_any()
        self._trainer.weights_to_device()
        self._trainer.training_state_to_host()
        _barrier()
        if self._servers:
            self._servers.resume_weights()

    def for_probe(self) -> None:
        self._trainer.to_host()
        _barrier()
        if self._servers:
            self._servers.resume_all()


def _barrier() -> None:
    dist.barrier(control_group())


class TrainerMemory:
    """Moves this rank's weights and training state (gradient buffers, optimizer state) between its device and the host.

    `chunks`: Megatron's DDP around each model chunk, `optimizer`: built over them, both where they belong. Gradients
    are not kept: they are zero afterwards.

    Megatron-Core 0.19.2 moves its buffers by freeing the storage behind them: every view into them stays valid, so
    parameters, gradients, shards and the hooks of the backward need nothing. Its optimizers instead give each of their
    parameters other memory. That is right for fp32 main weights, which are the optimizer's own. It is not for fp32
    models, whose parameters the optimizer shares: without the distributed optimizer, torch then makes a new gradient
    accumulator for a parameter, and DDP's hook on the old one never runs again, so gradients are lost without an error;
    with it, shards are cut from the buffer and cost memory of their own from then on. Such optimizers' states, and
    parameters that are in no buffer (all of them without the distributed optimizer), are moved here, in Megatron's
    first way.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        self._chunks = chunks
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        of_model = {_address(p) for p in parameters}
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        self._owning: list[MegatronOptimizer] = []
        self._sharing: list[MegatronOptimizer] = []
        for part in parts:
            shares = any(_address(p) in of_model for group in part.param_groups for p in group["params"])
            (self._sharing if shares else self._owning).append(part)
        buffered = {_address(b.param_data) for b in self._buffers() if b.param_data is not None}
        self._outside = [p for p in parameters if _address(p) not in buffered]
        self._parked_weights = ParkedStorages()
        self._parked_state = ParkedStorages()
        self._weights_are_here = self._state_is_here = True

    def to_host(self) -> None:
        """Everything; repeated calls do nothing. What is on the host must not be read."""
        self.training_state_to_host()
        self.weights_to_host()

    def to_device(self) -> None:
        """Everything; repeated calls do nothing."""
        self.weights_to_device()
        self.training_state_to_device()

    def weights_to_host(self) -> None:
        if not self._weights_are_here:
            return
        torch.cuda.synchronize()
        for buffer in self._buffers():
            buffer.offload_to_cpu(move_params=True, move_grads=False)
        self._parked_weights.park(self._outside)
        torch.cuda.empty_cache()
        self._weights_are_here = False

    def weights_to_device(self) -> None:
        if self._weights_are_here:
            return
        for buffer in self._buffers():
            buffer.reload_from_cpu(move_params=True, move_grads=False)
        self._parked_weights.restore()
        torch.cuda.synchronize()
        self._weights_are_here = True

    def training_state_to_host(self) -> None:
        if not self._state_is_here:
            return
        torch.cuda.synchronize()
        for part in self._owning:
            part.offload_to_cpu()
        self._parked_state.park(tensor for part in self._sharing for tensor in _state(part))
        for chunk in self._chunks:
            chunk.offload_grad_buffers()
        self._state_is_here = False

    def training_state_to_device(self) -> None:
        if self._state_is_here:
            return
        for chunk in self._chunks:
            chunk.restore_grad_buffers()
        for part in self._owning:
            part.restore_from_cpu()
        self._parked_state.restore()
        torch.cuda.synchronize()
        self._state_is_here = True

    def _buffers(self) -> Iterator[_ParamAndGradBuffer]:
        for chunk in self._chunks:
            yield from chunk.buffers
            yield from chunk.expert_parallel_buffers


class ParkedStorages:
    """Frees the device memory behind tensors and keeps its bytes in pinned host memory. The tensors and all views of
    them stay the objects that they are, and have their values again after `restore`.
    """

    def __init__(self) -> None:
        self._parked: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    def park(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tensors that are not on this process's device, or already parked, stay as they are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device != device() or not storage.nbytes():
                continue
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=True)
            host.copy_(_bytes(storage))
            self._parked.append((storage, host))
            storage.resize_(0)

    def restore(self) -> None:
        for storage, host in self._parked:
            storage.resize_(host.nbytes)
            _bytes(storage).copy_(host)
        self._parked = []


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _state(part: MegatronOptimizer) -> Iterator[torch.Tensor]:
    for values in part.optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))
