"""The recipes of 30 to 671 billion parameters: every rank is built, none needs a GPU, and together they are the model.

Transformer Engine's layers are built where `tests.support.te_install` finds or makes an installation of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drpo_megatron.config import load_config
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.families import FAMILIES
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform.layout import ParallelLayout
from tests.support import large_models, te_install, tiny_models
from tests.support.launch import run_ranks

pytestmark = pytest.mark.distributed

GPU_BYTES = 80e9
# Parameters as published with the models; DeepSeek-V3's without its multi-token prediction layer.
PUBLISHED = {
    "llama3-70b": 70_553_706_496,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3-671b": 671_026_419_200,
}


def recipe(name: str) -> RunConfig:
    return load_config(large_models.HF_CONFIGS.parents[2] / "configs" / f"{name}.yaml")


@pytest.fixture(scope="module")
def local() -> dict[str, large_models.Report]:
    return run_ranks(1, large_models.build, list(PUBLISHED), "local", None, fresh=True)[0]


@pytest.fixture(scope="module")
def transformer_engine() -> dict[str, large_models.Report]:
    path = te_install.directory()
    return run_ranks(1, large_models.build, list(PUBLISHED), "transformer_engine", path, timeout_s=3600, spawn=True)[0]


def _is_the_model(name: str, report: large_models.Report) -> None:
    """`large_models.build` has compared every tensor; here the sums are compared, and the memory with the GPU."""
    layout, hf = recipe(name).layout, HFModelConfig.load(large_models.HF_CONFIGS / name)
    assert report.elements == report.reference_elements == PUBLISHED[name]
    assert report.ranks == layout.pipeline * layout.expert
    assert report.layers == layout.layers_per_stage(hf.num_layers) and len(report.layers) == layout.pipeline
    # A tenth of the states again is the least that activations, logits and communication buffers need.
    assert 0.2 * GPU_BYTES < max(report.state_bytes) < GPU_BYTES / 1.1


@pytest.mark.parametrize("name", PUBLISHED)
def test_local_layers(name: str, local: dict[str, large_models.Report]) -> None:
    _is_the_model(name, local[name])
    assert "drpo_megatron.models.attention" in local[name].modules
    assert not any("transformer_engine" in module for module in local[name].modules)
    hf = HFModelConfig.load(large_models.HF_CONFIGS / name)
    if hf.moe is not None:
        experts = f"decoder.layers.{hf.num_layers - 1}.mlp.experts.local_experts"
        assert f"{experts}.{hf.moe.num_experts - 1}.linear_fc2.weight" in local[name].parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformer_engine_layers(name: str, transformer_engine: dict[str, large_models.Report]) -> None:
    report = transformer_engine[name]
    _is_the_model(name, report)
    assert "megatron.core.extensions.transformer_engine" in report.modules
    assert "drpo_megatron.models.specs" not in report.modules
    hf = HFModelConfig.load(large_models.HF_CONFIGS / name)
    # A norm and the linear layer behind it are one module, and so are all experts of a layer on a rank.
    linear = "linear_qkv" if hf.mla is None else "linear_kv_up_proj"
    assert f"decoder.layers.0.self_attention.{linear}.layer_norm_weight" in report.parameters
    if hf.moe is not None:
        experts = f"decoder.layers.{hf.num_layers - 1}.mlp.experts"
        assert f"{experts}.linear_fc2.weight{hf.moe.num_experts - 1}" in report.parameters


def test_every_family_fits_transformer_engine_layers() -> None:
    """Names and shapes of tiny models, latent attention with and without a latent of the queries."""
    tiny = {family: [{}, {"q_lora_rank": None}] if known.mla else [{}] for family, known in FAMILIES.items()}
    layout = ParallelLayout(tensor=2, sequence_parallel=True)
    path = te_install.directory()
    reports = run_ranks(1, large_models.build_tiny, tiny, layout, "transformer_engine", path, spawn=True)[0]
    assert len(reports) > len(FAMILIES)
    for report in reports:
        assert report.elements == report.reference_elements > 10_000
        assert "megatron.core.extensions.transformer_engine" in report.modules
        assert "drpo_megatron.models.specs" not in report.modules


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_fits_the_nodes(name: str) -> None:
    """Nodes of 8 GPUs: tensor parallelism stays inside one, and the trainer fills whole ones."""
    config = recipe(name)
    layout = config.layout
    assert 8 % layout.tensor == 0 and layout.world_size % 8 == 0
    assert layout.sequence_parallel == (layout.tensor > 1)
    longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
    assert config.training.tokens_per_micro_batch >= longest
    assert longest <= HFModelConfig.load(large_models.HF_CONFIGS / name).max_position_embeddings


def _allocated(family: str, path: str) -> dict[str, Any]:
    from megatron.core.optimizer import DistributedOptimizer

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.memory import model_state_memory
    from drpo_megatron.platform.distributed import initialize, shutdown
    from drpo_megatron.training.optimizer import build_optimizer, wrap_data_parallel

    layout = ParallelLayout(data=2)
    initialize(layout)
    hf = HFModelConfig.load(path)
    chunks = build_model(hf, layout, params_dtype=torch.bfloat16, spec_backend="local")
    predicted = model_state_memory(chunks, layout)
    wrapped = wrap_data_parallel(chunks, True)
    optimizer, _ = build_optimizer(recipe("llama3-70b"), wrapped)
    for part in optimizer.chained_optimizers:
        assert isinstance(part, DistributedOptimizer)
        part._init_optimizer_states_with_dummy_values()
    states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
    mains = [p for part in optimizer.chained_optimizers for g in part.optimizer.param_groups for p in g["params"]]
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    answer = {
        "predicted": predicted,
        "weights": sum(b.param_data.nbytes for b in buffers),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": sum(p.nbytes for p in mains)
        + sum(t.nbytes for s in states for key, t in s.items() if key in ("exp_avg", "exp_avg_sq")),
        "states": len(states),
    }
    shutdown()
    return answer


def test_memory_is_what_megatron_allocates(tmp_path: Any) -> None:
    """The buffers and the Adam state that Megatron-Core makes on two data-parallel ranks."""
    tiny_models.write("llama", tmp_path)
    for answer in (ranks := run_ranks(2, _allocated, "llama", str(tmp_path))):
        predicted = answer["predicted"]
        # Buckets are padded so that they divide over the ranks.
        for part in ("weights", "gradients"):
            assert getattr(predicted, part) <= answer[part] <= 1.02 * getattr(predicted, part), part
        assert answer["states"] > 0
    # One rank's share may end inside a tensor: together they hold the whole state, once.
    held = sum(answer["optimizer"] for answer in ranks)
    assert held == 2 * ranks[0]["predicted"].optimizer
