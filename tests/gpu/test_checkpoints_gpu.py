"""Checkpoints on GPUs: device tensors are copied to host memory, Transformer Engine's or Apex's Adam keeps its count of
steps in the groups, and NCCL carries what the planning exchanges.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny_models
from tests.distributed.test_checkpoints import DRIVER, SP2, Case, resume_and_go_on, save_and_go_on
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: one a rank"),
]

BFLOAT16 = (("model.dtype", "bfloat16"),)
CASES = [
    Case("qwen3", {"data": 2}, ({"data": 2}, SP2), BFLOAT16),
    Case("qwen3", {"data": 2}, ({"data": 2}, SP2), (*BFLOAT16, ("optimizer.moments_dtype", "bfloat16"))),
    Case("qwen3_moe", {"data": 2}, ({"data": 2}, {"data": 2, "expert": 2}), BFLOAT16),
]


def test_going_on_from_a_checkpoint_on_gpus(tmp_path: Path) -> None:
    for case in CASES:
        tiny_models.write(case.family, tmp_path / case.family)
    uninterrupted = run_ranks(2, save_and_go_on, tmp_path, CASES)[0]
    wanted = [(case, parallel) for case in CASES for parallel in case.resumed]
    outcomes = run_ranks(2, resume_and_go_on, tmp_path, wanted)[0]
    for (case, parallel), outcome in zip(wanted, outcomes, strict=True):
        expected = uninterrupted[CASES.index(case)]
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
