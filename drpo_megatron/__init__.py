"""drpo-megatron: DRPO reinforcement learning of language models on Megatron-Core, with SGLang rollouts."""

__version__ = "0.1.0"
