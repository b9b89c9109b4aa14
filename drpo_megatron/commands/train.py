"""`drpo train`: on this host, from a configuration file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from drpo_megatron.commands import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED
from drpo_megatron.config import ConfigError, RunConfig, check_config, dump_config, load_config, notes

HELP = "Train from a configuration file."
EXAMPLES = (
    "drpo train configs/quickstart.yaml",
    "drpo train configs/quickstart.yaml algorithm.loss=pg 'algorithm.loss_args={}' --dry-run",
    "drpo train configs/quickstart.yaml --resume",
    "drpo train configs/quickstart.yaml --rollouts runs/quickstart name=replayed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.steps=10")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest good checkpoint of the run, if there is one"
    )
    parser.add_argument(
        "--rollouts",
        type=Path,
        metavar="DUMP",
        help="train from the rollouts of this run directory; no server is started, see docs/replay.md",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")


def prepare(config: RunConfig) -> list[list[str]]:
    """Make the recipe's model if it is missing, and refuse what cannot run. Returns the command lines of the rollout
    servers. Raises ConfigError.
    """
    from drpo_megatron.rollout.errors import ServerStartError
    from drpo_megatron.rollout.fleet import fleet_of

    if config.model.recipe is not None:
        from drpo_megatron.models.recipes import ensure_model

        if not config.model.path.exists():
            print(f"making {config.model.path} with the recipe {config.model.recipe}", flush=True)
        try:
            ensure_model(config.model.recipe, config.model.path)
        except (ValueError, OSError) as error:
            raise ConfigError([f"model.recipe: {error}"]) from error
    check_config(config)
    if config.rollout.from_dump is not None:
        return []
    try:
        return fleet_of(config).commands()
    except ServerStartError as error:
        raise ConfigError([f"rollout.server: {error}"]) from error


def run(parsed: argparse.Namespace) -> int:
    from launch import local

    overrides = parsed.overrides + ["save.resume=true"] * parsed.resume
    if parsed.rollouts is not None:
        overrides.append(f"rollout.from_dump={json.dumps(str(parsed.rollouts))}")
    config = load_config(parsed.config, overrides)
    commands = prepare(config)
    for note in notes(config):
        print(f"note: {note}")
    if parsed.dry_run:
        print(dump_config(config))
        print(local.describe(config, config.layout, commands))
        return 0
    moved = local.prepare_run_directory(config)
    if moved:
        print(f"an earlier run of this name is now {moved}")
    code = local.run(config, config.layout)
    directory = config.run_directory
    if stopped := local.read_stop(config):
        print(f"{stopped}; `drpo train --resume` goes on", file=sys.stderr)
        return EXIT_STOPPED
    if code == 0:
        entries = sorted(path.name + "/" * path.is_dir() for path in directory.iterdir())
        print(f"done: {directory} holds {', '.join(entries)}")
        return 0
    if code == EXIT_INTERRUPTED:
        print(f"interrupted: {directory} holds the steps so far; nothing is left running", file=sys.stderr)
        return EXIT_INTERRUPTED
    failure = local.read_failure(config)
    reason = f"rank {failure.rank}: {failure.message}" if failure else f"torchrun ended with code {code}"
    print(f"drpo: the run failed. {reason}\nlogs: {directory / 'log'}", file=sys.stderr)
    return failure.code if failure else EXIT_FAILED
