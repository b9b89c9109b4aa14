"""FP8 that cannot run is refused before any process starts, with what would run."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest

from drpo_megatron import platform
from drpo_megatron.config.fp8_checks import fp8_layer_problems, fp8_problems
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.fp8.recipes import choose_block_scales

EMULATE = {"backend": "emulate"}


def config(fp8: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "fp8",
            "model": {"path": "model"},
            "data": {"source": {"type": "jsonl", "path": "unused.jsonl"}},
            "reward": {"type": "math_verify"},
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 8}},
            "algorithm": {"loss": "grpo"},
            "optimizer": {"lr": 1e-3, **sections.pop("optimizer", {})},
            "training": {"steps": 1, "tokens_per_micro_batch": 32},
            "fp8": fp8,
            **sections,
        }
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what the machine has: a compute capability or none, and Transformer Engine or not."""

    def has(capability: tuple[int, int] | None, transformer_engine: bool = True) -> None:
        monkeypatch.setattr(platform, "compute_capability", lambda: capability)
        found = object() if transformer_engine else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    has((9, 0))
    return has


def only(problems: list[str], *words: str) -> None:
    assert len(problems) == 1, problems
    assert all(word in problems[0] for word in words), problems[0]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_the_emulation_runs_anywhere(recipe: str, machine: Any) -> None:
    machine(None, transformer_engine=False)
    assert not list(fp8_problems(config({"recipe": recipe, **EMULATE})))
    assert not list(fp8_problems(config({})))


def test_without_a_gpu_or_transformer_engine(machine: Any) -> None:
    machine(None)
    only(list(fp8_problems(config({"recipe": "blockwise"}))), "fp8.backend: ", "no CUDA device", "fp8.backend: emulate")
    machine((9, 0), transformer_engine=False)
    only(list(fp8_problems(config({"recipe": "blockwise"}))), "not installed", "fp8.backend: emulate")


@pytest.mark.parametrize(
    ("capability", "recipe", "runs"),
    [
        ((8, 0), "tensorwise", None),
        ((8, 0), "delayed", None),
        ((8, 9), "blockwise", "fp8.recipe tensorwise or delayed would run here"),
        ((9, 0), "mxfp8", "fp8.recipe blockwise or tensorwise or delayed would run here"),
        ((12, 0), "mxfp8", "fp8.recipe blockwise or tensorwise or delayed would run here"),
    ],
)
def test_a_device_too_old_for_the_recipe(capability: tuple[int, int], recipe: str, runs: str, machine: Any) -> None:
    machine(capability)
    problems = list(fp8_problems(config({"recipe": recipe})))
    only(problems, f"fp8.recipe: {recipe} needs", f"{capability[0]}.{capability[1]}", "fp8.backend: emulate")
    assert ("would run here" in problems[0]) == (runs is not None) and (runs or "") in problems[0]


@pytest.mark.parametrize(
    ("capability", "recipe"),
    [((8, 9), "tensorwise"), ((8, 9), "delayed"), ((9, 0), "blockwise"), ((10, 0), "mxfp8"), ((10, 3), "mxfp8")],
)
def test_a_device_that_can(capability: tuple[int, int], recipe: str, machine: Any) -> None:
    machine(capability)
    assert not list(fp8_problems(config({"recipe": recipe})))


@pytest.mark.parametrize(("name", "value"), [("margin", 1), ("amax_history", 16), ("amax_algorithm", "most_recent")])
def test_settings_of_delayed_scaling_with_another_recipe(name: str, value: Any, machine: Any) -> None:
    only(list(fp8_problems(config({"recipe": "tensorwise", name: value, **EMULATE}))), f"fp8.{name}: ", "delayed")
    assert not list(fp8_problems(config({"recipe": "delayed", name: value, **EMULATE})))


def test_fp8_parameters(machine: Any) -> None:
    only(
        list(fp8_problems(config({"recipe": "tensorwise", "parameters": True, **EMULATE}))), "fp8.parameters", "emulate"
    )
    plain = {"optimizer": {"distributed": False}}
    wanted = {"recipe": "tensorwise", "parameters": True}
    only(list(fp8_problems(config(wanted, **plain))), "fp8.parameters", "optimizer.distributed")
    assert not list(fp8_problems(config(wanted)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "emulate"),
        ("format", "e4m3"),
        ("unquantized_first_layers", 1),
        ("unquantized_last_layers", 1),
        ("parameters", True),
        ("health_every", 5),
    ],
)
def test_a_section_without_effect(name: str, value: Any, machine: Any) -> None:
    only(list(fp8_problems(config({name: value}))), f"fp8.{name}: has no effect", "fp8.rollout = false")


def test_rollouts_alone_have_no_training_settings(machine: Any) -> None:
    machine(None)
    assert not list(fp8_problems(config({"rollout": True, "unquantized_first_layers": 1, **EMULATE})))
    only(list(fp8_problems(config({"rollout": True, "format": "hybrid"}))), "fp8.format", "fp8.recipe = null;")


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_layers_that_are_left_out(recipe: str, machine: Any) -> None:
    hf: Any = SimpleNamespace(num_layers=4)

    def problems(first: int, last: int, **more: Any) -> list[str]:
        left_out = {"unquantized_first_layers": first, "unquantized_last_layers": last}
        sections = {"parallel": {"pipeline": more.pop("pipeline", 1)}}
        run = config({"recipe": recipe, **left_out, **more}, **sections)
        return [*fp8_layer_problems(run, hf), *fp8_problems(run)]

    assert not problems(0, 0)
    assert not problems(1, 2, **EMULATE)
    only(problems(2, 2, **EMULATE), "2 + 2 leave none of the model's 4 layers")
    assert not problems(3, 0, pipeline=2, **EMULATE)
    if recipe == "delayed":
        only(problems(1, 0), "delayed", "emulate")
    else:
        assert not problems(1, 2)
        only(problems(3, 0, pipeline=2), "fp8.unquantized_first_layers: 3", "2 layers of a pipeline stage")
        only(problems(0, 3, pipeline=2), "fp8.unquantized_last_layers: 3")


def test_scales_of_blocks_without_blocks(machine: Any) -> None:
    only(
        list(fp8_problems(config({"recipe": "mxfp8", "block_scales": "float32", **EMULATE}))),
        "fp8.block_scales",
        "mxfp8",
    )
    assert not list(fp8_problems(config({"recipe": "blockwise", "block_scales": "float32", **EMULATE})))


def test_transformer_engine_reads_the_scales_of_blocks_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "left")
    for backend, scales, value in (
        ("emulate", "float32", "left"),
        ("transformer_engine", "float32", "1"),
        ("transformer_engine", "power_of_two", "0"),
    ):
        choose_block_scales(config({"recipe": "blockwise", "backend": backend, "block_scales": scales}).fp8)
        assert os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] == value
