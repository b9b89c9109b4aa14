"""reasoning-gym's procedural tasks. Used by the prompt source and, in another process, by the verifier; no torch."""

from __future__ import annotations

import difflib
from typing import Any

from drpo_megatron.config.schema import ReasoningGymData
from drpo_megatron.data.errors import DataError

# With reasoning-gym 0.1.25: the reference answer of an entry is scored 0 by the task's own scorer.
UNSCORABLE_TASKS = frozenset({"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"})
# Entries differ between two data sets of the same seed, so a run could not be repeated or resumed.
UNREPEATABLE_TASKS = frozenset({"list_functions"})


def make_dataset(source: ReasoningGymData) -> Any:
    """A reasoning-gym data set (`len`, `[i] -> entry`, `score_answer(answer, entry) -> float`), generated lazily.

    `composite` takes its parts as a list of mappings in `options.datasets`. Raises DataError for a task that is
    unknown, cannot be scored or repeated, or refuses its options.
    """
    import reasoning_gym  # takes seconds
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    _check_task(source.task, DATASETS)
    options = dict(source.options)
    try:
        if source.task == "composite":
            parts = [DatasetSpec(**part) for part in options.get("datasets", [])]
            for part in parts:
                _check_task(part.name, DATASETS)
            options["datasets"] = parts
        return reasoning_gym.create_dataset(source.task, seed=source.seed, size=source.size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, DataError):
            raise
        known = ", ".join(k for k in vars(DATASETS[source.task][1]()) if k not in ("seed", "size"))
        raise DataError(
            f"reasoning-gym task {source.task!r} refuses the options {source.options} ({error}); it takes: {known}"
        ) from error


def _check_task(task: str, known: dict[str, Any]) -> None:
    if task in UNSCORABLE_TASKS:
        raise DataError(f"reasoning-gym task {task!r} scores its own reference answers 0; choose another task")
    if task in UNREPEATABLE_TASKS:
        raise DataError(f"reasoning-gym task {task!r} gives other problems each time for one seed; choose another task")
    if task not in known:
        nearest = difflib.get_close_matches(task, known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are: {', '.join(sorted(known))}"
        raise DataError(f"reasoning-gym has no task {task!r}; {hint}")
