"""Emulated FP8 training by the real `Policy`: over layouts, against training without FP8, and what is quantized.

`moved` measures runs against one another: the distance of two runs' weights over the distance that one of them moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from drpo_megatron.models.hf_config import HFModelConfig
from tests.support import tiny_models
from tests.support.launch import run_ranks
from tests.support.parity import SP2, Case, Outcome, Updates, configuration, make_updates, run_cases
from tests.support.updates import make_sequences

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


def mixture(root: Path, family: str) -> dict[str, Any]:
    """Of an update of a mixture of experts: whether it was applied, its quantized layers, and the matrices it has."""
    from drpo_megatron.fp8.emulation import emulated_layers
    from drpo_megatron.platform import distributed
    from drpo_megatron.training.step import Policy

    config = configuration(MIXTURES[family], root / family)
    distributed.initialize(config.layout, seed=0)
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
    distributed.initialize(config.layout, seed=0)
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


class Runs:
    """Training runs of one model, each key of ONE and TWO once, when the first of its world size is asked for."""

    def __init__(self, root: Path, one: Iterable[str], two: Iterable[tuple[str, str]], count: int) -> None:
        self.root = root
        model = tiny_models.write("qwen3", root / "dense", **MODEL)
        self.updates = {"dense": even(make_updates(model, HFModelConfig.load(root / "dense"), count))}
        self._cases: dict[int, dict[Any, Case]] = {1: {key: ONE[key] for key in one}, 2: {key: TWO[key] for key in two}}
        self._done: dict[int, dict[Any, Outcome]] = {}

    def _outcomes(self, world: int) -> dict[Any, Outcome]:
        if world not in self._done:
            cases = self._cases[world]
            outcomes = run_ranks(world, run_cases, self.root, self.updates, list(cases.values()))[0]
            self._done[world] = dict(zip(cases, outcomes, strict=True))
        return self._done[world]

    @property
    def one(self) -> dict[str, Outcome]:
        return self._outcomes(1)

    @property
    def two(self) -> dict[tuple[str, str], Outcome]:
        return self._outcomes(2)


def first_update(a: Outcome, b: Outcome) -> tuple[float, float]:
    """Relative differences of loss and gradient norm."""
    return abs(a.losses[0] / b.losses[0] - 1), abs(a.grad_norms[0] / b.grad_norms[0] - 1)


def is_near_the_one_without_fp8(recipe: str, runs: Runs) -> None:
    """Three bits of mantissa, and steps of Adam, which scales up small gradients: a third of the way apart."""
    loss, norm = first_update(runs.one[recipe], runs.one["none"])
    assert 1e-4 < loss < 0.1 and 1e-4 < norm < 0.1
    assert 0.1 < moved(runs.one[recipe], runs.one["none"], runs.root) < 0.5


def agrees_with_one_process(key: tuple[str, str], runs: Runs) -> None:
    """Under tensor parallelism blocks are whole on each rank, and delayed scaling shares largest values. What is left
    is the order of float32 sums, which in later updates rounds single values of a tensor to a neighbour in FP8.

    tensorwise: each rank's part of a weight has a scale of its own, as have the inputs of row-parallel layers and the
    gradients of column-parallel ones. The runs are as far apart as with and without FP8.
    """
    how, recipe = key
    loss, norm = first_update(runs.two[key], runs.one[recipe])
    distance = moved(runs.two[key], runs.one[recipe], runs.root)
    if recipe == "tensorwise" and how == "sequence":
        assert loss > 1e-3 and 0.1 < distance < 0.5
    else:
        assert loss < 1e-6 and norm < 2e-5
        assert distance < 0.1


def every_matrix_but_the_router_s_is_quantized(family: str, root: Path) -> None:
    """Experts, shared ones and latents too, in the layers that are to be."""
    tiny_models.write(family, root / family, num_hidden_layers=2, **MIXTURE_CHANGES[family])
    (of,) = run_ranks(1, mixture, root, family)
    assert of["applied"]
    quantized_layer = "decoder.layers.1." if family == "qwen3_moe" else "decoder.layers.0."
    expected = {
        name.removesuffix(".weight")
        for name, dimensions in of["dimensions"].items()
        if name.startswith(quantized_layer) and dimensions == 2 and ".router." not in name
    }
    assert of["quantized"] == expected
    assert any(".local_experts.7.linear_fc2" in name for name in expected)


FAST_ONE = ("none", "delayed", "blockwise")
FAST_TWO = (("sequence", "blockwise"), ("pipeline recomputed", "delayed"), ("pipeline", "delayed"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("models"), FAST_ONE, FAST_TWO, count=3)


@pytest.mark.parametrize("recipe", FAST_ONE[1:])
def test_training_is_near_the_one_without_fp8(recipe: str, runs: Runs) -> None:
    is_near_the_one_without_fp8(recipe, runs)


@pytest.mark.parametrize("key", FAST_TWO, ids=" ".join)
def test_layouts_agree_where_scales_do_not_depend_on_them(key: tuple[str, str], runs: Runs) -> None:
    agrees_with_one_process(key, runs)


def test_recomputed_activations_have_the_scales_of_their_forward(runs: Runs) -> None:
    """With two stages, the next micro-batch has moved the scales on before."""
    assert runs.two["pipeline recomputed", "delayed"].equals(runs.two["pipeline", "delayed"])


def test_every_matrix_but_the_router_s_is_quantized(tmp_path: Path) -> None:
    every_matrix_but_the_router_s_is_quantized("deepseek_v3", tmp_path)


def test_delayed_scales_go_on_from_a_checkpoint(runs: Runs) -> None:
    (of,) = run_ranks(1, resumed, runs.root, runs.updates["dense"])
    assert of["norms"][0] == of["norms"][1]
    assert all(scale != 1 for scale in of["scales"])
    # More micro-batches than places in the history, whose first is free.
    assert of["history"] == [4, 4, 4]
