"""Weights through host memory that trainer and servers map, for servers on the trainer's host.

Buckets alternate between two buffers that live as long as the connection: one is filled while the servers load the
other. Only names, shapes and the handle of a buffer go through HTTP.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from drpo_megatron.sync.buckets import Bucket, FlatBuffers
from drpo_megatron.sync.receivers import Answers, Receivers
from drpo_megatron.sync.transport import Deadline, weight_update


class SharedMemoryTransport:
    """Implements `Transport`."""

    def __init__(self, receivers: Receivers) -> None:
        self._receivers = receivers
        self._flats = FlatBuffers(_shared)

    def connect(self) -> None:
        pass

    def send(self, buckets: Iterator[Bucket], deadline: Deadline) -> None:
        with weight_update(self._receivers, deadline, abandon=self._release):
            loading: Answers[None] | None = None
            for index, bucket in enumerate(buckets):
                views = list(zip(bucket.names, bucket.views(self._flats.fill(bucket)), strict=True))
                if loading is not None:
                    loading.result()
                # the first bucket drops the cache of the former weights: nothing runs until the push is complete
                loading = self._start(views, deadline.left(), flush_cache=index == 0)
            if loading is not None:
                loading.result()

    def close(self, *, servers_alive: bool) -> None:
        self._release()

    def _release(self) -> None:
        self._flats = FlatBuffers(_shared)

    def _start(self, views: list[tuple[str, torch.Tensor]], timeout_s: float, *, flush_cache: bool) -> Answers[None]:
        # A serialized tensor is counted as one user of the memory: one for each rank that will open it.
        payloads = {s.url: [serialize(views) for _ in range(self._receivers.ranks)] for s in self._receivers.admins}
        return self._receivers.start(
            lambda server: server.update_weights_from_tensor(
                payloads=payloads[server.url], flush_cache=flush_cache, timeout_s=timeout_s
            )
        )


def serialize(named_tensors: list[tuple[str, torch.Tensor]]) -> str:
    """Handles of the tensors' memory as SGLang reads them (`sglang.srt.utils.MultiprocessingSerializer`), in base64."""
    buffer = io.BytesIO()
    with _named_files():
        ForkingPickler(buffer).dump(named_tensors)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _shared(nbytes: int) -> torch.Tensor:
    with _named_files():
        memory: torch.Tensor = torch.empty(nbytes, dtype=torch.uint8).share_memory_()
    return memory


@contextlib.contextmanager
def _named_files() -> Iterator[None]:
    """Shared memory by name. By default torch hands on file descriptors, which only a child or a socket can take."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
