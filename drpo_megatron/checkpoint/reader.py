"""The weights of a checkpoint by their names in the weight map, read slice by slice, without Megatron's model and
without a process group.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from drpo_megatron.checkpoint.manifest import HF_FILES, STATE, CheckpointError
from drpo_megatron.weights.checkpoint_names import Place, is_weight, parameters_of

Bounds = tuple[tuple[int, int], ...]
"""(start, stop) for each dimension."""


class StoredTensor:
    """A parameter in the files of a checkpoint. Slicing reads the rows that the slice needs.

    Raises CheckpointError, naming the file, for one that ends too early or does not hold what the metadata say.
    """

    def __init__(self, reader: CheckpointReader, place: Place, stored: TensorStorageMetadata) -> None:
        self._reader, self._place, self._stored = reader, place, stored
        self.shape: tuple[int, ...] = tuple(stored.size[len(place.index) :])
        self.dtype: torch.dtype = stored.properties.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """`index`: a slice, or a tuple of slices, of step 1. The result owns its memory and is contiguous."""
        slices: tuple[slice, ...] = index if isinstance(index, tuple) else (index,)
        inner = []
        for size, part in zip(self.shape, (*slices, *[slice(None)] * (len(self.shape) - len(slices))), strict=True):
            start, stop, step = part.indices(size)
            if step != 1:
                raise IndexError(f"{self._place.key}: a step of {step} cannot be read")
            inner.append((start, max(start, stop)))
        wanted: Bounds = (*((i, i + 1) for i in self._place.index), *inner)
        result = torch.empty([stop - start for start, stop in wanted], dtype=self.dtype)
        filled = 0
        for chunk in self._reader.chunks(self._place):
            filled += self._reader.fill(result, wanted, self._place.key, chunk)
        if filled != result.numel():
            raise CheckpointError(f"{self._reader.state} has only {filled} of {result.numel()} values of {self._place}")
        return result.view([stop - start for start, stop in inner])


class CheckpointReader(Mapping[str, StoredTensor]):
    """The parameters of a checkpoint's model, by the names of `weights.families`. It may be copied to other processes.

    Raises CheckpointError when there is no readable state. It does not compare checksums: `manifest.check_files` does,
    and must for the metadata before a reader is made, because they are a pickle.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.path = Path(checkpoint)
        self.state = self.path / STATE
        self.hf_dir = self.path / HF_FILES
        try:
            metadata = FileSystemReader(self.state).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise CheckpointError(
                f"{self.state} has no readable metadata ({error}): it is no torch_dist checkpoint"
            ) from error
        self._stored = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if is_weight(key) and isinstance(stored, TensorStorageMetadata)
        }
        self._storage = {index: info for index, info in metadata.storage_data.items() if index.fqn in self._stored}
        self._places: dict[str, Place] = {}
        for key, stored in self._stored.items():
            for name, place in parameters_of(key, stored.size):
                # Two spellings of a norm hold the same values.
                self._places.setdefault(name, place)
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._files: dict[str, io.BufferedReader] = {}

    def __getitem__(self, name: str) -> StoredTensor:
        place = self._places[name]
        return StoredTensor(self, place, self._stored[place.key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def chunks(self, place: Place) -> Sequence[ChunkStorageMetadata]:
        """Those that may hold something of a place: of hundreds of experts, not the other experts'."""
        if place.index and place.key not in self._chunks:
            of_key = self._chunks[place.key] = {}
            for chunk in self._stored[place.key].chunks:
                lead = [range(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True)][: len(place.index)]
                for index in itertools.product(*lead):
                    of_key.setdefault(index, []).append(chunk)
        return self._chunks[place.key].get(place.index, ()) if place.index else self._stored[place.key].chunks

    def fill(self, result: torch.Tensor, wanted: Bounds, key: str, chunk: ChunkStorageMetadata) -> int:
        """Copy what `chunk` has of the wanted bounds into `result`; return how many values that is."""
        common = [
            (max(start, offset), min(stop, offset + size))
            for (start, stop), offset, size in zip(wanted, chunk.offsets, chunk.sizes, strict=True)
        ]
        if any(start >= stop for start, stop in common):
            return 0
        target = result[_within(common, [start for start, _ in wanted])]
        inside = _within(common, chunk.offsets)
        file, data, whole = self._locate(key, chunk)
        if not whole.is_contiguous() or whole.storage_offset():
            source = torch.empty(whole.untyped_storage().nbytes(), dtype=torch.uint8)
            self._read_into(file, data, source)
            strided = source.view(whole.dtype).as_strided(whole.shape, whole.stride(), whole.storage_offset())
            target.copy_(strided[inside])
            return target.numel()
        # Leading dimensions of one element choose a run; within it the rows of the next dimension follow each other.
        lead = next((d for d, size in enumerate(chunk.sizes) if size != 1), len(chunk.sizes) - 1)
        row_values = whole.stride(lead)
        start = data + inside[lead].start * row_values * whole.element_size()
        full_rows = all(
            part.stop - part.start == size
            for part, size in zip(inside[lead + 1 :], chunk.sizes[lead + 1 :], strict=True)
        )
        if full_rows and target.is_contiguous():
            self._read_into(file, start, target)
            return target.numel()
        rows = torch.empty([*target.shape[: lead + 1], *chunk.sizes[lead + 1 :]], dtype=result.dtype)
        self._read_into(file, start, rows)
        target.copy_(rows[(*[slice(None)] * (lead + 1), *inside[lead + 1 :])])
        return target.numel()

    def _locate(self, key: str, chunk: ChunkStorageMetadata) -> tuple[io.BufferedReader, int, torch.Tensor]:
        """(file, position of the chunk's values in it, the chunk without its values)."""
        index = MetadataIndex(key, chunk.offsets)
        if index not in self._storage:
            raise CheckpointError(f"{self.state} does not say where {key} at {tuple(chunk.offsets)} lies")
        info = self._storage[index]
        path = self.state / info.relative_path
        try:
            if info.relative_path not in self._files:
                self._files[info.relative_path] = path.open("rb")
            file = self._files[info.relative_path]
            # torch calls it an IOBase, which its own `load` does not take.
            view: Any = _create_file_view(file, info.offset, info.length)
            whole = torch.load(view, map_location="meta", weights_only=True)
            if whole.shape != chunk.sizes or whole.dtype != self._stored[key].properties.dtype:
                raise ValueError(f"{tuple(whole.shape)} {whole.dtype} and not {tuple(chunk.sizes)}")
        except (OSError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} does not hold {key} where its metadata say ({error})") from error
        # torch notes here where the values are that it was told not to read.
        return file, info.offset + whole.untyped_storage()._checkpoint_offset, whole

    def _read_into(self, file: io.BufferedReader, position: int, tensor: torch.Tensor) -> None:
        """Read into a contiguous tensor. Not mapped: pages of a mapped file would count as this process's memory."""
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        while rest:
            count = os.preadv(file.fileno(), [rest], position)
            if count == 0:
                raise CheckpointError(f"{file.name} ends at {position}, within a tensor")
            rest, position = rest[count:], position + count


def _within(bounds: list[tuple[int, int]], origin: Any) -> tuple[slice, ...]:
    return tuple(slice(start - first, stop - first) for (start, stop), first in zip(bounds, origin, strict=True))
