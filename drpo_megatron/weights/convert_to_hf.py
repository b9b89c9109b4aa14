"""A checkpoint as a Hugging Face directory, without a device, without Megatron's model, and never the whole in memory.

Shards are planned from shapes alone. Whole shards are then written by one process or by several, tensor by tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from drpo_megatron.checkpoint import manifest
from drpo_megatron.checkpoint.manifest import CheckpointError
from drpo_megatron.checkpoint.reader import CheckpointReader
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform.process import keep_freed_memory
from drpo_megatron.weights import fp8
from drpo_megatron.weights.convert_jobs import check_small_files, checked_beside, run_in_processes
from drpo_megatron.weights.families import WeightTable, weight_table
from drpo_megatron.weights.hf_io import ModelDirectory, ShardFile, listed, sync_file
from drpo_megatron.weights.map import FusedQKV, GatedMLP, Replicated, WeightRule

ExportDtype = Literal["bf16", "fp32", "fp8"]
EXPORT_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""What tensors are cast to. Of fp8 those that are not quantized."""
EMBEDDING = "embedding.word_embeddings.weight"

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Exported:
    """One parameter and what it becomes. dtype: None keeps the stored one. keeps_dtype: whatever the others are cast
    to. quantized: as FP8 blocks.
    """

    name: str
    dtype: torch.dtype | None
    keeps_dtype: bool
    quantized: bool
    shapes: Shapes

    @property
    def nbytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes.values())


@dataclass(frozen=True)
class Plan:
    """The shards of an export."""

    shards: list[list[Exported]]

    @property
    def tensors(self) -> list[list[str]]:
        return [[name for one in shard for name in one.shapes] for shard in self.shards]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for shard in self.shards for one in shard)

    @property
    def kept(self) -> list[str]:
        """Tensors that are not quantized."""
        return [name for shard in self.shards for one in shard if not one.quantized for name in one.shapes]

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights that are not quantized; None when they have several."""
        dtypes = {
            dtype
            for shard in self.shards
            for one in shard
            if not (one.quantized or one.keeps_dtype)
            for _, dtype in one.shapes.values()
        }
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def largest_shard(self) -> int:
        return max(sum(one.nbytes for one in shard) for shard in self.shards)


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be read, with the weight map of its model."""

    reader: CheckpointReader
    hf: HFModelConfig
    table: WeightTable

    @classmethod
    def open(cls, checkpoint: Path) -> Source:
        """Raises CheckpointError for a state that is not the weights of its own hf/config.json."""
        reader = CheckpointReader(checkpoint)
        hf = HFModelConfig.load(reader.hf_dir)
        if EMBEDDING not in reader:
            raise CheckpointError(f"{reader.state} has no {EMBEDDING}: it holds no weights of a {hf.model_type}")
        table = weight_table(hf, reader[EMBEDDING].shape[0])
        source = cls(reader, hf, table)
        held = {hf_name for _, rule in source.rules() for hf_name in rule.hf_names}
        for names, what in (
            (table.hf_names() - held, "lacks the parameters of"),
            (held - table.hf_names(), "holds what is not in hf/config.json:"),
        ):
            if names:
                raise CheckpointError(f"{reader.state} {what} {listed(sorted(names))}")
        return source

    def rules(self) -> list[tuple[str, WeightRule]]:
        """(parameter, rule) of all that is exported, in the order of files: embedding, layers by number, the rest."""
        named = []
        for name in self.reader:
            try:
                named.append((name, self.table.rule(name)))
            except KeyError as error:
                raise CheckpointError(f"{self.reader.state}: {error.args[0]}") from error
        return sorted(((name, rule) for name, rule in named if rule.exported), key=lambda item: _order(item[0]))


def _order(name: str) -> tuple[int, int]:
    if name.startswith("embedding."):
        return (0, 0)
    return (1, int(name.split(".")[2])) if name.startswith("decoder.layers.") else (2, 0)


