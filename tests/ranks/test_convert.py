"""Checkpoints that Megatron-Core saved in parallel become the Hugging Face directory they came from, and converted
checkpoints load into parallel models.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drpo_megatron.checkpoint import manifest
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
from drpo_megatron.weights.convert_to_hf import checkpoint_to_hf
from drpo_megatron.weights.hf_io import carry_files
from tests.support import tiny_models
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

FAST = [("tp2", "llama-tied"), ("vpp2", "qwen3"), ("ep2", "qwen3_moe"), ("etp2", "deepseek_v3")]


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


def _all_layouts(root: Path, cases: list[tuple[str, str]]) -> None:
    from drpo_megatron.platform.distributed import change_layout, initialize, shutdown

    for i, key in enumerate(dict.fromkeys(key for key, _ in cases)):
        layout = LAYOUTS[key]
        if i == 0:
            initialize(layout, seed=1)
        else:
            change_layout(layout)
        for case, model in cases:
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


def compare(root: Path, cases: list[tuple[str, str]]) -> None:
    """Pairs of a layout and a model."""
    for model in {model for _, model in cases}:
        family, changes = MODELS[model]
        tiny_models.write(family, root / model, dtype=torch.bfloat16, **changes)
        hf_to_checkpoint(root / model, root / f"{model}-converted", max_shard_bytes=150_000)
    run_ranks(2, _all_layouts, root, cases)
    for key, model in cases:
        directory = root / f"{model}-{key}"
        as_checkpoint(directory, root / model)
        checkpoint_to_hf(directory, root / "out", max_shard_bytes=10**9)
        expected, actual = (load_file(root / name / "model.safetensors") for name in (model, "out"))
        assert actual.keys() == expected.keys(), (key, model)
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), (key, model, name)
        shutil.rmtree(root / "out")


def test_saved_in_parallel_and_loaded_in_parallel(tmp_path: Path) -> None:
    compare(tmp_path, FAST)
