"""What the settings of prompts and rewards must satisfy, for training and for a set that is evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator

from drpo_megatron.config.functions import import_function
from drpo_megatron.config.schema import DataConfig, FileData, FunctionData, ReasoningGymData, RewardConfig

Source = ReasoningGymData | FileData | FunctionData


def data_problems(data: DataConfig) -> Iterator[str]:
    """Reads all rows of a file."""
    if "{prompt}" not in data.prompt_template:
        yield "data.prompt_template: does not contain {prompt}, so every prompt would be the same; add it"
    if data.system_prompt is not None and not data.chat_template:
        yield "data.system_prompt: needs data.chat_template; put the text into data.prompt_template instead"
    yield from source_problems(data.source, "data.source")


def source_problems(source: Source, at: str) -> Iterator[str]:
    """`at`: the key of the source."""
    from drpo_megatron.data.rows import DataError, open_rows  # pyarrow and reasoning-gym are loaded where they are used

    if isinstance(source, FileData) and source.layout not in ("keys", "auto"):
        for key in ("prompt_key", "answer_key"):
            if getattr(source, key) != FileData.model_fields[key].default:
                yield f"{at}.{key}: has no effect with {at}.layout = {source.layout}; remove it, or set layout to keys"
    try:
        open_rows(source)
    except DataError as error:
        yield f"{at}: {error}"


def reward_problems(reward: RewardConfig, source: Source, at: str = "reward", data: str = "data") -> Iterator[str]:
    """`at`: the key of the reward, `data`: the key of the section that `source` is in."""
    if reward.type == "reasoning_gym" and not isinstance(source, ReasoningGymData):
        yield f"{at}.type: reasoning_gym scores its own problems only, {data}.source.type is {source.type}; change one"
    if (
        reward.type == "math_verify"
        and isinstance(source, FileData)
        and source.layout in ("keys", "auto")
        and source.answer_key is None
    ):
        yield f"{data}.source.answer_key: is null, and math_verify needs a reference answer; name its column"
    if reward.type == "function" and reward.function is None:
        yield f"{at}.function: is required for {at}.type = function; set it to module:function"
    if reward.type != "function" and reward.function is not None:
        yield f"{at}.function: has no effect with {at}.type = {reward.type}; remove it or set the type to function"
    if reward.type == "function" and reward.function is not None:
        try:
            import_function(reward.function)
        except ValueError as error:
            yield f"{at}.function: {error}"
    if reward.extract is not None:
        if reward.type != "reasoning_gym":
            yield f"{at}.extract: has no effect with {at}.type = {reward.type}; remove it"
        try:
            if re.compile(reward.extract).groups < 1:
                yield f"{at}.extract: {reward.extract!r} has no group; put the answer's part in parentheses"
        except re.error as error:
            yield f"{at}.extract: {reward.extract!r} is not a regular expression ({error}); correct it"
