"""`module:function` settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def import_function(spec: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises ValueError saying what is wrong with it.

    The module is imported: what it raises while that happens is reported as part of the error.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"{spec!r} does not name a function: write module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises becomes part of the message
        raise ValueError(f"module {module_name!r} cannot be imported ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        have = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise ValueError(f"module {module_name!r} has no function {name!r}; it has: {have}")
    result: Callable[..., Any] = function
    return result
