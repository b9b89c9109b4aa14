"""The receiving end of the delta transport: SGLang calls `load` in each tensor-parallel rank of a server.

It keeps the Hugging Face tensors of the last push in host memory, the base, makes the new ones out of it in place, and
gives all of them to the model, the unchanged too. So it does not matter what the model held: another transport may have
written to it since. What identifies a base is its `Mark`: the random name of the push that made it, and how many of
its buckets arrived. A push that broke off leaves a mark that no complete push has.

The trainer names a file for each bucket and a file for the answer. An answer and not an exception, because an exception
here ends the server, where a base that does not fit only means that whole weights must come.

Loading into a model on a device has not been run: see docs/gpu-checklist.md.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

import torch

from drpo_megatron.sync.delta_codec import DamagedDelta, decode
from drpo_megatron.sync.loader_call import write_answer

_LENGTH_BYTES = 8
_LONGEST_HEADER = 2**26


@dataclass(frozen=True)
class Mark:
    """`buckets` of the push named `push`, 128 random bits in hexadecimal, are in."""

    push: str
    buckets: int


@dataclass(frozen=True)
class Layout:
    """What a bucket's bytes are: tensors in order, all of one dtype, by its torch name without the prefix."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str

    @property
    def item_bytes(self) -> int:
        return self._dtype.itemsize

    @property
    def nbytes(self) -> int:
        return sum(self._sizes)

    @property
    def _dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise DamagedDelta(f"{self.dtype} is no dtype of torch")
        return dtype

    @property
    def _sizes(self) -> list[int]:
        return [self.item_bytes * torch.Size(shape).numel() for shape in self.shapes]

    def views(self, flat: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The tensors by name, in the memory of `flat`, uint8 [bytes of the bucket]."""
        pieces = zip(self.names, flat.split(self._sizes), self.shapes, strict=True)
        return [(name, piece.view(self._dtype).view(shape)) for name, piece, shape in pieces]


@dataclass(frozen=True)
class Header:
    """Before a bucket's bytes in its file. `after`: the mark that the receiver must have, None for the first bucket of
    a whole push. `mark`: the receiver's afterwards. A whole bucket has a `layout`, a delta has none.
    """

    mark: Mark
    after: Mark | None
    layout: Layout | None = None

    def to_bytes(self) -> bytes:
        text = json.dumps(asdict(self)).encode()
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text

    @classmethod
    def read(cls, file: BinaryIO) -> Self:
        """Raises DamagedDelta for anything else than what `to_bytes` wrote."""
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _LONGEST_HEADER:
            raise DamagedDelta(f"a header of {length} bytes")
        try:
            said = json.loads(file.read(length))
            after, layout = said["after"], said["layout"]
            return cls(
                Mark(**said["mark"]),
                None if after is None else Mark(**after),
                None if layout is None else Layout(tuple(layout["names"]), _shapes(layout["shapes"]), layout["dtype"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedDelta(f"a header that is none: {error!r}") from error


@dataclass(frozen=True)
class Answer:
    """Of one rank. `mark`: of its base, None when it has none. `refused`: why the bucket was not loaded, or empty.
    `read_s`: seconds to read the file.
    """

    mark: Mark | None
    refused: str
    read_s: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises OSError or ValueError when there is no answer."""
        said = json.loads(path.read_text())
        return cls(None if said["mark"] is None else Mark(**said["mark"]), said["refused"], said["read_s"])


class Model(Protocol):
    """What is used of SGLang's models."""

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> Any: ...


class Base:
    """The last push's tensors, one flat tensor a bucket, on the host."""

    def __init__(self) -> None:
        self.mark: Mark | None = None
        self._buckets: list[tuple[Layout, torch.Tensor]] = []

    def take(self, path: Path) -> tuple[list[tuple[str, torch.Tensor]], float]:
        """The tensors of the bucket in the file at `path`, which the base then has, and the seconds to read it.

        Raises Refused when it follows on another base, DamagedDelta or OSError when the file is not as it was written.
        After damage behind the header the base is of no use any more.
        """
        start = time.perf_counter()
        with path.open("rb") as file:
            header = Header.read(file)
            if header.after is not None and header.after != self.mark:
                raise Refused(f"the bucket comes after {header.after} and this rank has {self.mark}")
            index = header.mark.buckets - 1
            self.mark = None
            if header.after is None:
                self._buckets.clear()
            if header.layout is not None:
                flat = torch.empty(header.layout.nbytes, dtype=torch.uint8)
                if file.readinto(memoryview(flat.numpy())) != flat.nbytes or file.read(1):
                    raise DamagedDelta(f"{path} does not have the {flat.nbytes} bytes of its header")
                read_s = time.perf_counter() - start
                self._buckets[index : index + 1] = [(header.layout, flat)]
            else:
                encoded = file.read()
                read_s = time.perf_counter() - start
                decode(encoded, self._buckets[index][1].numpy(), self._buckets[index][0].item_bytes)
        self.mark = header.mark
        layout, flat = self._buckets[index]
        return layout.views(flat), read_s


class Refused(Exception):
    """A bucket that follows on another base than this rank's."""


_base = Base()


def load(model: Model, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Load the bucket in a file and write an answer to another; or, without a bucket, only answer.

    The one name in `named_tensors` is a request in JSON: `bucket` (a path, or null) and `answer` (a path).
    """
    ((request, _),) = named_tensors
    paths = json.loads(request)
    refused, read_s = "", 0.0
    if paths["bucket"] is not None:
        try:
            tensors, read_s = _base.take(Path(paths["bucket"]))
        except (Refused, OSError, DamagedDelta) as error:
            refused = f"{type(error).__name__}: {error}"
        else:
            model.load_weights(tensors)
    write_answer(Path(paths["answer"]), json.dumps(asdict(Answer(_base.mark, refused, read_s))))


def _shapes(shapes: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for shape in shapes)
