"""Safetensors directories of Hugging Face models: lazy reading, and writing in shards with an index."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drpo_megatron.weights.families import WeightTable

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Everything of a model directory that is not weights: configuration, tokenizer, chat template, licence, remote code.
_CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".py")


# Names of the number types in the files.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class LazyTensor:
    """A tensor in a file. Slicing reads that slice, and only that."""

    def __init__(self, file: Path, name: str, handle: Any) -> None:
        self._file, self._name = file, name
        with _reading(file, name):
            self._slice = handle.get_slice(name)
            self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
            self._code: str = self._slice.get_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """Raises ValueError for a type of number that no weight of a supported model has."""
        if self._code not in _DTYPES:
            raise ValueError(f"{self._file}: tensor {self._name} has the type {self._code}, which is not supported")
        return _DTYPES[self._code]

    def __getitem__(self, index: Any) -> torch.Tensor:
        with _reading(self._file, self._name):
            values: torch.Tensor = self._slice[index]
        return values


class SafetensorsReader(Mapping[str, LazyTensor]):
    """The tensors of a model directory, by name: one `model.safetensors`, or shards with an index.

    Files are opened when a tensor of theirs is first asked for. Raises FileNotFoundError for a missing file and
    ValueError for an unreadable one or a tensor that is not where the index says; both name the file and the tensor.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.path = Path(hf_dir)
        self._handles: dict[Path, Any] = {}
        index = self.path / INDEX_NAME
        if index.is_file():
            try:
                self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{index} is not a safetensors index ({error}): download the model again") from error
        elif (self.path / SINGLE_NAME).is_file():
            self._files = dict.fromkeys(self._open(self.path / SINGLE_NAME, "any").keys(), SINGLE_NAME)
        else:
            raise FileNotFoundError(
                f"{self.path} has neither {SINGLE_NAME} nor {INDEX_NAME}: it holds no safetensors model"
            )

    @property
    def files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(set(self._files.values()))

    def __getitem__(self, name: str) -> LazyTensor:
        file = self.path / self._files[name]
        return LazyTensor(file, name, self._open(file, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def _open(self, file: Path, name: str) -> Any:
        if file not in self._handles:
            if not file.is_file():
                raise FileNotFoundError(f"{file}, which should hold tensor {name}, does not exist: download it again")
            with _reading(file, name):
                self._handles[file] = safe_open(str(file), framework="pt")
        return self._handles[file]


class _reading:
    """Turns safetensors' errors into one that names the file and the tensor."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, SafetensorError):
            raise ValueError(
                f"{self.file} cannot be read (tensor {self.name}: {error}): the file is damaged, download it again"
            ) from error


def check_names(hf_dir: Path, present: set[str], table: WeightTable, tied: bool) -> None:
    """Raise ValueError listing tensors that the model lacks or that the weight map does not know."""
    # A tied model may come with its output projection stored again; old Llama files hold the rotary frequencies.
    ignorable = {name for name in present if name.endswith(".rotary_emb.inv_freq") or table.is_mtp(name)}
    if tied:
        ignorable.add("lm_head.weight")
    expected = table.hf_names()
    missing = sorted(expected - present)
    unknown = sorted(present - expected - ignorable)
    if missing or unknown:
        raise ValueError(
            f"{hf_dir} does not match its config.json: missing tensors {listed(missing)}; "
            f"tensors without a place in the model {listed(unknown)}"
        )


def listed(names: Sequence[str]) -> str:
    """The first eight, and how many more."""
    return "none" if not names else ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class ModelDirectory:
    """A model directory on its way: shards that others write, an index when there are several, and the files beside the
    weights in `source_dir`.

    It lies next to `out_dir` and takes that name in `commit`: an interrupted export leaves no directory that looks
    complete. Raises FileExistsError when `out_dir` exists; with `replace` it is removed then instead.
    """

    def __init__(self, out_dir: str | Path, source_dir: str | Path, *, replace: bool = False) -> None:
        self.out_dir, self.source_dir = Path(out_dir), Path(source_dir)
        if self.out_dir.exists() and not replace:
            raise FileExistsError(f"{self.out_dir} exists: remove it or export to another directory")
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        self._tmp = Path(tempfile.mkdtemp(prefix=f".{self.out_dir.name}.", dir=self.out_dir.parent))

    def part(self, number: int) -> Path:
        """Where shard `number`, from 0, is written."""
        return self._tmp / f"part-{number}.tmp"

    def commit(
        self,
        shards: Sequence[Sequence[str]],
        total_bytes: int,
        dtype: torch.dtype | None,
        quantization: Mapping[str, Any] | None = None,
    ) -> None:
        """Name the shards, write the index and the carried files, and put the directory in place.

        shards: the tensors of each. dtype: what config.json shall say; None leaves what it says. quantization: its
        `quantization_config`.
        """
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            file = SINGLE_NAME if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            os.rename(self.part(i), self._tmp / file)
            weight_map.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            (self._tmp / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        carry_files(self.source_dir, self._tmp, but=("config.json",))
        config = json.loads((self.source_dir / "config.json").read_text())
        if dtype is not None:
            # Readers take the dtype from here: it must be the one that was written.
            written = str(dtype).removeprefix("torch.")
            for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
                config[key] = written
        if quantization is not None:
            config["quantization_config"] = dict(quantization)
        (self._tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        os.chmod(self._tmp, 0o755)
        if self.out_dir.exists():
            shutil.rmtree(self.out_dir)
        os.rename(self._tmp, self.out_dir)

    def abort(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._tmp)


def carry_files(source_dir: Path, target_dir: Path, but: Sequence[str] = ()) -> None:
    """Copy what lies beside the weights of a model directory."""
    for file in sorted(source_dir.iterdir()):
        if file.is_file() and file.suffix in _CARRIED_SUFFIXES and file.name not in (INDEX_NAME, *but):
            shutil.copyfile(file, target_dir / file.name)


class SafetensorsWriter:
    """Writes a model directory from tensors that come one after another, in shards of at most `max_shard_bytes`.

    At most one shard is held in memory. Raises FileExistsError when `out_dir` exists; with `replace` it is replaced.
    """

    def __init__(
        self, out_dir: str | Path, source_dir: str | Path, max_shard_bytes: int, *, replace: bool = False
    ) -> None:
        self._directory = ModelDirectory(out_dir, source_dir, replace=replace)
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._dtypes: set[torch.dtype] = set()

    def add(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Take tensors, in the order in which they shall lie in the files. They are copied to the CPU."""
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._max_shard_bytes:
                self._flush()
            # A copy of its own: safetensors refuses tensors that share memory, and the source may change.
            self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            self._pending_bytes += size
            self._total_bytes += size
            self._dtypes.add(tensor.dtype)

    def commit(self) -> None:
        """Write what is pending, the index and the carried files, and put the directory in place."""
        if self._pending:
            self._flush()
        self._directory.commit(
            self._shards, self._total_bytes, next(iter(self._dtypes)) if len(self._dtypes) == 1 else None
        )

    def abort(self) -> None:
        """Remove what was written."""
        self._directory.abort()

    def _flush(self) -> None:
        save_file(self._pending, self._directory.part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


class ShardFile:
    """A safetensors file whose tensors are known by shape beforehand and come in any order.

    Nothing is held in memory. The file is complete when the `with` block ends, and on disk after `sync_file`.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        # Wide types first: every tensor is then aligned.
        for name, (shape, dtype) in sorted(shapes.items(), key=lambda item: -item[1][1].itemsize):
            stop = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
            position = stop
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._header, self._data = header, 8 + len(encoded)
        self._missing = set(shapes)
        self._file = path.open("wb")
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._file.flush()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Raises ValueError when shape or dtype are not the announced ones."""
        entry = self._header[name]
        if list(tensor.shape) != entry["shape"] or _CODES[tensor.dtype] != entry["dtype"]:
            raise ValueError(f"{name} has shape {list(tensor.shape)} and {tensor.dtype}, and {entry} was announced")
        position = self._data + entry["data_offsets"][0]
        rest = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        while rest:
            count = os.pwrite(self._file.fileno(), rest, position)
            rest, position = rest[count:], position + count
        self._missing.remove(name)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            assert error is not None or not self._missing, f"not written: {self._missing}"


def sync_file(path: Path) -> None:
    """Returns when the file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
