"""A Hugging Face directory as a checkpoint of weights, which a run of any layout can load.

The state is written by torch's own writer under the keys and in the shapes of Megatron-Core, one chunk for every
parameter. The tensors are read when they are written.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import BytesIOWriteData, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from drpo_megatron.checkpoint import manifest
from drpo_megatron.models.hf_config import HFModelConfig, padded_vocab_size
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.platform.versions import versions
from drpo_megatron.weights.checkpoint_names import Place, extra_states, places
from drpo_megatron.weights.convert_jobs import run_in_processes
from drpo_megatron.weights.families import WeightTable, weight_table
from drpo_megatron.weights.hf_io import SafetensorsReader, carry_files, check_names
from drpo_megatron.weights.map import WeightRule

# Megatron-Core's marker of the format; the object with what is not a tensor.
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class Stored:
    """One place of the state and the parameter that fills it."""

    place: Place
    name: str
    size: tuple[int, ...]
    """Of the place's whole tensor."""
    chunk: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.chunk).numel() * self.dtype.itemsize

    def item(self) -> WriteItem:
        offsets = torch.Size([*self.place.index, *[0] * (len(self.chunk) - len(self.place.index))])
        chunk = ChunkStorageMetadata(offsets, torch.Size(self.chunk))
        data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), torch.Size(self.size))
        return WriteItem(MetadataIndex(self.place.key, offsets), WriteItemType.SHARD, tensor_data=data)


@dataclass(frozen=True)
class Model:
    """A Hugging Face directory with its weight map."""

    reader: SafetensorsReader
    hf: HFModelConfig
    table: WeightTable

    @classmethod
    def open(cls, hf_dir: Path) -> Model:
        """Raises ValueError naming tensors that are missing or have no place."""
        hf = HFModelConfig.load(hf_dir)
        table = weight_table(hf, padded_vocab_size(hf.vocab_size, 1))
        reader = SafetensorsReader(hf_dir)
        check_names(hf_dir, set(reader), table, hf.tied_embeddings)
        return cls(reader, hf, table)

    def left_out(self) -> list[str]:
        """Tensors that a checkpoint does not take: multi-token prediction, a tied output projection stored again."""
        return sorted(set(self.reader) - self.table.hf_names())

    def parameters(self) -> dict[str, WeightRule]:
        """By name, without the names that other layer specs give the same parameter."""
        named = dict(self.table.edges)
        for layer in range(self.hf.num_layers):
            named |= {f"decoder.layers.{layer}.{name}": rule for name, rule in self.table.layer(layer).items()}
        first: dict[WeightRule, str] = {}
        for name, rule in named.items():
            if rule.exported:
                first.setdefault(rule, name)
        return {name: rule for rule, name in first.items()}


