"""Advantages against naive arithmetic with the standard library."""

from __future__ import annotations

import statistics

import pytest

from drpo_megatron.algorithms import ADVANTAGES, compute_advantages, fraction_without_signal

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1], [0.5], [-1.0, 2.0, 0.25, 7.0, 1.0]]


def naive(name: str) -> list[list[float]]:
    centred = [[r - statistics.fmean(group) for r in group] for group in REWARDS]
    if name == "mean":
        return centred
    if name == "mean_std":
        return [
            [c / (statistics.stdev(group) + 1e-6) if len(group) > 1 else 0.0 for c in row]
            for row, group in zip(centred, REWARDS, strict=True)
        ]
    if name == "leave_one_out":
        return [
            [r - statistics.fmean(group[:i] + group[i + 1 :]) if len(group) > 1 else 0.0 for i, r in enumerate(group)]
            for group in REWARDS
        ]
    assert name == "reinforce_pp_baseline"
    deviation = statistics.pstdev([c for row in centred for c in row]) + 1e-6
    return [[c / deviation for c in row] for row in centred]


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_against_naive(name: str) -> None:
    result = compute_advantages(name, REWARDS)
    assert [len(row) for row in result] == [4, 3, 1, 5]
    for row, expected in zip(result, naive(name), strict=True):
        assert row == pytest.approx(expected, rel=1e-12, abs=1e-9)
        assert sum(row) == pytest.approx(0, abs=1e-8), "advantages of a group sum to zero"
    assert max(map(abs, result[0])) > 0.2
    assert result[1] == pytest.approx([0, 0, 0], abs=1e-9), "equal rewards give no signal, not amplified rounding"
    assert result[2] == [0.0], "a group of one has no baseline"


def test_fraction_without_signal() -> None:
    assert fraction_without_signal(REWARDS) == 0.5
    assert fraction_without_signal([[0.0, 1.0]]) == 0.0


@pytest.mark.parametrize(
    ("name", "rewards", "message"),
    [
        ("gae", [[1.0]], "choose from mean"),
        ("mean", [], "at least one"),
        ("mean", [[1.0], []], "at least one"),
        ("mean", [[1.0, float("nan")]], "not finite"),
    ],
)
def test_refusals(name: str, rewards: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_advantages(name, rewards)
