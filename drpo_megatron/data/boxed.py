"""The final answer of a LaTeX text."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{…}` or `\\fbox{…}` whose braces are balanced, or of `\\boxed 7` without braces.
    None without one.
    """
    for found in reversed(list(_BOXED.finditer(text))):
        rest = text[found.end() :]
        if not rest.startswith("{"):
            bare = re.match(r"[^\s$.,;{}\\]+", rest)
            if bare:
                return bare.group()
            continue
        depth = 0
        for position, character in enumerate(rest):
            if rest[position - 1 : position] != "\\" or position == 0:
                depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:position].strip()
    return None
