"""Rewards: verifiers in a pool of processes with time-outs. No torch: the verifier processes import this package."""

from drpo_megatron.rewards.pool import RewardError, RewardPool

__all__ = ["RewardError", "RewardPool"]
