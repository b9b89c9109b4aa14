"""From prompts to rollout groups, on the rank that talks to the server; survives the death of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig
from drpo_megatron.records import Prompt, RolloutGroup
from drpo_megatron.rollout.client import GenerationJob, RolloutClient
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.server import SGLangServer


class Detokenizer(Protocol):
    """The part of a Hugging Face tokenizer that a rollout needs."""

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]: ...


@dataclass(frozen=True)
class GenerationStats:
    """Of one complete `generate`: sampled tokens, seconds over all attempts, retried requests."""

    tokens: int
    seconds: float
    retries: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


class RolloutDriver:
    """Generates the groups of a step.

    When `generate` raises ServerDied, the groups that were complete are kept. The caller then runs `restart_server()`,
    pushes the weights, and calls `generate` with the same arguments again, which asks for the missing groups only.
    `experts`: the format of the experts that the rollouts of a mixture of experts carry.
    """

    def __init__(
        self,
        config: RolloutConfig,
        server: SGLangServer,
        tokenizer: Detokenizer,
        experts: RoutedExpertsFormat | None = None,
    ) -> None:
        self._config = config
        self._server = server
        self._tokenizer = tokenizer
        self._experts = experts
        self._job: GenerationJob | None = None
        self._seconds = 0.0
        self.stats = GenerationStats(0, 0.0, 0)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int | None = None,
        sampling: SamplingConfig | None = None,
    ) -> list[RolloutGroup]:
        """Sample `samples_per_prompt` responses to each prompt; groups come in the order of `prompts`.

        The defaults are those of the rollout configuration; evaluation passes its own. Raises ServerDied (see above),
        and GenerationError when the living server keeps failing.
        """
        samples_per_prompt = samples_per_prompt or self._config.samples_per_prompt
        sampling = sampling or self._config.sampling
        job = self._job
        if job is None or (list(job.prompts), job.samples_per_prompt, job.sampling) != (
            list(prompts),
            samples_per_prompt,
            sampling,
        ):
            job = self._job = GenerationJob(prompts, samples_per_prompt, sampling)
            self._seconds = 0.0
        client = RolloutClient(self._server.url, self._config, self._server.alive, self._experts)
        start = time.perf_counter()
        try:
            asyncio.run(client.run(job))
        finally:
            self._seconds += time.perf_counter() - start
        groups = job.groups()
        self._job = None
        self._decode(groups)
        tokens = sum(len(r.response_ids) for g in groups for r in g.rollouts)
        self.stats = GenerationStats(tokens, self._seconds, job.retries)
        return groups

    @property
    def pending(self) -> int:
        """Groups that an interrupted `generate` still lacks."""
        return len(self._job.missing) if self._job else 0

    def restart_server(self) -> str:
        """Restart the server and return its URL; its weights are those on disk until the next push.

        Raises ServerGaveUp when `rollout.server.max_restarts` is used up, ServerStartError when it does not come up.
        """
        return self._server.restart()

    def _decode(self, groups: Sequence[RolloutGroup]) -> None:
        rollouts = [r for g in groups for r in g.rollouts]
        texts = self._tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
        for rollout, text in zip(rollouts, texts, strict=True):
            rollout.text = text
