"""Weights by broadcast: the trainer's rank 0 and the tensor-parallel ranks of all servers in one process group.

NCCL between devices, gloo without. One bucket is on the wire while the next is prepared.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from drpo_megatron.rollout.errors import ServerRequestError
from drpo_megatron.sync.buckets import Bucket, FlatBuffers
from drpo_megatron.sync.receivers import Answers, Receivers
from drpo_megatron.sync.transport import Deadline, weight_update


class DistributedTransport:
    """Implements `Transport`. `address`: where the servers reach this process. `backend` and `device` are the
    platform's.

    The process group exists from `connect` on; its creation is bounded by `timeout_s`. NCCL connects the devices in the
    first broadcast only, which is not bounded by it. With NCCL none of this has been run: see docs/gpu-checklist.md.
    """

    def __init__(
        self, receivers: Receivers, address: str, backend: str, device: torch.device, timeout_s: float
    ) -> None:
        self._receivers = receivers
        self._address = address
        self._backend = backend
        self._device = device
        self._timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""

    def connect(self) -> None:
        """Create the process group with the servers' ranks. Raises ServerError when a server does not join."""
        timeout_s = self._timeout_s
        # a server that is gone fails here at once; the rendezvous would wait for it
        self._receivers.each(lambda server: server.model_info(min(timeout_s, 30.0)))
        # a server that an earlier run left still has the group of that run
        self._group_name = f"drpo-weights-{uuid.uuid4().hex[:8]}"
        world_size = 1 + self._receivers.world_size
        # not through rendezvous(): under torchrun that joins the agent's store instead of opening one
        store = dist.TCPStore(
            self._address, 0, world_size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        offsets = {server.url: 1 + i * self._receivers.ranks for i, server in enumerate(self._receivers.admins)}
        joined = self._receivers.start(
            lambda server: server.init_weights_update_group(
                address=self._address,
                port=store.port,
                rank_offset=offsets[server.url],
                world_size=world_size,
                group_name=self._group_name,
                backend=self._backend,
                timeout_s=timeout_s,
            )
        )
        try:
            self._group = _process_group(self._backend, store, world_size, self._group_name, timeout_s)
        except RuntimeError as error:
            raise ServerRequestError(f"the servers did not join the weight group: {error}") from error
        joined.result()

    def send(self, buckets: Iterator[Bucket], deadline: Deadline) -> None:
        with weight_update(self._receivers, deadline, abandon=self._abandon):
            in_flight: _InFlight | None = None
            flats = FlatBuffers(partial(torch.empty, dtype=torch.uint8, device=self._device))
            for index, bucket in enumerate(buckets):
                flat = flats.fill(bucket)
                if in_flight is not None:
                    in_flight.finish(deadline)
                # the first bucket drops the cache of the former weights: nothing runs until the push is complete
                in_flight = self._start(bucket, flat, deadline, flush_cache=index == 0)
            if in_flight is not None:
                in_flight.finish(deadline)

    def close(self, *, servers_alive: bool) -> None:
        """Leave the process group. With `servers_alive` the servers leave it too."""
        if self._group is None:
            return
        if not servers_alive:
            self._abandon()
            return
        # All at once: NCCL's ranks of one host wait for each other in it.
        timeout_s = min(self._timeout_s, 30.0)
        left = self._receivers.start(lambda server: server.destroy_weights_update_group(self._group_name, timeout_s))
        dist.destroy_process_group(self._group)
        self._group = None
        left.result()

    def _abandon(self) -> None:
        """Leave servers that may never answer. NCCL would wait for a broadcast that they do not finish, and in orderly
        leaving for them; gloo closes its connections.
        """
        if self._group is None:
            return
        leave = c10d._abort_process_group if self._backend == "nccl" else dist.destroy_process_group
        leave(self._group)
        self._group = None

    def _start(self, bucket: Bucket, flat: torch.Tensor, deadline: Deadline, *, flush_cache: bool) -> _InFlight:
        timeout_s = deadline.left()
        answers = self._receivers.start(
            lambda server: server.update_weights_from_distributed(
                names=bucket.names,
                dtypes=bucket.dtypes,
                shapes=bucket.shapes,
                group_name=self._group_name,
                flush_cache=flush_cache,
                timeout_s=timeout_s,
            )
        )
        broadcast = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        assert broadcast is not None, "this rank is in the group"
        return _InFlight(flat, answers, broadcast)


@dataclass
class _InFlight:
    """One bucket on the wire; keeps its bytes until the servers have them."""

    flat: torch.Tensor
    answers: Answers[None]
    broadcast: dist.Work

    def finish(self, deadline: Deadline) -> None:
        # the answers first: when a server fails or dies the broadcast may never end, and its error says less
        self.answers.result()
        try:
            self.broadcast.wait(timedelta(seconds=deadline.left()))
        except RuntimeError as error:
            raise ServerRequestError(f"the broadcast of a weight bucket failed: {error}") from error


def _process_group(backend: str, store: dist.Store, world_size: int, name: str, timeout_s: float) -> dist.ProcessGroup:
    """A group of rank 0 here and ranks that are not in the default group of this process.

    The counterpart of `sglang.srt.utils.common.init_custom_process_group`: torch has no public call for a group across
    jobs, so both sides must prefix the store and register the group in the same way.
    """
    # NCCL's watchdog ends this process when a broadcast takes longer: its deadline comes first, and leaves the servers.
    timeout_s *= 2 if backend == "nccl" else 1
    group, _ = c10d._new_process_group_helper(
        world_size,
        0,
        [],
        c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timedelta(seconds=timeout_s),
    )
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group"
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
