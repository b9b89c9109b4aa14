"""What n answers to a prompt say of k of them, exactly, and intervals over prompts. No sampling anywhere.

Counts stay integers until the last division, so that nothing overflows or cancels whatever n and k are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drpo_megatron.study.statistics import Interval, mean_interval, wilson_interval


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of a prompt's n answers, drawn without replacement, hold a correct one: the unbiased estimator
    1 − C(n − c, k) / C(n, k) of Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    ValueError unless 0 ≤ correct ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {correct} correct answers among {n} does not exist")
    draws = math.comb(n, k)
    return (draws - math.comb(n - correct, k)) / draws


@dataclass(frozen=True)
class Candidate:
    """One of the different answers to a prompt: `votes` responses give it, `correct` of them were judged correct."""

    votes: int
    correct: int


def candidates(votes: Sequence[str | None], correct: Sequence[bool]) -> list[Candidate]:
    """The different answers of a prompt's responses. A response without an answer (None) votes for nobody."""
    found: dict[str, Candidate] = {}
    for vote, right in zip(votes, correct, strict=True):
        if vote is not None:
            before = found.get(vote, Candidate(0, 0))
            found[vote] = replace(before, votes=before.votes + 1, correct=before.correct + right)
    return list(found.values())


def majority_at_k(n: int, voted: Sequence[Candidate], k: int) -> float:
    """Expected correctness of the most frequent answer among k of a prompt's n responses, drawn without replacement.

    The expectation over all C(n, k) draws and over ties, which a fair coin decides, is exact. An answer that was judged
    correct in some responses and wrong in others counts with its share. Where nobody of the k votes, nothing wins and
    the draw counts as wrong. The work is O(n·k²·log k) for each prompt.

    ValueError when there are more votes than responses, and unless 1 ≤ k ≤ n.
    """
    voters = sum(candidate.votes for candidate in voted)
    if voters > n or not 1 <= k <= n:
        raise ValueError(f"maj@{k} of {voters} votes in {n} responses does not exist")
    # Correctness in units of 1/whole, so that it stays an integer.
    whole = math.lcm(*(candidate.votes for candidate in voted))
    total = 0.0
    for most in range(1, min(k, max((c.votes for c in voted), default=0)) + 1):
        for tied, correct in _draws_with(n - voters, voted, k, most).items():
            total += correct / (tied * whole * math.comb(n, k))
    return min(1.0, total)  # a sum of rounded shares


def _draws_with(abstaining: int, voted: Sequence[Candidate], k: int, most: int) -> dict[int, int]:
    """Over draws of k responses whose most frequent answers have `most` votes: by the number of answers that tie
    there, the number of draws times the sum of those answers' correctness, in units of 1/lcm(votes).
    """
    whole = math.lcm(*(candidate.votes for candidate in voted))
    # (responses drawn, answers at `most`) → (draws, draws × correctness of those answers)
    states = {(drawn, 0): (math.comb(abstaining, drawn), 0) for drawn in range(min(abstaining, k) + 1)}
    for candidate in voted:
        share = candidate.correct * whole // candidate.votes
        after: dict[tuple[int, int], tuple[int, int]] = {}
        for (drawn, tied), (draws, correct) in states.items():
            for votes in range(min(candidate.votes, most, k - drawn) + 1):
                ways, wins = math.comb(candidate.votes, votes), votes == most
                key = (drawn + votes, tied + wins)
                before = after.get(key, (0, 0))
                gained = correct + draws * share if wins else correct
                after[key] = (before[0] + draws * ways, before[1] + gained * ways)
        states = after
    return {tied: correct for (drawn, tied), (_, correct) in states.items() if drawn == k and tied}


def share_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of one value in [0, 1] for each prompt, the prompts being a sample of a task.

    Wilson's score interval where every value is 0 or 1 (one answer each, or all alike), whose width does not become 0
    when all are right; Student's t interval otherwise, cut to [0, 1]. ValueError without values.
    """
    if values and all(value in (0, 1) for value in values):
        return wilson_interval(sum(map(int, values)), len(values))
    found = mean_interval(values)
    # max and min leave the NaN of a single value alone
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def reward_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of any one value for each prompt: Student's t, or `share_interval` where all are in
    [0, 1]. ValueError without values.
    """
    return share_interval(values) if all(0 <= value <= 1 for value in values) else mean_interval(values)
