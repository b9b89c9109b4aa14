"""Deterministic mode with experts, several stages and bfloat16: two jobs end with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.test_determinism import CASES, compare

pytestmark = pytest.mark.distributed


def test_two_runs_are_equal_to_the_bit(tmp_path: Path) -> None:
    compare(tmp_path, CASES, count=3)
