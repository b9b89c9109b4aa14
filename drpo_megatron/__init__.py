"""drpo-megatron: DRPO reinforcement learning of language models on Megatron-Core, with SGLang rollouts."""

from drpo_megatron.platform.imports import cut_imports

__version__ = "0.1.0"

cut_imports()
