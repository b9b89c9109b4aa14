"""Reward of the quickstart's task (data/examples.py)."""

from __future__ import annotations

from typing import Any


def matching_characters(text: str, answer: str | None, metadata: dict[str, Any]) -> float:
    """Share of the answer's characters that the response has in the same place; what follows them is ignored.

    Partial credit makes the reward dense: a group whose samples are all wrong still has better and worse ones.
    """
    assert answer, "the quickstart's prompts all have an answer"
    return sum(a == b for a, b in zip(text, answer, strict=False)) / len(answer)
