"""`drpo inspect`: what a checkpoint, a directory of checkpoints or a Hugging Face directory holds."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

from drpo_megatron.checkpoint import manifest
from drpo_megatron.checkpoint.manifest import CheckpointError, Manifest
from drpo_megatron.checkpoint.reader import CheckpointReader
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.weights.convert_jobs import check_small_files
from drpo_megatron.weights.fp8 import SCALE_SUFFIX
from drpo_megatron.weights.hf_io import SafetensorsReader

CHECKPOINT, CHECKPOINTS, MODEL = "checkpoint", "checkpoints", "hf"
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def describe(path: Path, *, checksums: bool = False) -> dict[str, Any]:
    """What `path` holds, as JSON values; `kind` says which of the three it is.

    checksums: compare those of all files of a checkpoint with its manifest; without, those of the small ones, and the
    sizes of all.
    `damage` names the first file that differs, or is None. Raises CheckpointError, ValueError or FileNotFoundError for
    what is none of the three or cannot be read.
    """
    if (path / manifest.MANIFEST).is_file():
        return _checkpoint(path, checksums)
    if (path / "config.json").is_file():
        return _model(path)
    if path.is_dir() and (found := [entry for entry in path.iterdir() if _is_checkpoint(entry)]):
        held = [_checkpoint(entry, checksums) for entry in found]
        damaged = [one["damage"] for one in held if one["damage"]]
        return {
            "kind": CHECKPOINTS,
            "path": str(path),
            "checkpoints": sorted(held, key=lambda one: (one["step"], one["path"])),
            "damage": damaged[0] if damaged else None,
        }
    raise FileNotFoundError(
        f"{path} is no checkpoint ({manifest.MANIFEST}), holds none, and is no Hugging Face directory (config.json)"
    )


def _is_checkpoint(path: Path) -> bool:
    """A name that points to another checkpoint is not one of its own."""
    return (path / manifest.MANIFEST).is_file() and not path.is_symlink()


def _checkpoint(path: Path, checksums: bool) -> dict[str, Any]:
    written = manifest.read(path)
    damage = _damage(path, written, checksums)
    described = {
        "kind": CHECKPOINT,
        "path": str(path),
        "step": written.step,
        "version": written.version,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(written.time)),
        "dtype": written.dtype,
        "optimizer": written.optimizer,
        "driver": manifest.DRIVER in written.files,
        "layout": written.layout,
        "versions": written.versions,
        "metrics": written.metrics,
        "files": len(written.files),
        "bytes": written.total_bytes,
        "checked": "checksums" if checksums else "sizes",
        "damage": damage,
        "model_type": None,
        "parameters": None,
        "weight_bytes": None,
    }
    if damage is None:
        reader = CheckpointReader(path)
        config = _config(path / manifest.HF_FILES)
        sizes = []
        for name in reader:
            rows, *columns = reader[name].shape
            # Behind the vocabulary lies padding.
            rows = min(rows, config["vocab_size"]) if name in _VOCABULARY else rows
            sizes.append((math.prod([rows, *columns]), reader[name].dtype.itemsize))
        described |= {
            "model_type": config["model_type"],
            "parameters": sum(count for count, _ in sizes),
            "weight_bytes": sum(count * itemsize for count, itemsize in sizes),
        }
    return described


def _damage(path: Path, written: Manifest, checksums: bool) -> str | None:
    try:
        check_small_files(path, written)
        if checksums:
            manifest.check_files(path, written)
    except CheckpointError as error:
        return str(error)
    return None


def _config(hf_dir: Path) -> dict[str, Any]:
    path = hf_dir / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if "model_type" not in raw:
        raise ValueError(f"{path} has no model_type: it is no model's configuration")
    return raw


def _model(path: Path) -> dict[str, Any]:
    config, reader = _config(path), SafetensorsReader(path)
    parameters: Counter[str] = Counter()
    nbytes = 0
    for name in reader:
        tensor = reader[name]
        count = math.prod(tensor.shape)
        nbytes += count * tensor.dtype.itemsize
        if not name.endswith(SCALE_SUFFIX):
            parameters[str(tensor.dtype).removeprefix("torch.")] += count
    quantization = config.get("quantization_config") or {}
    return {
        "kind": MODEL,
        "path": str(path),
        "model_type": config["model_type"],
        "parameters": sum(parameters.values()),
        "parameters_by_dtype": dict(parameters),
        "bytes": nbytes,
        "shards": len(reader.files),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "quantized": quantization.get("quant_method"),
        "weight_block_size": quantization.get("weight_block_size"),
    }


def as_text(described: dict[str, Any]) -> str:
    """The same for people, a line a subject."""
    if described["kind"] == CHECKPOINTS:
        rows = [_checkpoint_line(one) for one in described["checkpoints"]]
        return "\n".join([f"{described['path']}: {len(rows)} checkpoint{'s' * (len(rows) != 1)}", *rows])
    if described["kind"] == MODEL:
        return _model_text(described)
    plain = dataclasses.asdict(ParallelLayout())
    changed = {key: value for key, value in described["layout"].items() if value != plain.get(key)}
    layout = ", ".join(f"{key} {value}" for key, value in changed.items()) or "one rank"
    lines = [
        f"{described['path']}: checkpoint of step {described['step']}, weights of version {described['version']}",
        f"written     {described['written']} by {_pairs(described['versions'])}",
        f"layout      {layout}; any other can load it",
        f"weights     {_weights(described)}",
        f"with        {_contents(described)}",
        f"files       {described['files']}, {described['bytes'] / 1e9:.3f} GB; {_state(described)}",
    ]
    if described["metrics"]:
        lines.append(f"metrics     {_pairs({k: f'{v:.4g}' for k, v in described['metrics'].items()})}")
    return "\n".join(lines)


def _checkpoint_line(one: dict[str, Any]) -> str:
    return (
        f"  {Path(one['path']).name:20} step {one['step']:<8} version {one['version']:<8} {one['written']}  "
        f"{one['bytes'] / 1e9:9.3f} GB  {_contents(one)}; {_state(one)}"
    )


def _contents(one: dict[str, Any]) -> str:
    parts = [text for key, text in (("optimizer", "optimizer"), ("driver", "rollout state")) if one[key]]
    return " and ".join(parts) or "weights only"


def _state(one: dict[str, Any]) -> str:
    return f"DAMAGED: {one['damage']}" if one["damage"] else f"{one['checked']} as written"


def _weights(one: dict[str, Any]) -> str:
    if one["parameters"] is None:
        return "not read, because files are damaged"
    return (
        f"{one['model_type']}, {one['parameters']:,} parameters, {one['weight_bytes'] / 1e9:.3f} GB; "
        f"dtype {one['dtype']}"
    )


def _model_text(one: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in one["parameters_by_dtype"].items())
    block = f", blocks of {' × '.join(map(str, one['weight_block_size']))}" if one["weight_block_size"] else ""
    lines = [
        f"{one['path']}: Hugging Face directory of a {one['model_type']}",
        f"parameters  {one['parameters']:,} ({dtypes}){', tied embeddings' * one['tied_embeddings']}",
        f"files       {one['shards']} shard{'s' * (one['shards'] != 1)}, {one['bytes'] / 1e9:.3f} GB",
        f"quantized   {one['quantized'] + block if one['quantized'] else 'no'}",
    ]
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
