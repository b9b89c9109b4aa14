"""Weights through a file system, for a server that shares no network of devices with the trainer.

Each push writes a Hugging Face directory, asks the server to load it, and removes it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerRequestError
from drpo_megatron.sync.buckets import Bucket
from drpo_megatron.sync.transport import Deadline
from drpo_megatron.weights.hf_io import SafetensorsWriter


class DiskTransport:
    """Implements `Transport`. `directory`: a path that trainer and server both have. `source`: the model's Hugging Face
    directory, for the files beside the weights. `shard_bytes`: of a file, and held in memory.
    """

    def __init__(self, admin: ServerAdmin, directory: Path, source: Path, shard_bytes: int) -> None:
        self._admin = admin
        self._directory = directory
        self._source = source
        self._shard_bytes = shard_bytes
        self._private: Path | None = None

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
        model = self._private / "model"
        try:
            self._write(model, buckets)
            self._admin.update_weights_from_disk(model_path=str(model), timeout_s=deadline.left())
        finally:
            shutil.rmtree(model, ignore_errors=True)

    def close(self, *, server_alive: bool) -> None:
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    def _write(self, model: Path, buckets: Iterator[Bucket]) -> None:
        writer = SafetensorsWriter(model, self._source, self._shard_bytes)
        try:
            for bucket in buckets:
                writer.add(list(zip(bucket.names, bucket.tensors, strict=True)))
            writer.commit()
        except (OSError, SafetensorError) as error:
            writer.abort()
            raise ServerRequestError(
                f"the weights could not be written to {self._directory}: {error}; "
                "make room, or set sync.directory to another path that the server has"
            ) from error
        except BaseException:
            writer.abort()
            raise
