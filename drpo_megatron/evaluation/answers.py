"""Answers to the prompts of a set: sampled on servers, scored by verifiers while others are sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from drpo_megatron.config.functions import import_function
from drpo_megatron.config.schema import RewardConfig, RunConfig
from drpo_megatron.evaluation.sets import OpenSet
from drpo_megatron.evaluation.votes import vote
from drpo_megatron.records import Prompt, RolloutGroup
from drpo_megatron.rewards import RewardPool
from drpo_megatron.rollout.client import RolloutClient, Servers
from drpo_megatron.rollout.driver import decode
from drpo_megatron.rollout.errors import GenerationError
from drpo_megatron.rollout.producer import Sampler
from drpo_megatron.rollout.sampler import GroupSampler
from drpo_megatron.rollout.turns import FunctionSampler

_STOP_S = 0.2  # until a stop is noticed


@dataclass(frozen=True)
class Answer:
    """One response and its judgement. vote: what it answers, see `votes`. tokens: its length. error: why the verifier
    gave no reward, which is 0 then.
    """

    text: str
    vote: str | None
    reward: float
    tokens: int
    finish_reason: str
    error: str | None

    @property
    def correct(self) -> bool:
        """As in training's reward/pass@1: the full reward, 1 or more."""
        return self.reward >= 1.0


@dataclass(frozen=True)
class Answered:
    """A prompt and the answers to it."""

    prompt: Prompt
    answers: list[Answer]


def answer_set(
    config: RunConfig,
    chosen: OpenSet,
    servers: Servers,
    tokenizer: Any,
    version: int,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Answered] | None:
    """The answers to every prompt of `chosen`, in the order of its prompts; None once `stopped()`.

    version: of the weights that the servers hold. With training.deterministic each sample has a seed of its own.
    progress: hears how many prompts are done. Verifiers are started here and ended before this returns.

    Raises ServerDied when no server is left, GenerationError when requests fail for good or the servers get other
    weights meanwhile, RewardError when verifiers cannot be started.
    """
    with RewardPool(chosen.reward, chosen.data) as rewards:
        return asyncio.run(_answer(config, chosen, servers, tokenizer, version, stopped, progress, rewards))


async def _answer(
    config: RunConfig,
    chosen: OpenSet,
    servers: Servers,
    tokenizer: Any,
    version: int,
    stopped: Callable[[], bool],
    progress: Callable[[int], None],
    rewards: RewardPool,
) -> list[Answered] | None:
    async with RolloutClient(servers, config.rollout) as client:
        client.version = version

        async def one(prompt: Prompt) -> Answered:
            group = await _sampler(config, chosen, prompt, tokenizer).run(client)
            _refuse_other_weights(group, version)
            decode([group], tokenizer)
            await rewards.score_async(group.rollouts)
            return _judged(group, chosen.reward)

        tasks = [asyncio.create_task(one(prompt)) for prompt in chosen.prompts]
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, timeout=_STOP_S, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()  # raises what it raised
                progress(len(tasks) - len(pending))
                if stopped():
                    return None
            return [task.result() for task in tasks]
        finally:
            await _cancel(tasks)


def _refuse_other_weights(group: RolloutGroup, version: int) -> None:
    found = {v for r in group.rollouts for v, own in zip(r.weight_versions, r.response_mask, strict=True) if own}
    if found - {version}:
        raise GenerationError(
            f"a server's weights changed from version {version} to {max(found)} during the evaluation: evaluate "
            "servers that nothing trains meanwhile, or an exported model"
        )


async def _cancel(tasks: Sequence[asyncio.Task[Answered]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _sampler(config: RunConfig, chosen: OpenSet, prompt: Prompt, tokenizer: Any) -> Sampler:
    """As in training: one request a prompt, or the user's function."""
    sampling = config.evaluation_sampling
    seed = f"{config.seed}:evaluation:{chosen.name}:{prompt.id}" if config.training.deterministic else None
    if config.rollout.function is not None:
        function = import_function(config.rollout.function)
        return FunctionSampler(prompt, chosen.samples, sampling, function, tokenizer, seed)
    return GroupSampler(prompt, chosen.samples, sampling, seed)


def _judged(group: RolloutGroup, reward: RewardConfig) -> Answered:
    """What is kept of a group: not its log-probs and token ids, which are most of it."""
    answers = [
        Answer(r.text, vote(r.text, reward), r.reward, len(r.response_ids), r.finish_reason, r.reward_error)
        for r in group.rollouts
    ]
    return Answered(group.prompt, answers)
