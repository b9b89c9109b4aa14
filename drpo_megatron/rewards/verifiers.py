"""The verifiers. They run in the pool's processes, and `RewardPool` bounds their time: none has its own time-out."""

from __future__ import annotations

import logging
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

from drpo_megatron.config.functions import import_function
from drpo_megatron.config.schema import DataConfig, ReasoningGymData, RewardConfig

Verifier = Callable[[str, str | None, dict[str, Any]], Any]
"""f(text, answer, metadata) -> reward. text: the response; answer, metadata: of the prompt."""


def make_verifier(reward: RewardConfig, data: DataConfig) -> Verifier:
    """The configured verifier. Raises ValueError when it cannot be made. Imports what it needs (seconds)."""
    match reward.type:
        case "reasoning_gym":
            return _reasoning_gym(reward, data)
        case "math_verify":
            return _math_verify()
        case "function":
            return import_function(reward.function or "")


def checked_reward(
    verifier: Verifier, text: str, answer: str | None, metadata: dict[str, Any]
) -> tuple[float, str | None]:
    """(reward, None), or (0.0, reason) when the verifier raises or returns anything but a finite number.

    Raises MemoryError when the verifier does: the process may still hold what it allocated.
    """
    try:
        value = verifier(text, answer, metadata)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a verifier raises is counted and logged, and the run goes on
        return 0.0, f"the verifier raised {type(error).__name__}: {error}"
    if not isinstance(value, numbers.Real):
        return 0.0, f"the verifier returned {type(value).__name__} {str(value)[:60]!r}, not a number"
    if not math.isfinite(value):
        return 0.0, f"the verifier returned {value}"
    return float(value), None


def _reasoning_gym(reward: RewardConfig, data: DataConfig) -> Verifier:
    from drpo_megatron.data.gym import make_dataset

    if not isinstance(data.source, ReasoningGymData):
        raise ValueError("reward.type reasoning_gym needs data.source.type reasoning_gym; change one of them")
    dataset = make_dataset(data.source)
    pattern = re.compile(reward.extract) if reward.extract else None

    def verify(text: str, answer: str | None, metadata: dict[str, Any]) -> Any:
        given: str | None = text.strip()
        if pattern:
            matches = list(pattern.finditer(text))
            given = matches[-1].group(1) if matches else None
        return 0.0 if given is None else dataset.score_answer(given, metadata["entry"])

    return verify


def _math_verify() -> Verifier:
    from math_verify import parse, verify

    # It warns that its own time-outs are off. The pool's are stronger: they end a process that no signal handler can.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def verify_math(text: str, answer: str | None, metadata: dict[str, Any]) -> Any:
        if answer is None:
            raise ValueError("the prompt has no reference answer")
        # Data sets write the reference as bare LaTeX; math-verify looks for LaTeX inside a maths environment.
        has_environment = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
        gold = parse(answer if has_environment else f"${answer}$", parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify cannot parse the reference answer {answer!r}")
        return verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None)

    return verify_math
