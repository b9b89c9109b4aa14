"""Rows of well-known data sets, by the columns that their files have: what is the prompt, and what the answer.

gsm8k   question, answer: a worked solution whose last line is `#### 72`
math    problem, solution (the answer is its last \\boxed{…}), or problem, answer beside the solution; level, type or
        subject
aime    problem or question, answer: an integer from 0 to 999; in any case (`Problem`, `Answer`)
dapo    prompt: chat messages, reward_model.ground_truth, data_source
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from drpo_megatron.data.boxed import last_boxed

_MARK = "####"
_INTEGER = re.compile(r"\$?0*(\d{1,3})(?:\.0+)?(?:\^?\{?\\circ\}?|°)?\$?")
_MATH_KINDS = {"level", "type", "subject"}


class LayoutError(ValueError):
    """A row that is none of its layout: the reason, for whoever knows the file and the line."""


@dataclass(frozen=True)
class Layout:
    """fits: whether a row, by its lower-case columns, may be one of it. read: (prompt, answer); raises LayoutError with
    the reason. used: columns, in lower case, that are not metadata.
    """

    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], tuple[Any, Any]]
    used: frozenset[str]


def detect(raw: Mapping[str, Any]) -> list[str]:
    """Names of the layouts that a row fits."""
    columns = _lower(raw)
    return [name for name, layout in LAYOUTS.items() if layout.fits(columns)]


def read_row(name: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """`prompt`, `answer` and `metadata` of a row. Raises LayoutError when it is none of `name`."""
    layout, columns = LAYOUTS[name], _lower(raw)
    try:
        prompt, answer = layout.read(columns)
    except KeyError as error:
        raise LayoutError(
            f"has no column {error} of the layout {name}; its columns are {', '.join(map(str, raw)) or 'none'}"
        ) from error
    rest = {key: value for key, value in raw.items() if key.lower() not in layout.used}
    return {"prompt": prompt, "answer": answer, "metadata": rest}


def _lower(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).lower(): value for key, value in raw.items()}


def _gsm8k_fits(row: Mapping[str, Any]) -> bool:
    return "question" in row and _MARK in str(row.get("answer"))


def _gsm8k(row: Mapping[str, Any]) -> tuple[Any, Any]:
    _, mark, answer = str(row["answer"]).rpartition(_MARK)
    if not mark or not answer.strip():
        raise LayoutError(f"the answer of a gsm8k row ends with {_MARK!r} and a number, and this one does not")
    return row["question"], answer.strip().replace(",", "").removeprefix("$")


def _math(row: Mapping[str, Any]) -> tuple[Any, Any]:
    if row.get("answer") is not None and _MATH_KINDS & row.keys():
        return row["problem"], row["answer"]
    answer = last_boxed(str(row["solution"]))
    if not answer:
        raise LayoutError("the solution of a math row has the answer in \\boxed{…}, and this one has none")
    return row["problem"], answer


def _aime_fits(row: Mapping[str, Any]) -> bool:
    asks = "problem" in row or "question" in row
    return asks and not _MATH_KINDS & row.keys() and _integer(row.get("answer")) is not None


def _aime(row: Mapping[str, Any]) -> tuple[Any, Any]:
    answer = _integer(row["answer"])
    if answer is None:
        raise LayoutError(f"the answer of an aime row is an integer from 0 to 999, not {str(row['answer'])[:60]!r}")
    return row["problem"] if "problem" in row else row["question"], answer


def _integer(value: object) -> str | None:
    """As a decimal number without leading zeros; None for anything else."""
    found = None if isinstance(value, bool) else _INTEGER.fullmatch(str(value).strip())
    return found.group(1) if found else None


def _dapo_fits(row: Mapping[str, Any]) -> bool:
    scored = row.get("reward_model")
    return isinstance(row.get("prompt"), list) and isinstance(scored, dict) and "ground_truth" in scored


def _dapo(row: Mapping[str, Any]) -> tuple[Any, Any]:
    prompt, scored = row["prompt"], row["reward_model"]
    if not isinstance(prompt, list) or not isinstance(scored, dict) or scored.get("ground_truth") is None:
        raise LayoutError("a dapo row has chat messages in `prompt` and the answer in `reward_model.ground_truth`")
    return prompt, scored["ground_truth"]


LAYOUTS: dict[str, Layout] = {
    "gsm8k": Layout(_gsm8k_fits, _gsm8k, frozenset({"question", "answer"})),
    "math": Layout(lambda row: {"problem", "solution"} <= row.keys(), _math, frozenset({"problem", "answer"})),
    "aime": Layout(_aime_fits, _aime, frozenset({"problem", "question", "answer"})),
    "dapo": Layout(_dapo_fits, _dapo, frozenset({"prompt"})),
}