class _ReadWhenWritten(DefaultSavePlanner):
    """Gives the writer each tensor when it asks for it."""

    def __init__(self, model: Model, stored: Sequence[Stored]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._model = model
        self._stored = {(one.place.key, one.place.index): one for one in stored}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([{} if write_item.index.fqn == _COMMON else None], data)
            return data
        assert write_item.index.offset is not None
        one = next(
            stored
            for length in range(len(write_item.index.offset) + 1)
            if (stored := self._stored.get((write_item.index.fqn, tuple(write_item.index.offset[:length]))))
        )
        shard = self._model.table.rule(one.name).from_hf(self._model.reader, 0, 1)
        return shard.contiguous().view(one.chunk)


def _plan(model: Model) -> list[Stored]:
    """Every place of the state. Raises ValueError when a tensor has not the shape that config.json says."""

    class Shapes(Mapping[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            lazy = model.reader[name]
            return torch.empty(lazy.shape, dtype=lazy.dtype, device="meta")

        def __iter__(self) -> Any:
            return iter(model.reader)

        def __len__(self) -> int:
            return len(model.reader)

    stored = []
    for name, rule in model.parameters().items():
        shard = rule.from_hf(Shapes(), 0, 1)
        for place, leading in places(name, model.hf):
            chunk = (*[1] * len(leading), *shard.shape)
            stored.append(Stored(place, name, (*leading, *shard.shape), chunk, shard.dtype))
    sizes: dict[str, Stored] = {}
    for one in stored:
        first = sizes.setdefault(one.place.key, one)
        if (one.size, one.dtype) != (first.size, first.dtype):
            raise ValueError(
                f"{model.reader.path}: {one.name} has shape {one.size} and {one.dtype}, and {first.name}, which is "
                f"stored with it, {first.size} and {first.dtype}: make them alike"
            )
    return stored


def _divide(stored: Sequence[Stored], max_file_bytes: int) -> list[list[Stored]]:
    files: list[list[Stored]] = [[]]
    filled = 0
    for one in stored:
        if files[-1] and filled + one.nbytes > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(one)
        filled += one.nbytes
    return files


def _write_file(hf_dir: Path, state: Path, stored: Sequence[Stored], plan: SavePlan) -> list[WriteResult]:
    torch.set_num_threads(1)
    writer = FileSystemWriter(state, per_thread_copy_ahead=0)
    return list(writer.write_data(plan, _ReadWhenWritten(_model(hf_dir), stored)).wait())


@functools.lru_cache(maxsize=1)
def _model(hf_dir: Path) -> Model:
    return Model.open(hf_dir)


def write_state(hf_dir: Path, state: Path, max_file_bytes: int, processes: int) -> list[Stored]:
    """Write `state/` of a checkpoint; return what it holds. A process holds one file of `max_file_bytes`."""
    model = Model.open(hf_dir)
    files = _divide(_plan(model), max_file_bytes)
    plans = [SavePlan([one.item() for one in stored]) for stored in files]
    objects = [_COMMON, *extra_states(model.hf)]
    plans[0].items.extend(
        WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(0)) for key in objects
    )
    writer = FileSystemWriter(state)
    plans, metadata = create_default_global_save_plan([writer.prepare_local_plan(plan) for plan in plans])
    jobs = [
        (hf_dir, state, stored, plan) for stored, plan in zip(files, writer.prepare_global_plan(plans), strict=True)
    ]
    if min(processes, len(jobs)) == 1:
        results = [_write_file(*job) for job in jobs]
    else:
        results = run_in_processes(processes, _write_file, jobs)
    writer.finish(metadata, results)
    (state / "metadata.json").write_text(json.dumps(_FORMAT))
    return [one for stored in files for one in stored]


def hf_to_checkpoint(
    hf_dir: str | Path, out_dir: str | Path, *, max_shard_bytes: int, processes: int = 1
) -> list[Stored]:
    """Write a Hugging Face directory as a checkpoint at step 0 without optimizer; return what its state holds.

    Tensors keep their dtypes; a run that loads it casts. It is written beside `out_dir`, which takes its name when it
    is complete. Raises FileExistsError when `out_dir` exists, FileNotFoundError and ValueError, naming tensor or file,
    for a directory that is damaged or not supported.
    """
    hf_dir, out_dir = Path(hf_dir), Path(out_dir)
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists: remove it or convert to another directory")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        (beside / manifest.STATE).mkdir()
        (beside / manifest.HF_FILES).mkdir()
        stored = write_state(hf_dir, beside / manifest.STATE, max_shard_bytes, processes)
        carry_files(hf_dir, beside / manifest.HF_FILES)
        manifest.write(beside, _manifest(beside, stored))
        os.chmod(beside, 0o755)
        os.rename(beside, out_dir)
    except BaseException:
        shutil.rmtree(beside)
        raise
    return stored


def _manifest(directory: Path, stored: Sequence[Stored]) -> manifest.Manifest:
    return manifest.Manifest(
        step=0,
        version=0,
        layout=dataclasses.asdict(ParallelLayout()),
        versions=versions(),
        dtype=str(stored[0].dtype).removeprefix("torch."),
        optimizer=False,
        time=time.time(),
        files={name: manifest.checksum(directory / name) for name in manifest.data_files(directory)},
    )
