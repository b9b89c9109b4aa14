"""What is evaluated: the prompts of each set of the configuration, in order, and how they are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drpo_megatron.config.schema import DataConfig, EvaluationSet, RewardConfig, RunConfig
from drpo_megatron.data import load_prompts
from drpo_megatron.records import Prompt


@dataclass(frozen=True)
class OpenSet:
    """One set, ready to be asked. samples: answers to each prompt. ks: of pass@k and maj@k, ascending."""

    name: str
    data: DataConfig
    reward: RewardConfig
    prompts: list[Prompt]
    samples: int
    ks: list[int]


def open_sets(config: RunConfig, tokenizer: Any) -> list[OpenSet]:
    """The sets of `evaluation.sets`. tokenizer: a `transformers` tokenizer. Raises DataError as `load_prompts` does."""
    return [_open(config, name, chosen, tokenizer) for name, chosen in config.evaluation.sets.items()]


def _open(config: RunConfig, name: str, chosen: EvaluationSet, tokenizer: Any) -> OpenSet:
    own = {"source": chosen.source, "shuffle": False}
    for key in ("system_prompt", "prompt_template"):
        if getattr(chosen, key) is not None:
            own[key] = getattr(chosen, key)
    data = config.data.model_copy(update=own)
    source = load_prompts(data, tokenizer, config.seed)
    samples = chosen.samples or config.evaluation.samples
    return OpenSet(
        name,
        data,
        config.reward if chosen.reward is None else chosen.reward,
        source.next(min(chosen.limit or len(source), len(source))),
        samples,
        sorted(set(config.evaluation.ks or [1, samples])),
    )
