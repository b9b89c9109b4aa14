"""Safetensors directories of Hugging Face models: lazy reading, and writing in shards with an index."""

from __future__ import annotations

import json
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

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Everything of a model directory that is not weights: configuration, tokenizer, chat template, licence, remote code.
_CARRIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".py")


class LazyTensor:
    """A tensor in a file. Slicing reads that slice, and only that."""

    def __init__(self, file: Path, name: str, handle: Any) -> None:
        self._file, self._name = file, name
        with _reading(file, name):
            self._slice = handle.get_slice(name)
            self.shape: tuple[int, ...] = tuple(self._slice.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        with _reading(self._file, self._name):
            return self._slice[index]


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


def carry_files(source_dir: Path, out_dir: Path) -> None:
    """Copy everything of a model directory that is not weights: configuration, tokenizer, chat template, licence …"""
    for file in sorted(source_dir.iterdir()):
        if file.is_file() and file.suffix in _CARRIED_SUFFIXES and file.name != INDEX_NAME:
            shutil.copyfile(file, out_dir / file.name)


class SafetensorsWriter:
    """Writes a model directory: shards of at most `max_shard_bytes`, an index when there are several, and the files
    beside the weights in `source_dir`.

    It writes to a temporary directory next to `out_dir`, which takes its name in `commit`: an interrupted export leaves
    no directory that looks complete. At most one shard is held in memory. Raises FileExistsError when `out_dir` exists.
    """

    def __init__(self, out_dir: str | Path, source_dir: str | Path, max_shard_bytes: int) -> None:
        self.out_dir, self.source_dir, self.max_shard_bytes = Path(out_dir), Path(source_dir), max_shard_bytes
        if self.out_dir.exists():
            raise FileExistsError(f"{self.out_dir} exists: remove it or export to another directory")
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        self._tmp = Path(tempfile.mkdtemp(prefix=f".{self.out_dir.name}.", dir=self.out_dir.parent))
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._dtypes: set[torch.dtype] = set()

    def add(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Take tensors, in the order in which they shall lie in the files. They are copied to the CPU."""
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self.max_shard_bytes:
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
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = SINGLE_NAME if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._tmp / self._part(i), self._tmp / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self._tmp / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        self._carry_files()
        os.chmod(self._tmp, 0o755)
        os.rename(self._tmp, self.out_dir)

    def abort(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self._tmp)

    @staticmethod
    def _part(number: int) -> str:
        return f"part-{number}.tmp"

    def _flush(self) -> None:
        save_file(self._pending, self._tmp / self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _carry_files(self) -> None:
        carry_files(self.source_dir, self._tmp)
        config = json.loads((self.source_dir / "config.json").read_text())
        if len(self._dtypes) == 1:
            # Readers take the dtype from here: it must be the one that was written.
            written = str(next(iter(self._dtypes))).removeprefix("torch.")
            for key in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
                config[key] = written
        (self._tmp / "config.json").write_text(json.dumps(config, indent=2) + "\n")
