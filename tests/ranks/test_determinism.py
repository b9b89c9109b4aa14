"""Deterministic mode: two jobs with the same weights and sequences end with the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drpo_megatron.platform.determinism import ENVIRONMENT
from tests.support.launch import run_ranks
from tests.support.parity import OVERLAPPED, SP2, Case, Outcome, Updates, run_cases, write_models

pytestmark = pytest.mark.distributed

DETERMINISTIC = {"training.deterministic": True}
CASES = [
    Case("DP2, overlapped", "qwen3", {"data": 2}, DETERMINISTIC | OVERLAPPED),
    Case("TP2+SP×EP2", "qwen3_moe", {**SP2, "expert": 2}, DETERMINISTIC | OVERLAPPED),
    Case(
        "PP2×VPP2, bf16", "qwen3", {"pipeline": 2, "virtual_pipeline": 2}, DETERMINISTIC | {"model.dtype": "bfloat16"}
    ),
]


def train(root: Path, updates: dict[str, Updates], cases: list[Case]) -> tuple[str, list[Outcome], bool]:
    """What a rank says without the environment, the outcomes with it, and torch's own switch after them."""
    import torch

    from drpo_megatron.platform import determinism

    for name in determinism.ENVIRONMENT:
        os.environ.pop(name, None)
    refusal = ""
    try:
        determinism.enable()
    except RuntimeError as error:
        refusal = str(error)
    os.environ.update(determinism.environment())
    return refusal, run_cases(root, updates, cases), torch.are_deterministic_algorithms_enabled()


def compare(root: Path, cases: list[Case], count: int) -> None:
    updates = write_models(root, list({case.model for case in cases}), count)
    (refusal, first, enabled), (_, second, _) = (run_ranks(2, train, root, updates, cases)[0] for _ in range(2))
    assert enabled
    assert all(f"{name}={value}" in refusal for name, value in ENVIRONMENT.items())
    for case, one, two in zip(cases, first, second, strict=True):
        assert one.metrics and one.equals(two), case.name


def test_two_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    compare(tmp_path, CASES[:1], count=2)
