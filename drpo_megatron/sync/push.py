"""A weight push: pause the server, send the stream of tensors by the chosen transport, prove that it arrived, go on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from drpo_megatron.config.schema import SyncConfig
from drpo_megatron.platform import backend, device
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError
from drpo_megatron.sync.buckets import Bucket, make_buckets
from drpo_megatron.sync.disk import DiskTransport
from drpo_megatron.sync.distributed import DistributedTransport
from drpo_megatron.sync.shared_memory import SharedMemoryTransport
from drpo_megatron.sync.transport import Deadline, Transport
from drpo_megatron.sync.verify import ExpectedChecksums, ServerLayout

_MIB = 2**20


@dataclass(frozen=True)
class SyncReport:
    """What one push did. `verified`: parameters (of one rank) whose checksum was compared, 0 when none were."""

    version: int
    tensors: int
    buckets: int
    bytes: int
    seconds: float
    verified: int


class WeightSync:
    """Pushes weights to one server. Lives on the trainer's global rank 0.

    `layout` describes the server's sharding, `source` is the model's Hugging Face directory, `directory` where the
    disk transport writes if the configuration does not say. The transport is open from the first `push` or `connect`
    on. Opening it and every push are bounded by `config.timeout_s`; a server that dies meanwhile is a ServerDied or
    ServerRequestError.
    """

    def __init__(self, url: str, config: SyncConfig, layout: ServerLayout, source: Path, directory: Path) -> None:
        self._admin = ServerAdmin(url)
        self._config = config
        self._layout = layout
        self._source = source
        self._directory = config.directory or directory
        self._transport: Transport | None = None
        self._pushes = 0

    def connect(self) -> None:
        """Open the transport. Raises ServerError when the server does not take part."""
        transport = self._make_transport()
        transport.connect()
        self._transport = transport
        self._pushes = 0

    def reconnect(self, url: str) -> None:
        """Leave a server that was restarted and connect to the new one at `url`.

        The first push afterwards compares checksums.
        """
        self.close(server_alive=False)
        self._admin = ServerAdmin(url)
        self.connect()

    def push(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, stay_paused: bool = False
    ) -> SyncReport:
        """Replace all weights of the server by a stream of full Hugging Face tensors and name them `version`.

        Running requests, if any, wait and go on with the new weights. Tensors must not change before the push returns.
        Checksums are compared after the first push and then after every `verify_every`th, before the server generates
        again. Raises ServerDied, ServerRequestError or SyncMismatch; the server then stays paused, with weights that
        must not be used, until it is restarted or a later push succeeds. The stream is consumed to its end either way,
        because other ranks may take part in producing it. `stay_paused`: do not let the server generate afterwards.
        """
        stream = iter(named_tensors)
        try:
            return self._push(stream, version, stay_paused)
        except ServerError:
            for _ in stream:
                pass
            raise

    def close(self, *, server_alive: bool = True) -> None:
        """Close the transport, on a living server too."""
        if self._transport is not None:
            self._transport.close(server_alive=server_alive)
            self._transport = None

    def _make_transport(self) -> Transport:
        config, ranks = self._config, self._layout.tensor_parallel
        if config.transport == "shared_memory":
            return SharedMemoryTransport(self._admin, ranks)
        if config.transport == "disk":
            return DiskTransport(self._admin, self._directory, self._source, self._bucket_bytes)
        return DistributedTransport(self._admin, ranks, backend(), device(), config.timeout_s)

    def _push(self, stream: Iterator[tuple[str, torch.Tensor]], version: int, stay_paused: bool) -> SyncReport:
        if self._transport is None:
            self.connect()
        assert self._transport is not None
        start = time.monotonic()
        deadline = Deadline.after(self._config.timeout_s)
        expected = ExpectedChecksums(self._layout, device()) if self._verification_is_due() else None
        buckets = make_buckets(_tee(stream, expected), self._bucket_bytes)
        first = next(buckets, None)
        if first is None:
            raise ValueError("a weight update without tensors: the stream was empty")
        sent = _Count()
        self._admin.pause_generation("retract", deadline.left())
        self._transport.send(sent.pass_on(itertools.chain([first], buckets)), deadline)
        verified = expected.verify(self._admin.weight_checksums(deadline.left())) if expected else 0
        self._admin.set_weight_version(version, deadline.left())
        if not stay_paused:
            self._admin.continue_generation(deadline.left())
        self._pushes += 1
        return SyncReport(version, sent.tensors, sent.buckets, sent.nbytes, time.monotonic() - start, verified)

    @property
    def _bucket_bytes(self) -> int:
        return max(1, int(self._config.bucket_mb * _MIB))

    def _verification_is_due(self) -> bool:
        every = self._config.verify_every
        return self._pushes == 0 or (every > 0 and self._pushes % every == 0)


@dataclass
class _Count:
    """Of the buckets that went by."""

    tensors: int = 0
    buckets: int = 0
    nbytes: int = 0

    def pass_on(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        for bucket in buckets:
            self.tensors += len(bucket.names)
            self.buckets += 1
            self.nbytes += bucket.nbytes
            yield bucket


def _tee(
    stream: Iterator[tuple[str, torch.Tensor]], expected: ExpectedChecksums | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in stream:
        if expected is not None:
            expected.add(name, tensor)
        yield name, tensor
