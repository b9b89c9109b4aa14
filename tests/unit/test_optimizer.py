"""What the trainer adds around Megatron's optimizer."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drpo_megatron.training.optimizer import UpdateGuard, _fuse


@pytest.mark.parametrize("chained", [False, True])
def test_torchs_adamw_passes_over_memory_once(chained: bool) -> None:
    """And comes to the weights of the plain form."""
    weight = torch.nn.Parameter(torch.randn(5, 3))
    plain = torch.optim.AdamW([copy.deepcopy(weight)], lr=0.1)
    fused = torch.optim.AdamW([weight], lr=0.1)
    part: Any = SimpleNamespace(optimizer=fused)
    _fuse(SimpleNamespace(chained_optimizers=[part]) if chained else part)  # type: ignore[arg-type]
    assert all(group["fused"] for group in fused.param_groups)
    for _ in range(3):
        gradient = torch.randn(5, 3)
        for optimizer in (plain, fused):
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(fused.param_groups[0]["params"][0], plain.param_groups[0]["params"][0])


def test_another_optimizer_is_left_alone() -> None:
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in sgd.param_groups])
    _fuse(SimpleNamespace(optimizer=sgd))  # type: ignore[arg-type]
    assert [{k: v for k, v in group.items() if k != "params"} for group in sgd.param_groups] == before


def test_the_guard_stops_after_its_limit_in_a_row() -> None:
    guard = UpdateGuard(limit=2)
    for applied in (False, True, False):
        guard.record(applied)
    assert (guard.skipped_total, guard.skipped_in_a_row) == (2, 1)
    with pytest.raises(FloatingPointError, match=r"2 updates in a row.*3 in all"):
        guard.record(False)
