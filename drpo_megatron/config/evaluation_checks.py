"""What the settings of evaluation must satisfy together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from drpo_megatron.config.data_checks import reward_problems, source_problems
from drpo_megatron.config.schema import RunConfig


def evaluation_problems(config: RunConfig) -> Iterator[str]:
    """One line each: `path.to.key: problem; what to do`. Reads all rows of the sets' files."""
    own = config.evaluation
    if own.every is not None and not own.sets:
        yield f"evaluation.sets: is empty, and evaluation.every is {own.every}; name a set, or set every to null"
    for k in own.ks or []:
        if k < 1:
            yield f"evaluation.ks: {k} answers cannot be drawn; give numbers from 1 to the samples"
    for name, chosen in own.sets.items():
        at = f"evaluation.sets.{name}"
        if not re.fullmatch("[A-Za-z0-9_-]+", name):
            yield f"{at}: {name!r} is not a name of letters, digits, _ and -; choose another"
        samples = chosen.samples or own.samples
        if samples > 1 and config.evaluation_sampling.temperature == 0:
            yield (
                f"{at}.samples: {samples} answers at temperature 0 are the same answer; set it to 1, or "
                "evaluation.temperature above 0"
            )
        for k in own.ks or []:
            if k > samples:
                yield f"evaluation.ks: {k} is above the {samples} samples of {name}; lower it, or raise {at}.samples"
        if chosen.prompt_template is not None and "{prompt}" not in chosen.prompt_template:
            yield f"{at}.prompt_template: does not contain {{prompt}}, so every prompt would be the same; add it"
        if chosen.system_prompt is not None and not config.data.chat_template:
            yield f"{at}.system_prompt: needs data.chat_template; put the text into {at}.prompt_template instead"
        yield from source_problems(chosen.source, f"{at}.source")
        reward = config.reward if chosen.reward is None else chosen.reward
        yield from reward_problems(reward, chosen.source, "reward" if chosen.reward is None else f"{at}.reward", at)
