"""Groups of samples on demand: for evaluation, benchmarks and tests. Training takes them from `producer`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig
from drpo_megatron.records import Prompt, RolloutGroup
from drpo_megatron.rollout.client import RolloutClient, Servers
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.sampler import GroupSampler


class Detokenizer(Protocol):
    """The part of a Hugging Face tokenizer that a rollout needs."""

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]: ...


class RolloutDriver:
    """`experts`: the format of the experts that the rollouts of a mixture of experts carry."""

    def __init__(
        self,
        config: RolloutConfig,
        servers: Servers,
        tokenizer: Detokenizer,
        experts: RoutedExpertsFormat | None = None,
    ) -> None:
        self._config = config
        self._servers = servers
        self._tokenizer = tokenizer
        self._experts = experts

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int | None = None,
        sampling: SamplingConfig | None = None,
    ) -> list[RolloutGroup]:
        """Sample `samples_per_prompt` responses to each prompt; groups come in the order of `prompts`.

        The defaults are those of the rollout configuration; evaluation passes its own. Raises ServerDied when no server
        is left, and GenerationError when requests keep failing.
        """
        count = samples_per_prompt or self._config.samples_per_prompt
        samplers = [GroupSampler(prompt, count, sampling or self._config.sampling) for prompt in prompts]
        groups = asyncio.run(self._run(samplers))
        decode(groups, self._tokenizer)
        return groups

    async def _run(self, samplers: Sequence[GroupSampler]) -> list[RolloutGroup]:
        async with RolloutClient(self._servers, self._config, self._experts) as client:
            tasks = [asyncio.create_task(sampler.run(client)) for sampler in samplers]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


def decode(groups: Sequence[RolloutGroup], tokenizer: Detokenizer) -> None:
    """Set the text of every rollout."""
    rollouts = [r for g in groups for r in g.rollouts]
    texts = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    for rollout, text in zip(rollouts, texts, strict=True):
        rollout.text = text
