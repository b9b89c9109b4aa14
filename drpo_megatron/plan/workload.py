"""How much a step has to do: sequences, tokens and micro-batches, from the settings and the assumed lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.platform.layout import ParallelLayout


@dataclass(frozen=True)
class Workload:
    """Sequences of a step, `updates` equal parts of which are trained one after the other. Lengths are in tokens.

    trained_share: of the positions of a full micro-batch, those whose loss counts, with the longest of all sequences.
    """

    prompts: int
    samples: int
    updates: int
    prompt: float
    response: float
    longest: int
    token_budget: int
    trained_share: float

    @classmethod
    def of(cls, config: RunConfig, assumptions: Assumptions) -> Workload:
        prompt, response = config.data.max_prompt_tokens, config.rollout.sampling.max_new_tokens
        return cls(
            prompts=config.rollout.prompts_per_step,
            samples=config.rollout.samples_per_prompt,
            updates=config.training.updates_per_batch,
            prompt=assumptions.prompt_tokens,
            response=assumptions.response_tokens,
            longest=prompt + response,
            token_budget=config.training.tokens_per_micro_batch,
            trained_share=response / (prompt + response),
        )

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def length(self) -> float:
        """Of the mean sequence."""
        return self.prompt + self.response

    def rank_sequences(self, layout: ParallelLayout) -> int:
        """Of one update on the data-parallel rank that has most."""
        return math.ceil(self.sequences / self.updates / layout.data)

    def micro_batch_tokens(self, layout: ParallelLayout) -> int:
        """T of the fullest micro-batch: the budget or one longer sequence, divided over context-parallel ranks."""
        available = self.rank_sequences(layout) * self.longest
        return math.ceil(min(max(self.token_budget, self.longest), available) / layout.context)

    def micro_batches(self, layout: ParallelLayout) -> int:
        """Of an update on each data-parallel rank, in whole rounds for the interleaved schedule."""
        positions = self.rank_sequences(layout) * self.length
        count = max(1, math.ceil(positions / max(self.token_budget, self.length)))
        step = layout.pipeline if layout.virtual_pipeline else 1
        return -(-count // step) * step
