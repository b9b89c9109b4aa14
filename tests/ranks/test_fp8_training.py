"""Emulated FP8 training by the real `Policy`: over layouts, against training without FP8, and what is quantized.

`moved` measures runs against one another: the distance of two runs' weights over the distance that one of them moved.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from drpo_megatron.models.hf_config import HFModelConfig
from tests.support import te_install, tiny_models
from tests.support.launch import run_ranks
from tests.support.parity import SP2, Case, Outcome, Updates, configuration, make_updates, run_cases

pytestmark = pytest.mark.distributed

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
# Each of two tensor-parallel ranks has whole blocks of 128 of every weight: its heads of one key-value group, its gate
# and its up columns.
MODEL = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2, "initializer_range": 0.1}
MIXTURE_CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [0]},
    # Both layers have experts: the last one is left out.
    "deepseek_v3": {"first_k_dense_replace": 0},
}


def case(recipe: str | None, parallel: dict[str, Any] | None = None, model: str = "dense", **settings: Any) -> Case:
    fp8 = {} if recipe is None else {"fp8.recipe": recipe, "fp8.backend": "emulate"}
    # No packing that depends on the layout, and several micro-batches.
    same = {"training.tokens_per_micro_batch": 48}
    return Case(f"{recipe}", model, parallel or {}, fp8 | same | settings)


def even(updates: Updates) -> Updates:
    """Every sequence with an even number of positions: packs need no padding for the ranks of sequence parallelism,
    which would be tokens like others to a scale.
    """

    def longer(number: int, s: Any) -> Any:
        if s.num_positions % 2 == 0:
            return s
        return dataclasses.replace(
            s,
            token_ids_L=np.append(s.token_ids_L, np.int32(7)),
            sampled_L=np.append(s.sampled_L, True),
            logmu_L=np.append(s.logmu_L, np.float32(-6 - 0.01 * number)),
            version_L=np.append(s.version_L, np.int32(0)),
        )

    return [[longer(i, s) for i, s in enumerate(sequences)] for sequences in updates]


def moved(a: Outcome, b: Outcome, root: Path) -> float:
    before = load_file(root / "dense" / "model.safetensors")
    apart = sum(float(np.square(w - b.weights[n]).sum()) for n, w in a.weights.items())
    way = sum(float(np.square(w - before[n]).sum()) for n, w in b.weights.items())
    return (apart / way) ** 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def updates(root: Path) -> dict[str, Updates]:
    model = tiny_models.write("qwen3", root / "dense", **MODEL)
    return {"dense": even(make_updates(model, HFModelConfig.load(root / "dense")))}


ONE = {
    "none": case(None),
    **{recipe: case(recipe) for recipe in RECIPES},
    **{f"{recipe} recomputed": case(recipe, **{"model.recompute": "full"}) for recipe in ("delayed", "mxfp8")},
}
TWO = {
    ("tensor", "delayed"): case("delayed", {"tensor": 2}),
    ("tensor", "blockwise"): case("blockwise", {"tensor": 2}),
    **{("sequence", recipe): case(recipe, SP2) for recipe in RECIPES},
    ("pipeline", "delayed"): case("delayed", {"pipeline": 2}),
    ("pipeline", "tensorwise"): case("tensorwise", {"pipeline": 2}),
    ("pipeline recomputed", "delayed"): case("delayed", {"pipeline": 2}, **{"model.recompute": "full"}),
}
MIXTURES = {
    "qwen3_moe": case("blockwise", model="qwen3_moe", **{"fp8.unquantized_first_layers": 1}),
    "deepseek_v3": case("mxfp8", model="deepseek_v3", **{"fp8.unquantized_last_layers": 1}),
}


def on_one_rank(root: Path, updates: dict[str, Updates]) -> Any:
    outcomes = run_cases(root, updates, list(ONE.values()))
    return outcomes, {family: mixture(root, family) for family in MIXTURES}, resumed(root, updates["dense"])


def mixture(root: Path, family: str) -> dict[str, Any]:
    """Of an update of a mixture of experts: whether it was applied, its quantized layers, and the matrices it has."""
    from drpo_megatron.fp8.emulation import emulated_layers
    from drpo_megatron.platform import distributed
    from drpo_megatron.training.step import Policy
    from tests.ranks.test_train_step import make_sequences

    config = configuration(MIXTURES[family], root / family)
    distributed.initialize(config.layout, timeout_s=60, seed=0)
    policy = Policy(config)
    result = policy.update(make_sequences(policy.hf.vocab_size), version=0)
    (model,) = policy.modules
    matrices = {n: p.dim() for n, p in model.named_parameters()}
    distributed.shutdown()
    return {"applied": result.applied, "quantized": set(emulated_layers(model)), "dimensions": matrices}


def resumed(root: Path, updates: Updates) -> dict[str, Any]:
    """The third update of a run, and of one that goes on from its checkpoint before."""
    from drpo_megatron.checkpoint.saver import Saver
    from drpo_megatron.fp8.emulation import emulated_layers
    from drpo_megatron.platform import distributed
    from drpo_megatron.training.step import Policy

    save = {"save.every": 1, "save.directory": root / "checkpoints", "save.asynchronous": False}
    config = configuration(case("delayed", **save, **{"fp8.amax_history": 5}), root / "dense")
    distributed.initialize(config.layout, timeout_s=60, seed=0)
    first, saver = Policy(config), Saver(config)
    for version in range(2):
        first.update(updates[version], version)
    saver.save(first, 2, 2, {}, {})
    saver.close()
    norms = [first.update(updates[2], 2).grad_norm]
    second = Policy(config)
    assert Saver(config).resume(second) is not None
    (layer, *_) = emulated_layers(second.modules[0]).values()
    scales, history = layer.quantizer.scales.tolist(), layer.quantizer.amax_history.count_nonzero(dim=0).tolist()
    norms.append(second.update(updates[2], 2).grad_norm)
    distributed.shutdown()
    return {"norms": norms, "scales": scales, "history": history}


@pytest.fixture(scope="module")
def report(root: Path, updates: dict[str, Updates]) -> Any:
    for family in MIXTURES:
        tiny_models.write(family, root / family, num_hidden_layers=2, **MIXTURE_CHANGES[family])
    return run_ranks(1, on_one_rank, root, updates)[0]


@pytest.fixture(scope="module")
def one(report: Any) -> dict[str, Outcome]:
    return dict(zip(ONE, report[0], strict=True))


@pytest.fixture(scope="module")
def two(root: Path, updates: dict[str, Updates]) -> dict[Any, Outcome]:
    outcomes = run_ranks(2, run_cases, root, updates, list(TWO.values()))[0]
    return dict(zip(TWO, outcomes, strict=True))


def first_update(a: Outcome, b: Outcome) -> tuple[float, float]:
    """Relative differences of loss and gradient norm."""
    return abs(a.losses[0] / b.losses[0] - 1), abs(a.grad_norms[0] / b.grad_norms[0] - 1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_is_near_the_one_without_fp8(recipe: str, one: dict[str, Outcome], root: Path) -> None:
    """Three bits of mantissa, and steps of Adam, which scales up small gradients: a third of the way apart."""
    loss, norm = first_update(one[recipe], one["none"])
    assert 1e-4 < loss < 0.1 and 1e-4 < norm < 0.1
    assert 0.1 < moved(one[recipe], one["none"], root) < 0.5


@pytest.mark.parametrize("key", TWO, ids=" ".join)
def test_layouts_agree_where_scales_do_not_depend_on_them(
    key: tuple[str, str], one: dict[str, Outcome], two: dict[Any, Outcome], root: Path
) -> None:
    """Under tensor parallelism blocks are whole on each rank, and delayed scaling shares largest values. What is left
    is the order of float32 sums, which in later updates rounds single values of a tensor to a neighbour in FP8.

    tensorwise: each rank's part of a weight has a scale of its own, as have the inputs of row-parallel layers and the
    gradients of column-parallel ones. The runs are as far apart as with and without FP8.
    """
    how, recipe = key
    loss, norm = first_update(two[key], one[recipe])
    distance = moved(two[key], one[recipe], root)
    if recipe == "tensorwise" and how == "sequence":
        assert loss > 1e-3 and 0.1 < distance < 0.5
    else:
        assert loss < 1e-6 and norm < 2e-5
        assert distance < 0.1


def test_recomputed_activations_have_the_scales_of_their_forward(
    one: dict[str, Outcome], two: dict[Any, Outcome]
) -> None:
    """With two stages, the next micro-batch has moved the scales on before."""
    for recipe in ("delayed", "mxfp8"):
        assert one[f"{recipe} recomputed"].equals(one[recipe])
    assert two["pipeline recomputed", "delayed"].equals(two["pipeline", "delayed"])


@pytest.mark.parametrize("family", MIXTURES)
def test_every_matrix_but_the_router_s_is_quantized(family: str, report: Any) -> None:
    """Experts, shared ones and latents too, in the layers that are to be."""
    of = report[1][family]
    assert of["applied"]
    quantized_layer = "decoder.layers.1." if family == "qwen3_moe" else "decoder.layers.0."
    expected = {
        name.removesuffix(".weight")
        for name, dimensions in of["dimensions"].items()
        if name.startswith(quantized_layer) and dimensions == 2 and ".router." not in name
    }
    assert of["quantized"] == expected
    assert any(".local_experts.7.linear_fc2" in name for name in expected)


def test_delayed_scales_go_on_from_a_checkpoint(report: Any) -> None:
    of = report[2]
    assert of["norms"][0] == of["norms"][1]
    assert all(scale != 1 for scale in of["scales"])
    # More micro-batches than places in the history, whose first is free.
    assert of["history"] == [4, 4, 4]


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
    with te_install.directory() as path:
        found = run_ranks(1, te_recipes, path, spawn=True)[0]
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
