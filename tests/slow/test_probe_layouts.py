"""The trainer's side of the log-prob probe in more layouts than `tests/ranks/test_probe.py` has."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.test_probe import TP2, Case, compare

pytestmark = pytest.mark.distributed

ONE_RANK: dict[str, Case] = {family: (family, {}, {}) for family in ("qwen3", "qwen2", "qwen3_moe", "deepseek_v3")}
FOUR_RANKS: dict[str, Case] = {
    "tp2-pp2": ("qwen3", TP2 | {"pipeline": 2}, {}),
    "tp2-cp2": ("qwen3", TP2 | {"context": 2}, {}),
    "pp2-vpp2-ep2": ("qwen3_moe", {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2}, {}),
    "tp2-ep2": ("deepseek_v3", TP2 | {"data": 2, "expert": 2}, {}),
}


@pytest.mark.parametrize(("world", "cases"), [(1, ONE_RANK), (4, FOUR_RANKS)], ids=["1 rank", "4 ranks"])
def test_logprobs_are_transformers(world: int, cases: dict[str, Case], tmp_path: Path) -> None:
    compare(tmp_path, cases, world)
