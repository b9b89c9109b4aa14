"""Conversion of every family in every layout, and what Transformer Engine's layers look for in a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from drpo_megatron.checkpoint import manifest
from drpo_megatron.platform.layout import ParallelLayout
from drpo_megatron.weights.convert_to_checkpoint import hf_to_checkpoint
from tests.ranks.test_convert import CASES, compare
from tests.support import large_models, te_install, tiny_models
from tests.support.launch import run_ranks
from tests.unit.test_convert import MODELS

pytestmark = pytest.mark.distributed


def test_saved_in_parallel_and_loaded_in_parallel(tmp_path: Path) -> None:
    compare(tmp_path, CASES)


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
    (asked,) = run_ranks(1, _asked_for, tmp_path, te_install.directory(), spawn=True)
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
