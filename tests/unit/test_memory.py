"""Stages of unequal length, and the bytes a rank holds, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from drpo_megatron.models.memory import model_state_memory
from drpo_megatron.platform.layout import ParallelLayout


@pytest.mark.parametrize(
    ("num_layers", "layout", "stages"),
    [
        (80, ParallelLayout(pipeline=4), [20, 20, 20, 20]),
        (64, ParallelLayout(pipeline=1), [64]),
        (94, ParallelLayout(pipeline=4, first_stage_layers=23, last_stage_layers=23), [23, 24, 24, 23]),
        (61, ParallelLayout(pipeline=4, last_stage_layers=13), [16, 16, 16, 13]),
        (61, ParallelLayout(pipeline=2, first_stage_layers=31), [31, 30]),
        (7, ParallelLayout(pipeline=2, first_stage_layers=4, last_stage_layers=3), [4, 3]),
        (20, ParallelLayout(pipeline=4, virtual_pipeline=2, first_stage_layers=2), [2, 6, 6, 6]),
    ],
)
def test_layers_of_the_stages(num_layers: int, layout: ParallelLayout, stages: list[int]) -> None:
    assert layout.layers_per_stage(num_layers) == stages


@pytest.mark.parametrize(
    ("num_layers", "layout"),
    [
        (61, ParallelLayout(pipeline=4)),
        (94, ParallelLayout(pipeline=4, first_stage_layers=23)),
        (3, ParallelLayout(pipeline=4)),
        (6, ParallelLayout(pipeline=4, first_stage_layers=5)),
        (8, ParallelLayout(pipeline=2, first_stage_layers=4, last_stage_layers=3)),
        (20, ParallelLayout(pipeline=4, virtual_pipeline=4, first_stage_layers=2)),
    ],
)
def test_layers_that_cannot_be_divided(num_layers: int, layout: ParallelLayout) -> None:
    with pytest.raises(ValueError, match=f"^{num_layers} layers do not divide over .*choose a divisor"):
        layout.layers_per_stage(num_layers)


@pytest.mark.parametrize("name", ["first_stage_layers", "last_stage_layers"])
def test_stage_lengths_need_a_pipeline(name: str) -> None:
    with pytest.raises(ValueError, match=f"parallel.{name} is 4 with pipeline 1"):
        ParallelLayout(**{name: 4})
    with pytest.raises(ValueError, match=f"parallel.{name} is 0"):
        ParallelLayout(pipeline=2, **{name: 0})


def test_bytes_of_a_rank() -> None:
    """Dense state over data × context = 6 ranks, expert state over the 3 that TP 4 × DP 3 × CP 2 leaves to EP 8."""
    dense = torch.nn.Linear(30, 20, bias=False, dtype=torch.bfloat16, device="meta")
    expert = torch.nn.Linear(12, 5, bias=False, dtype=torch.bfloat16, device="meta")
    expert.weight.allreduce = False
    router = torch.nn.Linear(6, 1, bias=False, dtype=torch.float32, device="meta")
    layout = ParallelLayout(tensor=4, data=3, context=2, expert=8)

    sharded = model_state_memory([torch.nn.Sequential(dense, expert), router], layout)
    assert sharded.weights == 600 * 2 + 60 * 2 + 6 * 4
    assert sharded.gradients == 4 * (600 + 60 + 6)
    assert sharded.optimizer == 600 * 12 // 6 + 60 * 12 // 3 + 6 * 8 // 6
    assert sharded.total == sharded.weights + sharded.gradients + sharded.optimizer

    whole = model_state_memory([torch.nn.Sequential(dense, expert), router], layout, distributed_optimizer=False)
    assert whole.optimizer == 660 * 12 + 6 * 8
    assert (whole.weights, whole.gradients) == (sharded.weights, sharded.gradients)
