"""The samples of one prompt, by requests that may be aborted and go on later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drpo_megatron.config.schema import SamplingConfig
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.client import Completion, RolloutClient
from drpo_megatron.rollout.errors import GenerationError, Stopped
from drpo_megatron.rollout.snapshot import completion_from, completion_state

_MOST_ABORTS = 100  # of one group, without a cut of ours: then something aborts whatever we ask


@dataclass
class GroupSampler:
    """Samples `count` responses to `prompt`. `run` until it returns a group; what was sampled until an abort is kept.

    All samples go into one request: the server computes the prompt once, and a failure costs one group. seed: None, or
    what makes the samples repeatable.
    """

    prompt: Prompt
    count: int
    sampling: SamplingConfig
    seed: str | None = None
    _parts: list[list[Completion]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parts = self._parts or [[] for _ in range(self.count)]

    async def run(self, client: RolloutClient) -> RolloutGroup:
        """Raises what `client.complete` raises. Cancel it and call it again to go on with what it has."""
        for _ in range(_MOST_ABORTS):
            numbers = [number for number, parts in enumerate(self._parts) if not self._ended(parts)]
            open_samples = [self._parts[number] for number in numbers]
            if not open_samples:
                return RolloutGroup(self.prompt, [_join(self.prompt, parts) for parts in self._parts])
            taken = [_token_ids(parts) for parts in open_samples]
            inputs = [self.prompt.token_ids + tokens for tokens in taken]
            # the same for all: one set of parameters
            budgets = [self.sampling.max_new_tokens - len(tokens) for tokens in taken] if any(taken) else None
            seeds = None if self.seed is None else [sample_seed(self.seed, number) for number in numbers]
            completions = await client.complete(inputs, self.sampling, budgets, seeds)
            for parts, completion in zip(open_samples, completions, strict=True):
                parts.append(completion)
            if client.stopped and not all(self._ended(parts) for parts in self._parts):
                raise Stopped
        raise GenerationError(f"{self.prompt.id}: was aborted {_MOST_ABORTS} times")

    def _ended(self, parts: Sequence[Completion]) -> bool:
        return bool(parts) and (
            parts[-1].finish_reason != "abort" or len(_token_ids(parts)) >= self.sampling.max_new_tokens
        )

    @property
    def tokens(self) -> int:
        """Sampled until now."""
        return sum(len(_token_ids(parts)) for parts in self._parts)

    def drop_older_than(self, version: int) -> None:
        """Forget responses with tokens of weights before `version`; they are sampled again."""
        for parts in self._parts:
            if any(v < version for part in parts for v in part.weight_versions):
                parts.clear()

    def state(self) -> list[list[dict[str, Any]]]:
        return [[completion_state(part) for part in parts] for parts in self._parts]

    def restore(self, state: list[list[dict[str, Any]]]) -> None:
        self._parts = [[completion_from(part) for part in parts] for parts in state]


def sample_seed(seed: str, number: int) -> int:
    """Of sample `number` of a group; SGLang draws each of its tokens by this and the token's position. 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big") >> 1


def _token_ids(parts: Sequence[Completion]) -> list[int]:
    return [token for part in parts for token in part.token_ids]


def _join(prompt: Prompt, parts: Sequence[Completion]) -> Rollout:
    return Rollout(
        prompt=prompt,
        response_ids=_token_ids(parts),
        logmu=[value for part in parts for value in part.logmu],
        weight_versions=[version for part in parts for version in part.weight_versions],
        # one that was aborted at its last token
        finish_reason="length" if parts[-1].finish_reason == "abort" else parts[-1].finish_reason,
        routed_experts=join_experts([part.routed_experts for part in parts]),
    )


def join_experts(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Of one sequence in several requests, each with the one before as its input: every position as it was when its
    next token was sampled. int16 [positions, L, K].
    """
    joined: np.ndarray | None = None
    for part in parts:
        if part is None:
            return None
        joined = part if joined is None else np.concatenate([joined, part[len(joined) :]])
    return joined
