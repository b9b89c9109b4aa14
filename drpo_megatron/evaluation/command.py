"""`drpo evaluate`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

from drpo_megatron.commands import EXIT_FAILED
from drpo_megatron.config import ConfigError, RunConfig
from drpo_megatron.data import DataError
from drpo_megatron.evaluation.answers import Answered, answer_set
from drpo_megatron.evaluation.request import config_of, out_path
from drpo_megatron.evaluation.results import SetResult, summarize
from drpo_megatron.evaluation.sets import OpenSet, open_sets
from drpo_megatron.evaluation.writing import table, write_results
from drpo_megatron.rewards import RewardError
from drpo_megatron.rollout.admin import ServerAdmin
from drpo_megatron.rollout.errors import ServerError, ServerStartError
from drpo_megatron.rollout.fleet import Fleet, fleet_of
from drpo_megatron.rollout.server import is_healthy


def run(parsed: argparse.Namespace) -> int:
    """Print the results as a table and write them to a file; returns the exit code.

    Raises ConfigError for what is refused before a server is started or asked.
    """
    config = config_of(parsed)
    out = out_path(parsed, config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    try:
        sets = open_sets(config, tokenizer)
        fleet = fleet_of(config, out.parent / f"{out.stem}.log")
    except DataError as error:
        raise ConfigError([f"evaluation.sets: {error}"]) from error
    except ServerStartError as error:
        raise ConfigError([f"rollout.server: {error}"]) from error
    done: list[tuple[SetResult, list[Answered]]] = []
    try:
        with _serving(fleet, config) as version, Progress(console=Console(stderr=True), transient=True) as bar:
            of = {"model": str(config.model.path), "weight_version": version}
            of["sampling"] = config.evaluation_sampling.model_dump()
            for chosen in sets:
                answered = answer_set(config, chosen, fleet, tokenizer, version, progress=_shown(bar, chosen))
                assert answered is not None, "nobody stops it"
                done.append((summarize(chosen, answered), answered))
                write_results(out, done, of)
    except (ServerError, RewardError) as error:
        kept = f"; {out} has the sets that were done" if done else ""
        print(f"drpo: the evaluation failed. {error}{kept}", file=sys.stderr)
        return EXIT_FAILED
    print(table([result for result, _ in done]))
    print(f"{out} holds every answer")
    return 0


def _shown(bar: Progress, chosen: OpenSet) -> Callable[[int], None]:
    """A line of the display: prompts of `chosen` that are done."""
    line = bar.add_task(chosen.name, total=len(chosen.prompts))
    return lambda done: bar.update(line, completed=done)


@contextlib.contextmanager
def _serving(fleet: Fleet, config: RunConfig) -> Iterator[int]:
    """With the servers up and in traffic; the version of their weights. Raises ConfigError for servers elsewhere that
    do not answer or hold different weights, ServerStartError for one that does not come up.
    """
    server = config.rollout.server
    for url in server.addresses:
        if not is_healthy(url, server.health_timeout_s, fleet.api_key):
            raise ConfigError([f"--servers: {url} does not generate; start a server there, or leave --servers out"])
    if not server.addresses:
        print(f"starting {server.count} server(s) with {config.model.path} in {config.model.dtype}", file=sys.stderr)
    with fleet:
        fleet.wait_all()
        urls = fleet.up()
        limit_s = server.health_timeout_s
        held = {url: ServerAdmin(url, fleet.api_key).model_info(limit_s)["weight_version"] for url in urls}
        if len(set(held.values())) > 1 or not all(version.isdigit() for version in held.values()):
            raise ConfigError(
                [f"--servers: weight versions are {held}, and must be one number; start all with --weight-version 0"]
            )
        version = int(held[urls[0]])
        fleet.admit(urls, version)
        yield version
