"""What FP8 does to an update, seen without changing it: in every layout, with both kinds of scales."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks.test_fp8_health import LAYOUTS, RECIPES, compare

pytestmark = pytest.mark.distributed


def test_an_examined_update_is_the_same_update(tmp_path: Path) -> None:
    compare(tmp_path, LAYOUTS, RECIPES)
