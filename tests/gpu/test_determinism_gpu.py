"""Deterministic mode and overlapped communication with Transformer Engine, Triton and NCCL: only GPUs can show them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu.devices import needs_devices
from tests.ranks.test_determinism import CASES, train
from tests.support.launch import run_ranks
from tests.support.parity import Case, errors, write_models

pytestmark = pytest.mark.gpu

# Transformer Engine's attention over packed sequences is for 16-bit numbers.
ON_GPU = [replace(case, settings={**case.settings, "model.dtype": "bfloat16"}) for case in CASES]
ON_ONE = [replace(case, name=case.model, parallel={}) for case in ON_GPU[:2]]
AT_ONCE = {"optimizer.overlap_grad_reduce": False, "optimizer.overlap_param_gather": False}


@pytest.mark.parametrize(("ranks", "cases"), [(1, ON_ONE), (2, ON_GPU)], ids=["one", "two"])
def test_two_runs_are_equal_to_the_bit_on_gpus(tmp_path: Path, ranks: int, cases: list[Case]) -> None:
    needs_devices(ranks)
    updates = write_models(tmp_path, ["qwen3", "qwen3_moe"])
    (_, first, _), (_, second, _) = (run_ranks(ranks, train, tmp_path, updates, cases)[0] for _ in range(2))
    for case, one, two in zip(cases, first, second, strict=True):
        assert one.metrics and one.equals(two), case.name


def test_overlap_changes_nothing_on_gpus(tmp_path: Path) -> None:
    """Buckets that travel during the backward give what all at once gives, up to a last place of bf16 in a weight: the
    parts of the gradient norm are summed in another order.
    """
    needs_devices(2)
    updates = write_models(tmp_path, ["qwen3"])
    overlapped = ON_GPU[0]
    at_once = replace(overlapped, settings={**overlapped.settings, **AT_ONCE})
    _, outcomes, _ = run_ranks(2, train, tmp_path, updates, [overlapped, at_once])[0]
    assert max(errors(*outcomes)) <= 1e-2
