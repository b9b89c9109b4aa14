"""`tools/long_run.py` notices what grows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_PATH = Path(__file__).parents[2] / "tools" / "long_run.py"
_SPEC = importlib.util.spec_from_file_location("long_run", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
long_run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(long_run)


def look(step: int, **grown: float) -> dict[str, Any]:
    """Every second look falls into a step that has connections open."""
    process = {
        "pid": 7,
        "command": "python -m drpo_megatron.training.main runs/x/config.yaml",
        "rss": 800 * 2**20 + grown.get("rss", 0) * 2**20,
        "handles": 20 + 9 * (step % 20 == 0) + int(grown.get("handles", 0)),
        "threads": 5 + int(grown.get("threads", 0)),
    }
    return {"step": step, "processes": [process], "files": {"log/rank_0.log": 100 * step + int(grown.get("log", 0))}}


@pytest.mark.parametrize(
    ("grown", "says"),
    [
        ({}, []),
        ({"rss": 1 / 100}, []),
        ({"rss": 3 / 100}, ["rank #0: 3.00 MiB in 100 steps"]),
        ({"handles": 1 / 200}, ["rank #0: handles from 20 to 21"]),
        ({"threads": 1 / 200}, ["rank #0: threads from 5 to 6"]),
    ],
)
def test_growing_processes(grown: dict[str, float], says: list[str]) -> None:
    looks = [look(step, **{key: rate * (step - 100) for key, rate in grown.items()}) for step in range(0, 500, 10)]
    assert long_run.process_table(looks)[1] == says


def test_files_that_grow_faster_than_the_steps() -> None:
    steady = [look(step) for step in range(0, 500, 10)]
    rows, grew = long_run.file_table(steady)
    assert rows[-1] == "| `log/rank_0.log` | 100 | 49,000 |" and not grew
    squared = [look(step, log=step**2) for step in range(0, 500, 10)]
    assert "log/rank_0.log" in long_run.file_table(squared)[1][0]
