"""Moments in bfloat16: refused where nothing updates them, and counted by the plan."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from drpo_megatron import platform
from drpo_megatron.config.optimizer_checks import moment_machine_problems, moment_problems
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.memory import AdamBytes, state_memory

BFLOAT16 = {"moments_dtype": "bfloat16"}


def config(
    optimizer: dict[str, Any],
    *,
    dtype: str = "bfloat16",
    placement: str = "disaggregated",
    fp8: dict[str, Any] | None = None,
) -> RunConfig:
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
            "fp8": fp8 or {},
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


def problems(*arguments: Any, **keywords: Any) -> list[str]:
    run = config(*arguments, **keywords)
    return [*moment_problems(run), *moment_machine_problems(run)]


def test_accepted(machine: Any) -> None:
    assert not problems(BFLOAT16)
    assert not problems(BFLOAT16, placement="colocated")
    assert not problems(BFLOAT16, fp8={"recipe": "blockwise", "parameters": True})
    machine(False, False)
    assert not problems({}, dtype="float32")


def test_refused(machine: Any) -> None:
    only(problems(BFLOAT16 | {"distributed": False}), "optimizer.moments_dtype: is bfloat16", "distributed = false")
    only(problems(BFLOAT16, dtype="float32"), "model.dtype = float32", "or it to float32")
    only(problems(BFLOAT16, fp8={"recipe": "delayed", "parameters": True}), "fp8.parameters", "delayed")
    machine(True, False)
    only(problems(BFLOAT16), "transformer_engine is not installed")
    machine(False, False)
    only(problems(BFLOAT16), "no CUDA device", "set it to float32")


@pytest.mark.parametrize(
    ("optimizer", "fp8", "bytes_a_parameter"),
    [
        ({}, {}, 12),
        (BFLOAT16, {}, 2 + 2 + 2),
        # Megatron-Core updates whole main weights of parameters that these recipes quantize.
        (BFLOAT16, {"recipe": "blockwise"}, 4 + 2 + 2),
        (BFLOAT16, {"recipe": "delayed"}, 2 + 2 + 2),
        (BFLOAT16, {"recipe": "blockwise", "backend": "emulate"}, 2 + 2 + 2),
    ],
)
def test_bytes(optimizer: dict[str, Any], fp8: dict[str, Any], bytes_a_parameter: int) -> None:
    adam = AdamBytes.of(config(optimizer, fp8=fp8))
    assert state_memory(1000, weight_bytes=2, shards=4, adam=adam).optimizer == 250 * bytes_a_parameter
    assert state_memory(1000, weight_bytes=4, shards=4, adam=adam).optimizer == 250 * adam.moments
