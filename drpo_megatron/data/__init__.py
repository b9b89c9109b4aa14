"""Prompts: where they come from and in which order. No torch: the configuration checks import this package."""

from drpo_megatron.data.errors import DataError
from drpo_megatron.data.prompts import PromptSource, load_prompts

__all__ = ["DataError", "PromptSource", "load_prompts"]
