"""Emulated FP8 training with every recipe and in every layout, and what Transformer Engine makes of the settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.models.hf_config import HFModelConfig
from tests.ranks.test_fp8_training import (
    MODEL,
    ONE,
    RECIPES,
    TWO,
    Runs,
    agrees_with_one_process,
    every_matrix_but_the_router_s_is_quantized,
    is_near_the_one_without_fp8,
)
from tests.support import te_install, tiny_models
from tests.support.launch import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("models"), ONE, TWO, count=3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_near_the_one_without_fp8(recipe: str, runs: Runs) -> None:
    is_near_the_one_without_fp8(recipe, runs)


@pytest.mark.parametrize("key", TWO, ids=" ".join)
def test_layouts_agree_where_scales_do_not_depend_on_them(key: tuple[str, str], runs: Runs) -> None:
    agrees_with_one_process(key, runs)


def test_recomputed_activations_have_the_scales_of_their_forward(runs: Runs) -> None:
    for recipe in ("delayed", "mxfp8"):
        assert runs.one[f"{recipe} recomputed"].equals(runs.one[recipe])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_every_matrix_but_the_router_s_is_quantized(family: str, tmp_path: Path) -> None:
    every_matrix_but_the_router_s_is_quantized(family, tmp_path)


def te_recipes(path: str | None) -> dict[str, Any]:
    """What Megatron-Core and the real Transformer Engine make of the settings, for a model on the meta device."""
    import contextlib
    import sys

    import torch

    from tests.support import large_models

    large_models.pretend_a_gpu()
    if path is not None:
        sys.path.insert(0, path)
    from drpo_megatron import platform

    platform.activate()
    import json

    from megatron.core import fp8_utils

    from drpo_megatron.config.schema import Fp8Config
    from drpo_megatron.models.builder import build_model
    from drpo_megatron.models.meta import META, rank_on_meta
    from drpo_megatron.platform.layout import ParallelLayout

    reference = tiny_models.config("qwen3", **MODEL | {"num_hidden_layers": 4})
    hf = HFModelConfig.from_dict(json.loads(reference.to_json_string(use_diff=False)))
    found = {}
    for recipe in RECIPES:
        of_recipe = {
            "delayed": {"margin": 2, "amax_history": 9, "amax_algorithm": "most_recent"},
            "tensorwise": {"format": "e4m3"},
            "blockwise": {"unquantized_first_layers": 2, "unquantized_last_layers": 1},
            "mxfp8": {"format": "hybrid"},
        }[recipe]
        fp8 = Fp8Config.model_validate({"recipe": recipe, **of_recipe})
        with rank_on_meta(ParallelLayout(), 0):
            (chunk,) = build_model(
                hf,
                ParallelLayout(),
                params_dtype=torch.bfloat16,
                spec_backend="transformer_engine",
                device=META,
                fp8=fp8,
            )
            config = chunk.config
            made = fp8_utils.get_fp8_recipe(config)
            contexts = [fp8_utils.get_fp8_context(config, n) for n in range(4)]
            found[recipe] = {
                "classes": [c.__name__ for c in type(made).__mro__],
                "format": made.fp8_format.name,
                "quantized": [not isinstance(c, contextlib.nullcontext) for c in contexts],
                "delayed": {
                    name: getattr(made, name, None) for name in ("margin", "amax_history_len", "amax_compute_algo")
                },
                "power_of_2": getattr(getattr(made, "fp8_quant_fwd_inp", None), "power_2_scale", None),
                "epsilon": getattr(getattr(made, "fp8_quant_fwd_inp", None), "amax_epsilon", None),
                "weights_2d": getattr(made, "w_block_scaling_dim", None),
                "modules": {type(m).__module__ for m in chunk.modules()},
            }
    return found | {"numbers": te_numbers()}


def te_numbers() -> dict[str, float]:
    """Largest differences from what Transformer Engine has in Python: its reference of current scaling, and the unfused
    update of delayed scales (relative).
    """
    import torch
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.custom_recipes.reference_current_scaling import CurrentScalingQuantizerRef
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    from drpo_megatron.fp8 import numerics

    torch._dynamo.config.disable = True  # compiling would ask the GPU that is not there
    torch.manual_seed(0)
    current = delayed = 0.0
    for fmt in (numerics.E4M3, numerics.E5M2):
        x = torch.randn(70, 90) * 2.0 ** torch.randint(-20, 20, (70, 90))
        theirs, ours = CurrentScalingQuantizerRef(fmt.dtype).quantize(x), numerics.tensorwise(x, fmt)
        restored = theirs.data.float() * theirs.scale
        current = max(current, float((restored - ours.dequantize()).abs().max()))
        for algorithm in ("max", "most_recent"):
            recipe = DelayedScaling(margin=1, amax_compute_algo=algorithm, amax_history_len=3)
            history, scale = torch.zeros(3, 2), torch.ones(2)
            our_history, our_scale = history.clone(), scale.clone()
            for amaxes in torch.rand(7, 2) * 10:
                history[0] = our_history[0] = amaxes
                _amax_and_scale_update(history, scale, fmt.largest, recipe)
                our_scale = numerics.delayed_scale(our_history, our_scale, fmt, 1, algorithm)  # type: ignore[arg-type]
                our_history = numerics.rolled(our_history)
                # It divides by way of the reciprocal, which is rounded once more.
                delayed = max(delayed, float((scale / our_scale - 1).abs().max()))
                delayed = max(delayed, float((history - our_history).abs().max()))
    return {"current": current, "delayed": delayed}


def test_transformer_engine_gets_the_settings() -> None:
    """Its recipe class, its format, its history; layers that are left out have no FP8 context. The defaults that the
    emulation follows are those of the installed version.
    """
    found = run_ranks(1, te_recipes, te_install.directory(), spawn=True)[0]
    numbers = found.pop("numbers")
    names = {
        "delayed": "DelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }
    for recipe, name in names.items():
        assert name in found[recipe]["classes"], recipe
        assert "megatron.core.extensions.transformer_engine" in found[recipe]["modules"]
    formats = {"delayed": "HYBRID", "tensorwise": "E4M3", "blockwise": "E4M3", "mxfp8": "HYBRID"}
    assert {recipe: of["format"] for recipe, of in found.items()} == formats
    assert found["blockwise"]["quantized"] == [False, False, True, False]
    assert all(all(found[recipe]["quantized"]) for recipe in ("delayed", "tensorwise", "mxfp8"))
    history = {"margin": 2, "amax_history_len": 9, "amax_compute_algo": "most_recent"}
    assert found["delayed"]["delayed"] == history
    assert (found["tensorwise"]["power_of_2"], found["blockwise"]["power_of_2"]) == (False, True)
    assert found["tensorwise"]["epsilon"] == found["blockwise"]["epsilon"] == 0
    assert found["blockwise"]["weights_2d"] == 2
    assert numbers["current"] == 0
    assert numbers["delayed"] < 1e-6
