"""Moments below float32: refused where nothing updates them, and counted by the plan."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from drpo_megatron import platform
from drpo_megatron.config.optimizer_checks import state_problems
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.memory import AdamBytes, state_memory

BFLOAT16 = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}


def config(optimizer: dict[str, Any], *, dtype: str = "bfloat16", placement: str = "disaggregated") -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "moments",
            "model": {"path": "model", "dtype": dtype},
            "data": {"source": {"type": "jsonl", "path": "unused.jsonl"}},
            "reward": {"type": "math_verify"},
            "rollout": {
                "prompts_per_step": 4,
                "samples_per_prompt": 2,
                "placement": placement,
                "sampling": {"max_new_tokens": 8},
            },
            "algorithm": {"loss": "drpo"},
            "optimizer": {"lr": 1e-3, **optimizer},
            "training": {"steps": 1},
        }
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set what the machine has: a CUDA device or none, and Transformer Engine or not."""

    def has(device: bool, transformer_engine: bool) -> None:
        monkeypatch.setattr(platform, "compute_capability", lambda: (9, 0) if device else None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if transformer_engine else None)

    has(True, True)
    return has


def only(problems: list[str], *words: str) -> None:
    assert len(problems) == 1, problems
    assert all(word in problems[0] for word in words), problems[0]


def test_accepted(machine: Any) -> None:
    assert not list(state_problems(config(BFLOAT16)))
    assert not list(state_problems(config(BFLOAT16, placement="colocated")))
    assert not list(state_problems(config({"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "bfloat16"})))
    machine(False, False)
    assert not list(state_problems(config({}, dtype="float32")))


def test_refused(machine: Any) -> None:
    only(list(state_problems(config(BFLOAT16 | {"distributed": False}))), "optimizer.exp_avg_dtype: ", "distributed")
    only(list(state_problems(config(BFLOAT16, dtype="float32"))), "model.dtype = float32", "or it to float32")
    fp8 = {"exp_avg_sq_dtype": "fp8"}
    only(list(state_problems(config(fp8, placement="colocated"))), "exp_avg_sq_dtype: is fp8", "colocated", "bfloat16")
    machine(True, False)
    only(list(state_problems(config(BFLOAT16))), "transformer_engine is not installed")
    machine(False, False)
    only(list(state_problems(config(BFLOAT16))), "no CUDA device", "set it to float32")


@pytest.mark.parametrize(
    ("optimizer", "fp8", "bytes_a_parameter"),
    [
        ({}, {}, 12),
        (BFLOAT16, {}, 2 + 2 + 2),
        ({"exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "bfloat16"}, {}, 2 + 1 + 2),
        # Megatron-Core updates whole main weights of parameters that these recipes quantize.
        (BFLOAT16, {"recipe": "blockwise"}, 4 + 2 + 2),
        (BFLOAT16, {"recipe": "delayed"}, 2 + 2 + 2),
    ],
)
def test_bytes(optimizer: dict[str, Any], fp8: dict[str, Any], bytes_a_parameter: int) -> None:
    run = RunConfig.model_validate(config(optimizer).model_dump() | {"fp8": fp8})
    adam = AdamBytes.of(run)
    assert state_memory(1000, weight_bytes=2, shards=4, adam=adam).optimizer == 250 * bytes_a_parameter
    assert state_memory(1000, weight_bytes=4, shards=4, adam=adam).optimizer == 250 * adam.moments
