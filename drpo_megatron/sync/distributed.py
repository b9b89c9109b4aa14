"""Weights by broadcast: the trainer's rank 0 and the server's tensor-parallel ranks in one process group.

NCCL between devices, gloo without. One bucket is on the wire while the next is prepared.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from drpo_megatron.config.schema import SyncConfig
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError, ServerRequestError
from drpo_megatron.sync.buckets import Bucket, make_buckets
from drpo_megatron.sync.verify import ExpectedChecksums, ServerLayout

_ADDRESS = "127.0.0.1"
_MIB = 2**20
_connections = itertools.count()  # a group name is used once in a process


@dataclass(frozen=True)
class SyncReport:
    """What one push did. `verified`: parameters (of one rank) whose checksum was compared, 0 when none were."""

    version: int
    tensors: int
    buckets: int
    bytes: int
    seconds: float
    verified: int


class DistributedTransport:
    """Pushes weights to one server. Lives on the trainer's global rank 0.

    `layout` describes the server's sharding (for the checksums), `backend` and `device` are those of the platform. The
    process group exists from the first `push` or `connect` on. Its creation and every push are bounded by
    `config.timeout_s`; a server that dies meanwhile is a ServerDied or ServerRequestError.
    """

    def __init__(self, url: str, config: SyncConfig, layout: ServerLayout, backend: str, device: torch.device) -> None:
        self._admin = ServerAdmin(url)
        self._config = config
        self._layout = layout
        self._backend = backend
        self._device = device
        self._group: dist.ProcessGroup | None = None
        self._group_name = ""
        self._requests = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weight-sync")
        self._pushes = 0

    def connect(self) -> None:
        """Create the process group with the server's ranks. Raises ServerError when the server does not join."""
        timeout_s = self._config.timeout_s
        # a server that is gone fails here at once; the rendezvous would wait for it
        self._admin.model_info(min(timeout_s, 30.0))
        self._group_name = f"drpo-weights-{next(_connections)}"
        world_size = 1 + self._layout.tensor_parallel
        # not through rendezvous(): under torchrun that joins the agent's store instead of opening one
        store = dist.TCPStore(
            _ADDRESS, 0, world_size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        joined = self._requests.submit(
            self._admin.init_weights_update_group,
            address=_ADDRESS,
            port=store.port,
            world_size=world_size,
            group_name=self._group_name,
            backend=self._backend,
            timeout_s=timeout_s,
        )
        try:
            self._group = _process_group(self._backend, store, world_size, self._group_name, timeout_s)
        except RuntimeError as error:
            raise ServerRequestError(f"the server did not join the weight group: {error}") from error
        joined.result()
        self._pushes = 0

    def reconnect(self, url: str) -> None:
        """Leave the group of a server that was restarted and connect to the new one at `url`.

        The first push afterwards compares checksums.
        """
        self.close(server_alive=False)
        self._admin = ServerAdmin(url)
        self.connect()

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Replace all weights of the server by a stream of full Hugging Face tensors and name them `version`.

        Running requests, if any, wait and go on with the new weights. Tensors must not change before the push returns.
        Checksums are compared after the first push and then after every `verify_every`th, before the server generates
        again. Raises ServerDied, ServerRequestError or SyncMismatch; the server then stays paused, with weights that
        must not be used, until it is restarted or a later push succeeds. The stream is consumed to its end either way,
        because other ranks may take part in producing it.
        """
        stream = iter(named_tensors)
        try:
            return self._push(stream, version)
        except ServerError:
            for _ in stream:
                pass
            raise

    def close(self, *, server_alive: bool = True) -> None:
        """Leave the process group. With `server_alive` the server leaves it too."""
        if self._group is None:
            return
        if server_alive:
            self._admin.destroy_weights_update_group(self._group_name, min(self._config.timeout_s, 30.0))
        dist.destroy_process_group(self._group)
        self._group = None

    def _push(self, stream: Iterator[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        if self._group is None:
            self.connect()
        start = time.monotonic()
        deadline = _Deadline(start + self._config.timeout_s)
        expected = ExpectedChecksums(self._layout, self._device) if self._verification_is_due() else None
        self._admin.pause_generation("retract", deadline.left())
        self._admin.begin_weight_update(deadline.left())
        try:
            tensors, buckets, size = self._send(_tee(stream, expected), deadline)
        finally:
            # an update that was left open would refuse the next one
            self._admin.end_weight_update(deadline.left())
        verified = expected.verify(self._admin.weight_checksums(deadline.left())) if expected else 0
        self._admin.set_weight_version(version, deadline.left())
        self._admin.continue_generation(deadline.left())
        self._pushes += 1
        return SyncReport(version, tensors, buckets, size, time.monotonic() - start, verified)

    def _verification_is_due(self) -> bool:
        every = self._config.verify_every
        return self._pushes == 0 or (every > 0 and self._pushes % every == 0)

    def _send(self, stream: Iterable[tuple[str, torch.Tensor]], deadline: _Deadline) -> tuple[int, int, int]:
        """Send all buckets; return the numbers of tensors, buckets and bytes."""
        tensors = buckets = size = 0
        in_flight: _InFlight | None = None
        for bucket in make_buckets(stream, max(1, int(self._config.bucket_mb * _MIB))):
            flat = bucket.flatten(self._device)
            if in_flight is not None:
                in_flight.finish(deadline)
            # the first bucket drops the cache of the former weights: nothing runs until the push is complete
            in_flight = self._start(bucket, flat, deadline, flush_cache=buckets == 0)
            tensors, buckets, size = tensors + len(bucket.names), buckets + 1, size + flat.nbytes
        if in_flight is None:
            raise ValueError("a weight update without tensors: the stream was empty")
        in_flight.finish(deadline)
        return tensors, buckets, size

    def _start(self, bucket: Bucket, flat: torch.Tensor, deadline: _Deadline, *, flush_cache: bool) -> _InFlight:
        answer = self._requests.submit(
            self._admin.update_weights_from_distributed,
            names=bucket.names,
            dtypes=bucket.dtypes,
            shapes=bucket.shapes,
            group_name=self._group_name,
            flush_cache=flush_cache,
            timeout_s=deadline.left(),
        )
        return _InFlight(flat, answer, dist.broadcast(flat, src=0, group=self._group, async_op=True))


@dataclass
class _InFlight:
    """One bucket on the wire; keeps its bytes until the server has them."""

    flat: torch.Tensor
    answer: Future[None]
    broadcast: dist.Work

    def finish(self, deadline: _Deadline) -> None:
        # the answer first: when the server fails or dies the broadcast may never end, and its error says less
        self.answer.result()
        try:
            self.broadcast.wait(timedelta(seconds=deadline.left()))
        except RuntimeError as error:
            raise ServerRequestError(f"the broadcast of a weight bucket failed: {error}") from error


@dataclass(frozen=True)
class _Deadline:
    at: float

    def left(self) -> float:
        """Seconds until the limit of this push. Raises ServerRequestError when it has passed."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise ServerRequestError("a weight sync took longer than sync.timeout_s: raise it, or find what stalls")
        return left


def _tee(
    stream: Iterator[tuple[str, torch.Tensor]], expected: ExpectedChecksums | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        if expected is not None:
            expected.add(name, tensor)
        yield name, tensor


def _process_group(backend: str, store: dist.Store, world_size: int, name: str, timeout_s: float) -> dist.ProcessGroup:
    """A group of rank 0 here and ranks that are not in the default group of this process.

    The counterpart of `sglang.srt.utils.common.init_custom_process_group`: torch has no public call for a group across
    jobs, so both sides must prefix the store and register the group in the same way.
    """
    group, _ = c10d._new_process_group_helper(
        world_size,
        0,
        [],
        c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=timeout_s),
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
