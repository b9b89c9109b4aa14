"""The trainer's memory off the device and back with every kind of optimizer, dense and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.test_placement import CASES, compare

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("family", "parallel"),
    [("qwen2", {"data": 2}), ("qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2})],
    ids=["qwen2", "qwen3_moe"],
)
def test_moving_out_and_back_changes_nothing(tmp_path: Path, family: str, parallel: dict[str, Any]) -> None:
    compare(tmp_path, family, parallel, CASES)
