"""Rewards that wait for events. With them a test decides how far a run is when something happens to it: a test that
looked at the clock, or was only quick enough, would fail beside other load.

They run in the verifiers' processes of a run, so that what they wait for is in the environment. `reward.timeout_s` must
be longer than the test's own limit.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from drpo_megatron.rewards.examples import matching_characters

STEPS = "DRPO_TEST_HELD_STEPS"
"""PATH:NUMBER:GO of a metrics.jsonl: after that many steps no sample gets its reward until there is a file GO.

Sampling for the next step begins before a step is logged: the run is held in that step or in the one after it."""
FIRST = "DRPO_TEST_HELD_FIRST"
"""A directory: the first sample of all gets its reward once there is a file `go` in it. Needs reward.workers=2."""
PATIENT = "reward.timeout_s=3600"


def odd_characters(text: str, answer: str | None, metadata: dict[str, Any]) -> float:
    """From the first step on some samples are better than others, unlike with the quickstart's reward."""
    if held := os.environ.get(STEPS):
        path, steps, go = held.split(":")
        while _lines(Path(path)) >= int(steps) and not Path(go).exists():
            time.sleep(0.05)
    return sum(ord(character) % 2 for character in text) / 4


def after_steps(directory: Path, steps: int) -> dict[str, str]:
    """The variable for the run in `directory`; the file is `directory`/go."""
    return {STEPS: f"{directory / 'metrics.jsonl'}:{steps}:{directory / 'go'}"}


def first_held(text: str, answer: str | None, metadata: dict[str, Any]) -> float:
    directory = Path(os.environ[FIRST])
    try:
        (directory / "held").touch(exist_ok=False)
    except FileExistsError:
        pass  # another sample was the first
    else:
        while not (directory / "go").exists():
            time.sleep(0.05)
    return matching_characters(text, answer, metadata)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
