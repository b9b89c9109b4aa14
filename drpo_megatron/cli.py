"""The `drpo` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from drpo_megatron.bench import BENCHES, run_bench
from drpo_megatron.config import (
    ConfigError,
    RunConfig,
    check_config,
    dump_config,
    load_config,
    notes,
    setting_reference,
)
from drpo_megatron.plan.devices import DEVICES
from drpo_megatron.weights.convert import add_arguments

EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, 1 the run failed, 2 refused before anything was started, 75 start it again (it was told to
    stop and saved a checkpoint, or it stood still and the watchdog ended it), 130 interrupted.
    """
    parsed = parse_arguments(arguments)
    try:
        sys.exit(parsed.command(parsed))
    except ConfigError as error:
        print(f"drpo: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 and a usage line when they are not a `drpo` command."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first option: overrides behind one land here.
    if rest and not (hasattr(parsed, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="drpo", description="DRPO training of language models on Megatron-Core.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        return added

    train = command("train", _train, "Train from a configuration file.")
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.steps=10")
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest good checkpoint of the run, if there is one"
    )
    train.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")

    job = command("submit", _submit, "Train in a SLURM job: check it here, and submit it.")
    job.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    job.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.steps=10")
    job.add_argument("--cluster", type=Path, required=True, metavar="CLUSTER", help="YAML file, see configs/clusters/")
    job.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")
    job.add_argument("--resume", action="store_true", help="go on in the run's directory, from its newest checkpoint")
    job.add_argument("--sweep", metavar="KEY=A,B,C", help="a run for each value, in an array job")
    job.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each goes on where the one before ends")

    for name, function, text in (
        ("status", _status, "Say how the jobs of a submitted run are."),
        ("logs", _logs, "Print the end of a submitted run's log."),
        ("cancel", _cancel, "Cancel the jobs of a submitted run."),
    ):
        about = command(name, function, text)
        about.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
        if name == "logs":
            about.add_argument("--lines", type=int, default=40, metavar="N", help="of each file, 40 by default")
            about.add_argument("--all", action="store_true", help="of the ranks and the servers too")

    plan = command("plan", _plan, "Say what a configuration needs on GPUs, without one: memory, seconds, layouts.")
    plan.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; of the model only config.json is read")
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example parallel.tensor=8")
    plan.add_argument("--device", choices=DEVICES, default="h100", help="the GPU, h100 by default")
    plan.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="set an assumption; all are printed"
    )
    plan.add_argument("--search", action="store_true", help="propose layouts of --gpus GPUs instead")
    plan.add_argument("--gpus", type=int, metavar="N", help="of trainer and servers together, for --search")
    plan.add_argument("--json", action="store_true", help="print one JSON object")

    settings = command("settings", _settings, "Print every setting with its type, default and meaning.")
    settings.add_argument("--cluster", action="store_true", help="those of the cluster file of `drpo submit`")

    plot = command("plot", _plot, "Draw the metrics of one or more runs into a PNG.")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    plot.add_argument("--out", type=Path, required=True, metavar="PNG")

    convert = command("convert", _convert, "Convert between checkpoints and Hugging Face directories, on the CPU.")
    add_arguments(convert)

    inspect = command("inspect", _inspect, "Say what a checkpoint, a checkpoints directory or a model directory holds.")
    inspect.add_argument("path", type=Path, metavar="PATH")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.add_argument("--checksums", action="store_true", help="read all files and compare their checksums")

    bench = command("bench", _bench, "Measure.")
    bench.add_argument("name", choices=BENCHES)
    bench.add_argument("--json", action="store_true", help="print one JSON object last on stdout")
    return parser


def _prepare(config: RunConfig) -> None:
    """Make the recipe's model if it is missing, and refuse what cannot run. Raises ConfigError."""
    if config.model.recipe is not None:
        from drpo_megatron.models.recipes import ensure_model

        if not config.model.path.exists():
            print(f"making {config.model.path} with the recipe {config.model.recipe}", flush=True)
        try:
            ensure_model(config.model.recipe, config.model.path)
        except (ValueError, OSError) as error:
            raise ConfigError([f"model.recipe: {error}"]) from error
    check_config(config)


def _train(parsed: argparse.Namespace) -> int:
    from drpo_megatron.rollout.errors import ServerStartError
    from drpo_megatron.rollout.fleet import fleet_of
    from launch import local

    config = load_config(parsed.config, parsed.overrides + ["save.resume=true"] * parsed.resume)
    _prepare(config)
    try:
        commands = fleet_of(config).commands()
    except ServerStartError as error:
        raise ConfigError([f"rollout.server: {error}"]) from error
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


def _plan(parsed: argparse.Namespace) -> int:
    from drpo_megatron.plan.command import run

    return EXIT_REFUSED if run(parsed) else 0


def _submit(parsed: argparse.Namespace) -> int:
    from launch import submit

    return submit.run(parsed)


def _status(parsed: argparse.Namespace) -> int:
    from launch import jobs

    return jobs.status(parsed)


def _logs(parsed: argparse.Namespace) -> int:
    from launch import jobs

    return jobs.logs(parsed)


def _cancel(parsed: argparse.Namespace) -> int:
    from launch import jobs

    return jobs.cancel(parsed)


def _settings(parsed: argparse.Namespace) -> int:
    if parsed.cluster:
        from launch.cluster import ClusterConfig

        print(setting_reference(ClusterConfig))
    else:
        print(setting_reference())
    return 0


def _plot(parsed: argparse.Namespace) -> int:
    from drpo_megatron.observability.curves import plot_runs

    try:
        plot_runs(parsed.runs, parsed.out)
    except (ValueError, OSError) as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def _convert(parsed: argparse.Namespace) -> int:
    from drpo_megatron.weights.convert import run

    return run(parsed)


def _inspect(parsed: argparse.Namespace) -> int:
    import json

    from drpo_megatron.checkpoint.manifest import CheckpointError
    from drpo_megatron.weights.describe import as_text, describe

    try:
        described = describe(parsed.path, checksums=parsed.checksums)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(json.dumps(described, indent=1) if parsed.json else as_text(described))
    return EXIT_FAILED if described.get("damage") else 0


def _bench(parsed: argparse.Namespace) -> int:
    return run_bench(parsed.name, as_json=parsed.json)


if __name__ == "__main__":
    main()
