"""What the directory of a run says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drpo_megatron.observability.curves import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """One run. name: unique among the runs that were read together. metrics: one mapping a step, NaN where a value was
    not finite. config: the resolved configuration, empty where the directory has none; versions: of the packages.
    """

    name: str
    directory: Path
    metrics: list[dict[str, float]]
    config: dict[str, Any]
    versions: dict[str, str]


def read_runs(directories: Sequence[Path]) -> list[RunFiles]:
    """In the order given. Raises ValueError for a directory without metrics, or when one is given twice."""
    resolved = [directory.resolve() for directory in directories]
    for directory in resolved:
        if resolved.count(directory) > 1:
            raise ValueError(f"{directory} is given twice: name every run once")
    names = _shortest_names(resolved)
    return [_read(name, directory) for name, directory in zip(names, resolved, strict=True)]


def _read(name: str, directory: Path) -> RunFiles:
    metrics = read_metrics(directory)
    config, versions = directory / "config.yaml", directory / "versions.json"
    return RunFiles(
        name,
        directory,
        metrics,
        config=yaml.safe_load(config.read_text()) if config.exists() else {},
        versions=json.loads(versions.read_text()) if versions.exists() else {},
    )


def _shortest_names(directories: Sequence[Path]) -> list[str]:
    """The last parts of every path, as few as tell all of them apart."""
    longest = max(len(directory.parts) for directory in directories)
    for count in range(1, longest + 1):
        names = ["/".join(directory.parts[-count:]) for directory in directories]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


MISSING = "(not set)"
"""The value of a setting in a configuration that does not have it."""


def config_differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Setting → its value in each configuration as JSON, for those that are not the same in all."""
    flattened = [flat(config) for config in configs]
    keys = dict.fromkeys(key for config in flattened for key in config)
    values = {key: [_json(config[key]) if key in config else MISSING for config in flattened] for key in keys}
    return {key: of_runs for key, of_runs in values.items() if len(set(of_runs)) > 1}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
