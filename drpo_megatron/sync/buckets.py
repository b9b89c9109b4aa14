"""Flattened buckets: many tensors as one byte tensor, in SGLang's `load_format: flattened_bucket`.

The receiver (SGLang's FlattenedTensorBucket) cuts the bytes by names, dtypes and shapes in order and views each piece
in its dtype, so every offset must be a multiple of the element size. A bucket holds one dtype, which makes it so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class Bucket:
    """Tensors of one dtype that travel together."""

    names: list[str] = field(default_factory=list)
    tensors: list[torch.Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def dtypes(self) -> list[str]:
        """Dtype of each tensor by its torch name without the prefix, for example `bfloat16`."""
        return [str(t.dtype).removeprefix("torch.") for t in self.tensors]

    @property
    def shapes(self) -> list[list[int]]:
        return [list(t.shape) for t in self.tensors]

    def flatten(self, device: torch.device) -> torch.Tensor:
        """The bytes of all tensors in order, uint8 [nbytes] on `device`: a copy, free of the tensors it came from."""
        return self.write(torch.empty(self.nbytes, dtype=torch.uint8, device=device))

    def write(self, flat: torch.Tensor) -> torch.Tensor:
        """The same, as the beginning of `flat`, uint8 of at least nbytes."""
        for view, tensor in zip(self.views(flat), self.tensors, strict=True):
            view.copy_(tensor)
        return flat[: self.nbytes]

    def views(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each tensor's place in `flat`, uint8 of at least nbytes, in its dtype and shape."""
        offset = 0
        for tensor in self.tensors:
            yield flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            offset += tensor.nbytes


class FlatBuffers:
    """Two buffers that take buckets in turn: one is filled while the other is on the wire or being loaded.

    `allocate(nbytes)` makes an uint8 tensor; it is called only where a buffer is too small.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._buffers: list[torch.Tensor | None] = [None, None]

    def fill(self, bucket: Bucket) -> torch.Tensor:
        """What `bucket.write` returns; it holds until the next call but one."""
        buffer = self._buffers[0]
        if buffer is None or buffer.nbytes < bucket.nbytes:
            self._buffers[0] = buffer = None  # before the larger one is made
            buffer = self._allocate(bucket.nbytes)
        self._buffers = [self._buffers[1], buffer]
        return bucket.write(buffer)


def make_buckets(named_tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Group a stream of tensors, in its order, into buckets of one dtype and at most `max_bytes` each.

    A tensor larger than that is a bucket of its own. A change of dtype starts a new bucket. Holds one bucket at a time.
    Raises ValueError for `max_bytes` < 1, for a tensor without elements and for a name that comes twice.
    """
    if max_bytes < 1:
        raise ValueError(f"a bucket holds at least one byte, not {max_bytes}: raise sync.bucket_mb")
    seen: set[str] = set()
    bucket = Bucket()
    size = 0
    for name, tensor in named_tensors:
        if name in seen:
            raise ValueError(f"tensor {name} comes twice in one weight update")
        if tensor.numel() == 0:
            raise ValueError(f"tensor {name} of shape {list(tensor.shape)} has no elements")
        seen.add(name)
        if bucket.tensors and (size + tensor.nbytes > max_bytes or tensor.dtype != bucket.tensors[0].dtype):
            yield bucket
            bucket, size = Bucket(), 0
        bucket.names.append(name)
        bucket.tensors.append(tensor.detach())
        size += tensor.nbytes
    if bucket.tensors:
        yield bucket
