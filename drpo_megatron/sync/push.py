"""A weight push: pause the servers, send the tensors by the chosen transport, prove that they arrived, go on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drpo_megatron.config.schema import SyncConfig
from drpo_megatron.platform import backend, device
from drpo_megatron.rollout.errors import ServerError, ServersFailed
from drpo_megatron.sync.buckets import Bucket, make_buckets
from drpo_megatron.sync.delta import DeltaTransport
from drpo_megatron.sync.disk import DiskTransport
from drpo_megatron.sync.distributed import DistributedTransport
from drpo_megatron.sync.receivers import Receivers
from drpo_megatron.sync.shared_memory import SharedMemoryTransport
from drpo_megatron.sync.transport import Deadline, Transport
from drpo_megatron.sync.verify import ExpectedChecksums, ServerLayout

_MIB = 2**20
_PROBE_S = 20.0  # of a server that may be busy with loading a bucket


@dataclass(frozen=True)
class SyncReport:
    """What one push did. `bytes`: that went out. `verified`: parameters (of one rank) whose checksum was compared, 0
    when none were. `delta_share`: `bytes` over those of the weights, for the delta transport only.
    """

    version: int
    tensors: int
    buckets: int
    bytes: int
    seconds: float
    verified: int
    delta_share: float | None = None


class WeightSync:
    """Pushes weights to the servers of a fleet. Lives on the trainer's global rank 0.

    `layout` describes a server's sharding, `source` is the model's Hugging Face directory, `directory` where the disk
    and delta transports write if the configuration does not say. Connecting and every push are bounded by
    `config.timeout_s`.
    """

    def __init__(
        self, config: SyncConfig, layout: ServerLayout, source: Path, directory: Path, api_key: str | None = None
    ) -> None:
        self._config = config
        self._layout = layout
        self._source = source
        self._directory = config.directory or directory
        self._api_key = api_key
        self._urls: list[str] = []
        self._comebacks = 0
        self._receivers: Receivers | None = None
        self._transport: Transport | None = None
        self._pushes = 0

    def connect(self, urls: Sequence[str], comebacks: int = 0) -> None:
        """Open the way to the servers at `urls`; nothing happens when it is open. Leaves servers that are not among
        them, without asking them. Raises as `push` does.

        comebacks: grows whenever another process may answer at the address of one, which knows nothing of this way.
        """
        if self._transport is not None and (list(urls), comebacks) == (self._urls, self._comebacks):
            return
        self.close(servers_alive=False)
        self._urls, self._comebacks, self._pushes = list(urls), comebacks, 0
        self._receivers = Receivers(urls, self._layout.tensor_parallel, self._api_key)
        transport = self._make_transport(self._receivers)
        try:
            transport.connect()
        except ServerError as error:
            raise self._reason(error) from error
        self._transport = transport

    def push(
        self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, *, stay_paused: bool = False
    ) -> SyncReport:
        """Replace all weights of the servers by a stream of full Hugging Face tensors and name them `version`.

        Running requests, if any, wait and go on with the new weights. Tensors must not change before the push returns.
        Checksums are compared after the first push to these servers and then after every `verify_every`th, before the
        servers generate again. Raises ServersFailed with the servers that do not answer any more, and SyncMismatch or
        ServerRequestError when all of them do; servers then stay paused, with weights that must not be used, until they
        are restarted or a later push succeeds, for which `connect` is to be called again. The stream is consumed to its
        end either way, because other ranks may take part in producing it. `stay_paused`: do not let the servers
        generate afterwards.
        """
        stream = iter(named_tensors)
        try:
            return self._push(stream, version, stay_paused)
        except ServerError as error:
            for _ in stream:
                pass
            raise self._reason(error) from error

    def close(self, *, servers_alive: bool = True) -> None:
        """Close the transport, on living servers too."""
        if self._transport is not None:
            self._transport.close(servers_alive=servers_alive)
            self._transport = None
        if self._receivers is not None:
            self._receivers.close()
            self._receivers = None

    def _reason(self, error: ServerError) -> ServerError:
        """Close, and tell which servers are gone; `error` itself when all answer."""
        assert self._receivers is not None
        if self._transport is not None:
            # a server that waits for this process answers once the connection is closed
            self._transport.close(servers_alive=False)
            self._transport = None
        gone = self._receivers.unresponsive(_PROBE_S)
        self.close(servers_alive=False)
        if not gone:
            return error
        said = error.reasons if isinstance(error, ServersFailed) else {}
        return ServersFailed({url: said.get(url, reason) for url, reason in gone.items()})

    def _make_transport(self, receivers: Receivers) -> Transport:
        config = self._config
        if config.transport == "shared_memory":
            return SharedMemoryTransport(receivers)
        if config.transport == "disk":
            return DiskTransport(receivers, self._directory, self._source, self._bucket_bytes)
        if config.transport == "delta":
            return DeltaTransport(receivers, self._directory)
        return DistributedTransport(receivers, config.address, backend(), device(), config.timeout_s)

    def _push(self, stream: Iterator[tuple[str, torch.Tensor]], version: int, stay_paused: bool) -> SyncReport:
        if self._transport is None or self._receivers is None:
            raise RuntimeError("connect() before push()")
        start = time.monotonic()
        deadline = Deadline.after(self._config.timeout_s)
        expected = ExpectedChecksums(self._layout, device()) if self._verification_is_due() else None
        buckets = make_buckets(_tee(stream, expected), self._bucket_bytes)
        first = next(buckets, None)
        if first is None:
            raise ValueError("a weight update without tensors: the stream was empty")
        sent = _Count()
        servers = self._receivers
        servers.each(lambda server: server.pause_generation("retract", deadline.left()))
        encoded = self._transport.send(sent.pass_on(itertools.chain([first], buckets)), deadline)
        verified = 0
        if expected:
            for checksums in servers.each(lambda server: server.weight_checksums(deadline.left())):
                verified = expected.verify(checksums)
        servers.each(lambda server: server.set_weight_version(version, deadline.left()))
        if not stay_paused:
            servers.each(lambda server: server.continue_generation(deadline.left()))
        self._pushes += 1
        return SyncReport(
            version,
            sent.tensors,
            sent.buckets,
            sent.nbytes if encoded is None else encoded,
            time.monotonic() - start,
            verified,
            delta_share=None if encoded is None else encoded / sent.nbytes,
        )

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
