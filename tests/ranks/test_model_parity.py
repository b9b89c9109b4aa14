"""Every family equals transformers, in a layout of each kind; all architectures in all layouts are in `tests/slow`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from drpo_megatron.models.families import FAMILIES
from drpo_megatron.platform.layout import ParallelLayout
from tests.support import tiny_models
from tests.support.architectures import awkward_cases, random_cases, tiny_case, were_not_left_out
from tests.support.launch import run_ranks
from tests.support.model_parity import compare

pytestmark = pytest.mark.distributed

TWO_RANKS = [
    (tiny_case("llama"), ("tp2sp",)),
    (tiny_case("qwen2"), ("tp1", "vpp2")),
    (tiny_case("qwen3"), ("tp2", "pp2uneven")),
    (tiny_case("qwen3_moe"), ("tp2sp-ep2", "ep2-allgather")),
    (tiny_case("deepseek_v3"), ("etp2", "pp2")),
    *((awkward_cases(family)[1], ("tp2sp", "ep2")) for family in ("mistral", "mixtral", "gemma", "deepseek_v3")),
    *((random_cases(family, range(1))[0], ("tp1",)) for family in FAMILIES if family not in ("llama", "qwen2")),
]
FOUR_RANKS = [
    (tiny_case("qwen3_moe"), ("dp2-tp2sp-ep2-etp2",)),
    (tiny_case("deepseek_v3"), ("vpp2-tp2sp-ep2",)),
]


def test_families_in_layouts_of_two_ranks(tmp_path: Path) -> None:
    assert {case.family for case, _ in TWO_RANKS} == set(FAMILIES)
    were_not_left_out(tmp_path, TWO_RANKS, compare(tmp_path, TWO_RANKS, 2))


def test_mixtures_in_layouts_of_four_ranks(tmp_path: Path) -> None:
    ran = compare(tmp_path, FOUR_RANKS, 4)
    assert all(ran[case.directory] == set(keys) for case, keys in FOUR_RANKS)


def refused(root: Path) -> dict[str, str]:
    """What load_hf says about directories that do not fit."""
    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.hf_config import HFModelConfig
    from drpo_megatron.platform import distributed
    from drpo_megatron.weights.importer import load_hf

    layout = ParallelLayout()
    distributed.initialize(layout)
    hf = HFModelConfig.load(root / "qwen2-sharded")
    said = {}
    for case in ("truncated", "lost", "extra", "short"):
        chunks = build_model(hf, layout, params_dtype=torch.float32, spec_backend="local")
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_hf(chunks, root / case, hf)
        said[case] = str(error.value)
    distributed.shutdown()
    return said


def _damaged_directories(root: Path) -> None:
    for case in ("truncated", "lost", "extra", "short"):
        shutil.copytree(root / "qwen2-sharded", root / case)
    index_file = "model.safetensors.index.json"
    index = json.loads((root / "lost" / index_file).read_text())
    norm_shard = index["weight_map"]["model.norm.weight"]
    (root / "lost" / norm_shard).unlink()
    damaged = root / "truncated" / norm_shard
    damaged.write_bytes(damaged.read_bytes()[:-16])
    index["weight_map"]["model.layers.0.self_attn.sinks"] = norm_shard
    (root / "extra" / index_file).write_text(json.dumps(index))
    del index["weight_map"]["model.layers.0.self_attn.sinks"], index["weight_map"]["model.norm.weight"]
    (root / "short" / index_file).write_text(json.dumps(index))


def test_directories_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """A tensor that was cut off, a file that is gone, a tensor without a place, one that is missing: each is named."""
    tiny_models.write("qwen2", tmp_path / "qwen2-sharded", max_shard_size="60KB")
    _damaged_directories(tmp_path)
    (said,) = run_ranks(1, refused, tmp_path)
    for case, words in {
        "truncated": ["/truncated/model-", "(tensor model.", "damaged"],
        "lost": ["/lost/model-", "hold tensor model.", "does not exist"],
        "extra": ["without a place", "model.layers.0.self_attn.sinks"],
        "short": ["missing tensors model.norm.weight"],
    }.items():
        for word in words:
            assert word in said[case], said[case]
