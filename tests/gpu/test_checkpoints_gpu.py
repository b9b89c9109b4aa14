"""Checkpoints on GPUs: device tensors are copied to host memory, Transformer Engine's or Apex's Adam keeps its count of
steps in the groups, and NCCL carries what the planning exchanges.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.devices import needs_devices
from tests.ranks.test_checkpoints import DRIVER, SP2, Case, resume_and_go_on, save_and_go_on
from tests.support import tiny_models
from tests.support.launch import run_ranks

pytestmark = pytest.mark.gpu

BFLOAT16 = (("model.dtype", "bfloat16"),)
SMALL_MOMENTS = (*BFLOAT16, ("optimizer.moments_dtype", "bfloat16"))
CASES = {
    1: [
        Case("qwen3", {}, ({},), BFLOAT16),
        Case("qwen3", {}, ({},), SMALL_MOMENTS),
        Case("qwen3_moe", {}, ({},), BFLOAT16),
    ],
    2: [
        Case("qwen3", {"data": 2}, ({"data": 2}, SP2), BFLOAT16),
        Case("qwen3", {"data": 2}, ({"data": 2}, SP2), SMALL_MOMENTS),
        Case("qwen3_moe", {"data": 2}, ({"data": 2}, {"data": 2, "expert": 2}), BFLOAT16),
    ],
}


@pytest.mark.parametrize("ranks", CASES)
def test_going_on_from_a_checkpoint_on_gpus(tmp_path: Path, ranks: int) -> None:
    needs_devices(ranks)
    cases = CASES[ranks]
    for case in cases:
        tiny_models.write(case.family, tmp_path / case.family)
    uninterrupted = run_ranks(ranks, save_and_go_on, tmp_path, cases)[0]
    wanted = [(case, parallel) for case in cases for parallel in case.resumed]
    outcomes = run_ranks(ranks, resume_and_go_on, tmp_path, wanted)[0]
    for (case, parallel), outcome in zip(wanted, outcomes, strict=True):
        expected = uninterrupted[cases.index(case)]
        assert outcome["lr"] == expected["lr"]
        torch.testing.assert_close(outcome["driver"], DRIVER, rtol=0, atol=0)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(
                outcome["weights"][name].cpu(),
                tensor.cpu(),
                rtol=2**-6,
                atol=2**-6,
                msg=f"{case.name} {parallel} {name}",
            )