def plan_export(source: Source, dtype: ExportDtype | None, max_shard_bytes: int) -> Plan:
    """Divide the parameters into shards of at most `max_shard_bytes`, or one parameter that alone is larger.

    Raises CheckpointError for a parameter whose shape does not fit the model.
    """
    shards: list[list[Exported]] = []
    filled = 0
    for name, rule in source.rules():
        stored = source.reader[name]
        keeps = isinstance(rule, Replicated) and rule.keep_dtype
        cast = None if dtype is None or keeps else EXPORT_DTYPES[dtype]
        quantized = dtype == "fp8" and fp8.is_quantized(name, rule, stored.shape)
        try:
            made = rule.to_hf([torch.empty(stored.shape, dtype=cast or stored.dtype, device="meta")])
        except RuntimeError as error:
            raise CheckpointError(
                f"{source.reader.state}: {name} has shape {stored.shape}, which does not fit hf/config.json ({error})"
            ) from error
        shapes: Shapes = {}
        for hf_name, tensor in made.items():
            shapes[hf_name] = (tuple(tensor.shape), fp8.FP8 if quantized else tensor.dtype)
            if quantized:
                shapes[hf_name + fp8.SCALE_SUFFIX] = (fp8.scale_shape(tuple(tensor.shape)), torch.float32)
        one = Exported(name, cast, keeps, quantized, shapes)
        if not shards or filled + one.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(one)
        filled += one.nbytes
    return Plan(shards)


def within_a_block(source: Source, plan: Plan) -> list[str]:
    """Quantized tensors that end within a block where a server joins them to others: query, key and value, gate and up.

    SGLang refuses such a model.
    """
    return [
        name
        for shard in plan.shards
        for one in shard
        if one.quantized and isinstance(source.table.rule(one.name), FusedQKV | GatedMLP)
        for name, (shape, dtype) in one.shapes.items()
        if dtype == fp8.FP8 and shape[0] % fp8.BLOCK
    ]


def exported_tensors(source: Source, one: Exported) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of one parameter, cast and quantized."""
    stored = source.reader[one.name][:]
    for name, tensor in source.table.rule(one.name).to_hf([stored]).items():
        tensor = tensor.float() if one.quantized else tensor.to(one.dtype or tensor.dtype)
        if one.quantized:
            weight, scales = fp8.quantize(tensor)
            yield name, weight
            yield name + fp8.SCALE_SUFFIX, scales
        else:
            yield name, tensor


def _write_shard(source: Source, shard: Sequence[Exported], path: Path) -> None:
    shapes = {name: shape for one in shard for name, shape in one.shapes.items()}
    with ShardFile(path, shapes) as file:
        for one in shard:
            for name, tensor in exported_tensors(source, one):
                file.write(name, tensor)


def _write_shard_of(checkpoint: Path, shard: Sequence[Exported], path: Path) -> None:
    """`_write_shard` in a process of its own, which reads the metadata once."""
    torch.set_num_threads(1)
    keep_freed_memory()
    _write_shard(_source(checkpoint), shard, path)
    sync_file(path)


@functools.lru_cache(maxsize=1)
def _source(checkpoint: Path) -> Source:
    return Source.open(checkpoint)


def checkpoint_to_hf(
    checkpoint: str | Path,
    out_dir: str | Path,
    *,
    dtype: ExportDtype | None = None,
    max_shard_bytes: int,
    processes: int = 1,
) -> Plan:
    """Write the weights of a checkpoint as a Hugging Face directory; return what was written.

    dtype: None keeps what is stored. "fp8" writes `weights.fp8`'s blocks. The checksums of the checkpoint are compared
    while shards are written, and `out_dir` takes its name when both are done. A process holds one parameter and what it
    becomes. Raises FileExistsError when `out_dir` exists, CheckpointError naming the file when the checkpoint is not
    what its manifest says, ValueError for a model that is not supported.
    """
    checkpoint = Path(checkpoint)
    written = manifest.read(checkpoint)
    check_small_files(checkpoint, written)
    source = Source.open(checkpoint)
    plan = plan_export(source, dtype, max_shard_bytes)
    directory = ModelDirectory(out_dir, source.reader.hf_dir)
    try:
        jobs = [(shard, directory.part(i)) for i, shard in enumerate(plan.shards)]
        with checked_beside(checkpoint, written, processes):
            if min(processes, len(jobs)) == 1:
                keep_freed_memory()
                # The disk takes a shard while the next one is made.
                with ThreadPoolExecutor(1) as disk:
                    synced = []
                    for shard, path in jobs:
                        _write_shard(source, shard, path)
                        synced.append(disk.submit(sync_file, path))
                    for done in synced:
                        done.result()
            else:
                run_in_processes(processes, _write_shard_of, [(checkpoint, *job) for job in jobs])
        quantization = fp8.quantization_config(plan.kept) if dtype == "fp8" else None
        directory.commit(plan.tensors, plan.nbytes, plan.dtype, quantization)
    except BaseException:
        directory.abort()
        raise
    return plan
