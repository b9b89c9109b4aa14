"""From the answers to a set's prompts to its figures, each with an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drpo_megatron.evaluation.answers import Answered
from drpo_megatron.evaluation.sets import OpenSet
from drpo_megatron.evaluation.statistics import (
    candidates,
    majority_at_k,
    pass_at_k,
    reward_interval,
    share_interval,
)
from drpo_megatron.records import Metrics
from drpo_megatron.study.statistics import Interval


@dataclass(frozen=True)
class SetResult:
    """figures: avg@N, the mean reward of all N answers; pass@k; maj@k for k > 1, which is pass@1 for one. Their
    intervals are over prompts. mean_tokens: of a response. truncated: share of responses that ended at the limit of
    tokens. unanswered: share of those that vote for nothing. errors: responses whose verifier failed.
    """

    name: str
    prompts: int
    samples: int
    figures: dict[str, Interval]
    mean_tokens: float
    truncated: float
    unanswered: float
    errors: int

    def metrics(self) -> Metrics:
        """As they are in metrics.jsonl, see docs/metrics.md."""
        values = {name: figure.value for name, figure in self.figures.items()} | {
            "len_mean": self.mean_tokens,
            "truncated_frac": self.truncated,
            "errors": float(self.errors),
        }
        return {f"evaluation/{self.name}/{name}": value for name, value in values.items()}


def summarize(chosen: OpenSet, answered: Sequence[Answered]) -> SetResult:
    """Raises ValueError without prompts."""
    n = chosen.samples
    figures = {f"avg@{n}": reward_interval([sum(a.reward for a in one.answers) / n for one in answered])}
    correct = [[a.correct for a in one.answers] for one in answered]
    voted = [candidates([a.vote for a in one.answers], c) for one, c in zip(answered, correct, strict=True)]
    for k in chosen.ks:
        figures[f"pass@{k}"] = share_interval([pass_at_k(n, sum(c), k) for c in correct])
    for k in chosen.ks:
        if k > 1:
            figures[f"maj@{k}"] = share_interval([majority_at_k(n, v, k) for v in voted])
    answers = [a for one in answered for a in one.answers]
    return SetResult(
        chosen.name,
        len(answered),
        n,
        figures,
        mean_tokens=sum(a.tokens for a in answers) / len(answers),
        truncated=sum(a.finish_reason == "length" for a in answers) / len(answers),
        unanswered=sum(a.vote is None for a in answers) / len(answers),
        errors=sum(a.error is not None for a in answers),
    )
