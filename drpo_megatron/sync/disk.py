"""Weights through a file system, for servers that share no network of devices with the trainer.

Each push writes a Hugging Face directory, asks the servers to load it, and removes it.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from drpo_megatron.rollout.errors import ServerRequestError
from drpo_megatron.sync.buckets import Bucket
from drpo_megatron.sync.receivers import Receivers
from drpo_megatron.sync.transport import Deadline
from drpo_megatron.weights.hf_io import SafetensorsWriter

log = logging.getLogger(__name__)


class DiskTransport:
    """Implements `Transport`. `directory`: a path that trainer and servers have. `source`: the model's Hugging Face
    directory, for the files beside the weights. `shard_bytes`: of a file, and held in memory.
    """

    def __init__(self, receivers: Receivers, directory: Path, source: Path, shard_bytes: int) -> None:
        self._receivers = receivers
        self._directory = directory
        self._source = source
        self._shard_bytes = shard_bytes
        self._private: Path | None = None
        self._numbers = itertools.count()

    def connect(self) -> None:
        """Raises ServerRequestError when the directory cannot be made."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._private = Path(tempfile.mkdtemp(prefix="weights-", dir=self._directory))  # for this user alone
        except OSError as error:
            raise ServerRequestError(f"no weights can be written to {self._directory}: {error}") from error

    def send(self, buckets: Iterator[Bucket], deadline: Deadline) -> None:
        if self._private is None:
            raise RuntimeError("connect() before send()")
        model = self._private / f"model-{next(self._numbers)}"
        try:
            self._write(model, buckets)
            self._receivers.each(
                lambda server: server.update_weights_from_disk(model_path=str(model), timeout_s=deadline.left())
            )
            self._receivers.each(lambda server: server.wait_for_ranks(deadline.left()))
        finally:
            remove(model)

    def close(self, *, servers_alive: bool) -> None:
        if self._private is not None:
            remove(self._private)
            self._private = None

    def _write(self, model: Path, buckets: Iterator[Bucket]) -> None:
        writer = SafetensorsWriter(model, self._source, self._shard_bytes)
        try:
            for bucket in buckets:
                writer.add(list(zip(bucket.names, bucket.tensors, strict=True)))
            writer.commit()
        except BaseException as error:
            writer.abort()
            if not isinstance(error, OSError | SafetensorError):
                raise
            raise ServerRequestError(
                f"the weights could not be written to {self._directory}: {error}; "
                "make room, or set sync.directory to another path that the servers have"
            ) from error


def remove(directory: Path) -> None:
    """With its files. What cannot be removed is said and stays: a network file system keeps files that the server has
    open.
    """
    if directory.exists():
        shutil.rmtree(directory, onexc=lambda _, path, error: log.warning("%s is left behind: %s", path, error))
