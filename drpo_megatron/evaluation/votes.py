"""What a response answers, as a string: the same answer written in two ways should be one vote.

A vote is over strings and not over values: 1/2 and 0.5 are two answers. Comparing values takes a verifier for every
pair of responses, and a majority does not need it where a policy writes in one way.
"""

from __future__ import annotations

import re

from drpo_megatron.config.schema import RewardConfig
from drpo_megatron.data.boxed import last_boxed

_SAID = re.compile(r"(?:####|\banswer\s*(?:is\b)?\s*:?)\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|,|;|!|%|\$)|[$\s]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")


def vote(text: str, reward: RewardConfig) -> str | None:
    """The answer of a response, normalized; None where it gives none.

    reasoning_gym: what is scored, which is `reward.extract`'s last match or the whole text. Otherwise the last
    `\\boxed{…}`; without one, what follows the last `####` or `answer:` on its line; without that, the last number for
    math_verify and the whole text for a function.
    """
    if reward.type == "reasoning_gym":
        if reward.extract is None:
            return text.strip() or None
        matches = list(re.finditer(reward.extract, text))
        return matches[-1].group(1) if matches else None
    found = last_boxed(text)
    if found is None and (said := _SAID.findall(text)):
        found = said[-1]
    if found is None and reward.type == "math_verify":
        numbers = _NUMBER.findall(text)
        return _normalized(numbers[-1]) if numbers else None
    return _normalized(text if found is None else found)


def _normalized(answer: str) -> str | None:
    """Without the typography: spaces, dollars, \\text{}, thousands separators, a full stop at the end, 3.0 for 3."""
    plain = _THOUSANDS.sub("", _DECORATION.sub("", _TEXT.sub(r"\1", answer)))
    plain = plain.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").strip("*").rstrip(".")
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", plain):
        plain = plain.lstrip("+")
        plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return plain or None
