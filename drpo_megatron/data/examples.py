"""Prompts of the quickstart: a task that a model with random weights can learn in minutes."""

from __future__ import annotations

import random
from typing import Any

LENGTH = 4


def repeat_digit(index: int, seed: int) -> dict[str, Any]:
    """One digit and an equals sign; the answer is the digit four times: `7=` → `7777`.

    It suits a first run: the answer depends on one token of the prompt, and each of its characters earns a share of the
    reward (rewards/examples.py), so that even random responses differ in reward from the first step on.
    """
    digit = random.Random(f"{seed}:{index}").randrange(10)
    return {"prompt": f"{digit}=", "answer": str(digit) * LENGTH}
