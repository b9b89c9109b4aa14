"""Tab completion of `drpo`: configuration files, run directories, and settings with their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import argcomplete
from argcomplete.completers import FilesCompleter

from drpo_megatron.config.load import field_help


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process. Called where a shell asks for completions only."""
    yaml = FilesCompleter(allowednames=("yaml", "yml"))
    of_metavar = {"CONFIG": yaml, "CLUSTER": yaml, "RUN": runs, "KEY=VALUE": settings}
    for action in _arguments(parser):
        if completer := of_metavar.get(str(action.metavar)):
            action.completer = completer  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)


def runs(prefix: str, **_: Any) -> list[str]:
    """Directories that hold a run, and those on the way to one."""
    parent = Path(prefix if prefix.endswith("/") or not prefix else Path(prefix).parent)
    if not parent.is_dir():
        return []
    found = []
    for path in parent.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            is_run = (path / "config.yaml").exists() or (path / "metrics.jsonl").exists()
            found.append(str(path) if is_run else f"{path}/")
    return found


def settings(prefix: str, **_: Any) -> list[str]:
    """`key=` for every key, and `key=value` behind the equals sign for those with a few values."""
    if "=" not in prefix:
        return list(dict.fromkeys(f"{setting.path}=" for setting in field_help()))
    key = prefix.partition("=")[0]
    return [
        f"{key}={value}"
        for setting in field_help()
        if setting.path == key
        for value in setting.type.replace("bool", "true | false").split(" | ")
        if value not in ("int", "float", "string", "path", "mapping") and not value.startswith(("list", "tuple"))
    ]
