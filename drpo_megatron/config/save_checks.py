"""The settings of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator

from drpo_megatron.config.schema import RunConfig, SaveConfig


def save_problems(config: RunConfig) -> Iterator[str]:
    save = config.save
    if save.every is None:
        for name in ("keep", "keep_best", "best_metric", "asynchronous", "directory", "deadline_s", "resume"):
            if getattr(save, name) != SaveConfig.model_fields[name].default:
                yield f"save.{name}: has no effect without checkpoints; set save.every, or remove it"
        return
    # The nearest directory that exists is where the first one will be made.
    parent = config.checkpoint_directory.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        yield f"save.directory: {parent} cannot be written to; choose another, or change its permissions"
