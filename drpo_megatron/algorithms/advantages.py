"""Advantages from rewards: one advantage a response, computed inside the group of responses to one prompt.

All estimators are critic-free and give every token of a response the same advantage: they drop credit assignment inside
the response (no value function, no GAE, no discount). A group of one response has no baseline to compare with: its
advantage is 0 under each of them. Arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Groups = list[NDArray[np.float64]]

EPSILON = 1e-6
"""Added to a standard deviation before dividing: a group of equal rewards gets 0, not rounding noise of size 1."""


def mean(rewards: Groups) -> Groups:
    """Reward − group mean (DRPO's recipe; Dr. GRPO, arXiv 2503.20783). Drops GRPO's division by the group's deviation,
    which over-weighs prompts that are nearly always or nearly never solved."""
    return [group - group.mean() for group in rewards]


def mean_std(rewards: Groups) -> Groups:
    """(reward − group mean) / group standard deviation (GRPO, arXiv 2402.03300); the deviation divides by n − 1."""
    return [(g - g.mean()) / (g.std(ddof=1) + EPSILON) if len(g) > 1 else np.zeros(1) for g in rewards]


def leave_one_out(rewards: Groups) -> Groups:
    """Reward − mean of the group's other rewards (RLOO, arXiv 2402.14740): an unbiased baseline, n/(n − 1) times
    `mean`. Drops the KL penalty that RLOO adds to the reward."""
    return [(g - g.mean()) * len(g) / (len(g) - 1) if len(g) > 1 else np.zeros(1) for g in rewards]


def reinforce_pp_baseline(rewards: Groups) -> Groups:
    """(reward − group mean) / standard deviation of all centred rewards of the global batch (REINFORCE++-baseline,
    arXiv 2501.03262). One scale for all prompts, over responses and not tokens. Drops the token-level KL reward."""
    centred = mean(rewards)
    deviation = np.concatenate(centred).std() + EPSILON
    return [group / deviation for group in centred]


ADVANTAGES: dict[str, Callable[[Groups], Groups]] = {
    f.__name__: f for f in (mean, mean_std, leave_one_out, reinforce_pp_baseline)
}


def compute_advantages(name: str, rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Advantages of the responses of a global batch, in the shape of `rewards`: groups of responses, sizes may differ.

    Raises ValueError for an unknown name, an empty group, or a reward that is not finite.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"unknown advantage {name!r}: choose from {', '.join(ADVANTAGES)}")
    return [group.tolist() for group in ADVANTAGES[name](_as_groups(rewards))]


def fraction_without_signal(rewards: Sequence[Sequence[float]]) -> float:
    """Share of groups whose rewards are all equal: every advantage is 0 and the group teaches nothing."""
    groups = _as_groups(rewards)
    return sum(float(group.max() == group.min()) for group in groups) / len(groups)


def _as_groups(rewards: Sequence[Sequence[float]]) -> Groups:
    groups = [np.asarray(group, dtype=np.float64) for group in rewards]
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("advantages need at least one group and at least one reward in each")
    if not all(np.isfinite(group).all() for group in groups):
        raise ValueError("a reward is not finite: check the reward function")
    return groups
