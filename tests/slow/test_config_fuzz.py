"""Random damage to sound configurations, 2,000 times: see tests/unit/test_config_fuzz.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.unit import test_config_fuzz
from tests.unit.test_config_fuzz import damage

MUTATIONS = 2000

bases, started_nothing = test_config_fuzz.bases, test_config_fuzz.started_nothing  # the fixtures


def test_2000_mutations(bases: list[dict[str, Any]], started_nothing: Path) -> None:
    codes = damage(bases, started_nothing, os.environ.get("DRPO_FUZZ_SEED", "20"), MUTATIONS)
    assert min(codes.values()) > MUTATIONS / 10, codes
