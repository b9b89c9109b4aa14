"""Checkpoints that Megatron-Core saved in parallel become the Hugging Face directory they came from, and converted
checkpoints load into parallel models.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from drpo_megatron.checkpoint import manifest
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
from drpo_megatron.weights.convert_to_hf import checkpoint_to_hf
from drpo_megatron.weights.hf_io import carry_files
from tests.support import large_models, te_install, tiny_models
from tests.support.launch import run_ranks
from tests.unit.test_convert import MODELS

pytestmark = pytest.mark.distributed

# Their vocabulary of 515 does not divide over two ranks.
MOE = ("qwen3_moe", "deepseek_v3")
LAYOUTS = {
    "tp2": ParallelLayout(tensor=2, sequence_parallel=True),
    "pp2": ParallelLayout(pipeline=2),
    "vpp2": ParallelLayout(pipeline=2, virtual_pipeline=2),
    "ep2": ParallelLayout(data=2, expert=2),
    "etp2": ParallelLayout(tensor=2, sequence_parallel=True, expert_tensor=2),
}
CASES = [
    (key, model)
    for key, layout in LAYOUTS.items()
    for model in MODELS
    if model in MOE or layout.expert == layout.expert_tensor == 1
]


def _save_and_load(root: Path, key: str, model: str, layout: ParallelLayout) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.weights.importer import load_hf, local_parameters

    source = root / model
    hf = HFModelConfig.load(source)
    chunks = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend="local")
    load_hf(chunks, source, hf)
    state = root / f"{model}-{key}" / manifest.STATE
    state.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    sharded = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(sharded, str(state), async_strategy="mcore")

    loaded = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend="local")
    with torch.no_grad():
        for chunk in loaded:
            for parameter in chunk.parameters():
                parameter.fill_(7)
    converted = root / f"{model}-converted" / manifest.STATE
    states = dist_checkpointing.load(
        {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(loaded)},
        str(converted),
        strict=StrictHandling.RAISE_UNEXPECTED,
    )
    for i, chunk in enumerate(loaded):
        chunk.load_state_dict(states[f"model{i}"])
    expected = dict(local_parameters(chunks))
    actual = dict(local_parameters(loaded))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), (key, model, name)


def _all_layouts(root: Path) -> None:
    from drpo_megatron.platform.distributed import change_layout, initialize, shutdown

    for i, (key, layout) in enumerate(LAYOUTS.items()):
        if i == 0:
            initialize(layout, timeout_s=60, seed=1)
        else:
            change_layout(layout, timeout_s=60)
        for case, model in CASES:
            if case == key:
                _save_and_load(root, key, model, layout)
    shutdown()


def as_checkpoint(directory: Path, source: Path) -> None:
    """Make a checkpoint of a directory that has the state."""
    (directory / manifest.HF_FILES).mkdir()
    carry_files(source, directory / manifest.HF_FILES)
    files = {name: manifest.checksum(directory / name) for name in manifest.data_files(directory)}
    layout = dataclasses.asdict(ParallelLayout())
    manifest.write(directory, manifest.Manifest(3, 5, layout, {}, "bfloat16", False, time.time(), files=files))


def test_saved_in_parallel_and_loaded_in_parallel(tmp_path: Path) -> None:
    for model, (family, changes) in MODELS.items():
        tiny_models.write(family, tmp_path / model, dtype=torch.bfloat16, **changes)
        hf_to_checkpoint(tmp_path / model, tmp_path / f"{model}-converted", max_shard_bytes=150_000)
    run_ranks(2, _all_layouts, tmp_path)
    for key, model in CASES:
        directory = tmp_path / f"{model}-{key}"
        as_checkpoint(directory, tmp_path / model)
        checkpoint_to_hf(directory, tmp_path / "out", max_shard_bytes=10**9)
        expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in (model, "out"))
        assert actual.keys() == expected.keys(), (key, model)
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), (key, model, name)
        shutil.rmtree(tmp_path / "out")


def _asked_for(root: Path, te_path: str | None) -> dict[str, dict[str, tuple[int, ...] | None]]:
    """What the layers of Transformer Engine look for in a checkpoint of each model, by key: the shape of a tensor, None
    of an object.
    """
    large_models.pretend_a_gpu()
    if te_path is not None:
        sys.path.insert(0, te_path)
    from drpo_megatron import platform

    platform.activate()
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.models.meta import META, rank_on_meta

    asked: dict[str, dict[str, tuple[int, ...] | None]] = {}
    layout = ParallelLayout()
    for model in MODELS:
        with rank_on_meta(layout, 0):
            hf = HFModelConfig.load(root / model)
            (chunk,) = build_model(
                hf, layout, params_dtype=torch.bfloat16, spec_backend="transformer_engine", device=META
            )
            sharded = chunk.sharded_state_dict()
            apply_factories(sharded)
            asked[model] = {}
            for value in nested_values(sharded):
                if isinstance(value, ShardedTensor):
                    asked[model][value.key] = tuple(value.global_shape)
                elif isinstance(value, ShardedObject):
                    asked[model][value.unique_key] = None
    return asked


def test_converted_checkpoints_have_what_transformer_engine_asks_for(tmp_path: Path) -> None:
    """Its layers spell norms differently and keep objects beside their weights; loading one needs a GPU."""
    for model, (family, changes) in MODELS.items():
        tiny_models.write(family, tmp_path / model, dtype=torch.bfloat16, **changes)
        hf_to_checkpoint(tmp_path / model, tmp_path / f"{model}-converted", max_shard_bytes=10**9)
    with te_install.directory() as path:
        (asked,) = run_ranks(1, _asked_for, tmp_path, path, spawn=True)
    for model in MODELS:
        metadata = FileSystemReader(tmp_path / f"{model}-converted" / manifest.STATE).read_metadata()
        held = {
            key: tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else None
            for key, stored in metadata.state_dict_metadata.items()
        }
        assert any("layer_norm_weight" in key for key in asked[model])
        assert any(key.endswith("_extra_state/shard_0_1") for key in asked[model])
        for key, shape in asked[model].items():
            assert key in held and held[key] == shape, (model, key, shape)
