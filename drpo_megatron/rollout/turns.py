"""Rollouts of several turns by a user's function: `async def rollout(prompt, session) -> Trajectory`.

The function may ask the server as often as it likes and put other tokens, such as a tool's answer, between what was
sampled. Those are not trained. `examples.calculator` is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drpo_megatron.config.schema import SamplingConfig
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.client import Completion, RolloutClient
from drpo_megatron.rollout.errors import GenerationError, Stopped
from drpo_megatron.rollout.sampler import join_experts, sample_seed


@dataclass
class Trajectory:
    """What follows a prompt: tokens that the policy sampled, and tokens that were put in."""

    prompt: Prompt
    token_ids: list[int] = field(default_factory=list)
    logmu: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    _experts: list[np.ndarray | None] = field(default_factory=list)

    @property
    def context(self) -> list[int]:
        """The prompt and everything after it: the input of the next turn."""
        return self.prompt.token_ids + self.token_ids

    def sampled(self, completion: Completion) -> None:
        """Append what the policy sampled after `context`. It is trained."""
        self.token_ids += completion.token_ids
        self.logmu += completion.logmu
        self.weight_versions += completion.weight_versions
        self.mask += [1] * len(completion.token_ids)
        self.finish_reason = completion.finish_reason
        self._experts.append(completion.routed_experts)

    def inserted(self, token_ids: list[int]) -> None:
        """Append tokens that the policy did not sample. They are read and not trained."""
        version = self.weight_versions[-1] if self.weight_versions else 0
        self.token_ids += token_ids
        self.logmu += [0.0] * len(token_ids)
        self.weight_versions += [version] * len(token_ids)
        self.mask += [0] * len(token_ids)

    def rollout(self) -> Rollout:
        """The record that is trained, up to the last sampled token. Raises GenerationError when nothing was sampled."""
        if 1 not in self.mask:
            raise GenerationError(f"{self.prompt.id}: rollout.function sampled nothing")
        end = len(self.mask) - self.mask[::-1].index(1)
        experts = join_experts(self._experts)
        return Rollout(
            prompt=self.prompt,
            response_ids=self.token_ids[:end],
            logmu=self.logmu[:end],
            weight_versions=self.weight_versions[:end],
            finish_reason=self.finish_reason,
            response_mask=self.mask[:end],
            routed_experts=experts,
        )


class Session:
    """What a user's function gets: the server, the tokenizer, and how many tokens the response may still have."""

    def __init__(
        self, client: RolloutClient, sampling: SamplingConfig, tokenizer: Any, seed: int | None = None
    ) -> None:
        self._client = client
        self._sampling = sampling
        self._seeds = None if seed is None else [seed]
        self.tokenizer = tokenizer

    def left(self, trajectory: Trajectory) -> int:
        """Tokens that still fit: sampled and inserted ones together are at most rollout.sampling.max_new_tokens."""
        return max(0, self._sampling.max_new_tokens - len(trajectory.token_ids))

    async def sample(
        self, trajectory: Trajectory, *, max_new_tokens: int | None = None, stop: list[str] | None = None
    ) -> Completion:
        """Let the policy go on after the trajectory, append it, and return it.

        stop: strings that end the turn, besides the configuration's; they are part of what was sampled. Raises
        ValueError when no token fits.
        """
        left = self.left(trajectory)
        budget = left if max_new_tokens is None else min(left, max_new_tokens)
        if budget < 1:
            raise ValueError("no token is left in rollout.sampling.max_new_tokens: look at session.left(trajectory)")
        sampling = self._sampling.model_copy(update={"stop": [*self._sampling.stop, *(stop or [])]})
        for _ in range(budget):
            (completion,) = await self._client.complete([trajectory.context], sampling, [budget], self._seeds)
            trajectory.sampled(completion)
            budget -= len(completion.token_ids)
            if self._client.stopped:
                raise Stopped
            if completion.finish_reason != "abort" or budget < 1:
                break
        return completion

    def insert(self, trajectory: Trajectory, text: str) -> int:
        """Append `text` as tokens that are not trained, as many as fit; return how many."""
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: self.left(trajectory)]
        trajectory.inserted(token_ids)
        return len(token_ids)


RolloutFunction = Callable[[Prompt, Session], Awaitable[Trajectory]]


class FunctionSampler:
    """Implements `producer.Sampler`: `count` runs of the user's function. After a cut they start again."""

    def __init__(
        self,
        prompt: Prompt,
        count: int,
        sampling: SamplingConfig,
        function: RolloutFunction,
        tokenizer: Any,
        seed: str | None = None,
    ) -> None:
        self.prompt, self.count, self.sampling, self.seed = prompt, count, sampling, seed
        self._function, self._tokenizer = function, tokenizer

    tokens = 0
    """None are kept over a cut."""

    def drop_older_than(self, version: int) -> None:
        pass

    def state(self) -> None:
        pass

    def restore(self, state: None) -> None:
        pass

    async def run(self, client: RolloutClient) -> RolloutGroup:
        """Raises what the function raises, and GenerationError for what is no trajectory of this prompt."""
        seeds = [None if self.seed is None else sample_seed(self.seed, number) for number in range(self.count)]
        sessions = [Session(client, self.sampling, self._tokenizer, seed) for seed in seeds]
        tasks = [asyncio.ensure_future(self._function(self.prompt, session)) for session in sessions]
        try:
            made = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for trajectory in made:
            if not isinstance(trajectory, Trajectory) or trajectory.prompt is not self.prompt:
                raise GenerationError(f"rollout.function returned {trajectory!r}: return the prompt's Trajectory")
            if self.sampling.max_new_tokens < len(trajectory.token_ids):
                raise GenerationError(
                    f"rollout.function returned {len(trajectory.token_ids)} tokens, and "
                    f"rollout.sampling.max_new_tokens is {self.sampling.max_new_tokens}: raise it, or stop earlier"
                )
        return RolloutGroup(self.prompt, [trajectory.rollout() for trajectory in made])
