"""Prompts: where they come from and in which order. The entry is `load_prompts`; `rows` and `gym` do without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drpo_megatron.data.rows import DataError

if TYPE_CHECKING:
    from drpo_megatron.data.prompts import PromptSource, load_prompts

__all__ = ["DataError", "PromptSource", "load_prompts"]


def __getattr__(name: str) -> Any:
    # Verifier processes and the configuration checks import this package for `rows` and `gym` alone: the records that
    # `prompts` makes bring torch with them (seconds, and hundreds of MB a process).
    if name in ("PromptSource", "load_prompts"):
        from drpo_megatron.data import prompts

        return getattr(prompts, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
