"""Evaluation of a run's weights by its own servers, between a sync and the next step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.evaluation.answers import answer_set
from drpo_megatron.evaluation.results import SetResult, summarize
from drpo_megatron.evaluation.sets import open_sets
from drpo_megatron.evaluation.writing import write_results
from drpo_megatron.records import Metrics
from drpo_megatron.rollout.client import Servers


class TrainingEvaluation:
    """The sets that `evaluation.every` asks for; none without it. Raises DataError as `open_sets` does.

    It has clients and verifiers of its own, and nothing of the producer's: training's prompts, groups in flight and
    weight versions are as they would be without it.
    """

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._sets = open_sets(config, tokenizer) if config.evaluation.every else []
        self._done: dict[str, SetResult] = {}

    def run(
        self, servers: Servers, version: int, steps_done: int, stopped: Callable[[], bool] = lambda: False
    ) -> Metrics | None:
        """The metrics of every set; `results_path` then holds the answers. None once `stopped()`.

        Raises ServerDied when no server is left: called again, it goes on with the set that it was at. Raises
        GenerationError and RewardError for good.
        """
        for chosen in self._sets:
            if chosen.name in self._done:
                continue
            answered = answer_set(self._config, chosen, servers, self._tokenizer, version, stopped)
            if answered is None:
                self._done.clear()
                return None
            result = summarize(chosen, answered)
            path = results_path(self._config.run_directory, chosen.name, steps_done)
            write_results(path, [(result, answered)], {"steps": steps_done, "weight_version": version})
            self._done[chosen.name] = result
        metrics = {name: value for result in self._done.values() for name, value in result.metrics().items()}
        self._done.clear()
        return metrics


def results_path(run_directory: Path, name: str, steps_done: int) -> Path:
    """`evaluation/NAME/step_000012.jsonl`, counted as checkpoints are: after 12 steps."""
    return run_directory / "evaluation" / name / f"step_{steps_done:06d}.jsonl"
