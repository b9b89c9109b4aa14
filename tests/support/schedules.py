"""A fleet whose weights change while a producer asks it: what the tests of schedules share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from drpo_megatron.config.schema import RolloutConfig, SamplingConfig
from drpo_megatron.data.prompts import PromptSource
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.client import RolloutClient
from drpo_megatron.rollout.fleet import Fleet
from drpo_megatron.rollout.producer import RolloutProducer, Sampler
from drpo_megatron.rollout.sampler import GroupSampler
from drpo_megatron.sync.push import WeightSync
from tests.support import tiny_models
from tests.support.servers import LIMIT_S, make_prompts, perturb

PROMPTS = make_prompts(64, tiny_models.VOCAB_SIZE)
TOLERANCE = 1e-4
LONG = SamplingConfig(max_new_tokens=300, ignore_eos=True)


class Stream(PromptSource):
    """The prompts, in order."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, n: int) -> list[tuple[int, Prompt]]:
        first, self._next = self._next, self._next + n
        return [(i, PROMPTS[i]) for i in range(first, self._next)]

    def state(self) -> dict[str, int]:
        return {"next": self._next}


@dataclass
class Schedule:
    """A fleet, and every version of the weights that it got."""

    fleet: Fleet
    weights: WeightSync
    path: Path
    models: dict[int, PreTrainedModel]
    """Every version that was pushed."""

    @property
    def version(self) -> int:
        return max(self.models)

    def push(self) -> None:
        model = copy.deepcopy(self.models[self.version])
        perturb(model, self.version)
        self.models[self.version + 1] = model
        with self.fleet.paused():
            self.weights.connect(self.fleet.up())
            self.weights.push(model.state_dict().items(), self.version)
        self.fleet.admit(self.fleet.up(), self.version)

    @contextmanager
    def producer(
        self, config: RolloutConfig, sampler: Callable[[Prompt], Sampler] | None = None
    ) -> Iterator[RolloutProducer]:
        async def reward(group: RolloutGroup) -> None:
            for i, rollout in enumerate(group.rollouts):
                rollout.reward = float(i % 2)

        def abort() -> None:
            ServerAdmin(self.fleet.url).abort_all(LIMIT_S)

        with RolloutProducer(
            config,
            1,
            Stream(),
            client=lambda: RolloutClient(self.fleet, config),
            sampler=sampler or (lambda _, prompt: GroupSampler(prompt, config.samples_per_prompt, config.sampling)),
            finish=reward,
            abort=abort,
        ) as made:
            yield made

    def largest_error(self, rollouts: list[Rollout]) -> float:
        """Of log μ of every sampled token, against transformers with the weights of that token's version."""
        largest = 0.0
        for rollout in rollouts:
            tokens_T = torch.tensor(rollout.prompt.token_ids + rollout.response_ids)
            start = len(rollout.prompt.token_ids)
            for version in set(rollout.weight_versions):
                with torch.no_grad():
                    logits_TV = self.models[version](tokens_T[None]).logits[0, start - 1 : -1].float()
                logprobs_T = torch.log_softmax(logits_TV, dim=-1).gather(1, tokens_T[start:, None])[:, 0]
                mine_T = torch.tensor(rollout.weight_versions) == version
                sampled_T = mine_T & torch.tensor(rollout.response_mask).bool()
                difference_T = (logprobs_T - torch.tensor(rollout.logmu)).abs()[sampled_T]
                largest = max([largest, *difference_T.tolist()])
        return largest


def settings(**changes: Any) -> RolloutConfig:
    return RolloutConfig(**{"prompts_per_step": 4, "samples_per_prompt": 4, "sampling": LONG} | changes)


def rollouts_of(groups: list[RolloutGroup]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]
