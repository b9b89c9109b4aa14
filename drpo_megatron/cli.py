"""The `drpo` command."""
# PYTHON_ARGCOMPLETE_OK: completions of a shell that asks every Python command for them

from __future__ import annotations

import argparse
import importlib
import os
import sys

from drpo_megatron import __version__
from drpo_megatron.commands import COMMANDS, EXIT_INTERRUPTED, EXIT_REFUSED
from drpo_megatron.config import ConfigError
from drpo_megatron.platform.quiet import hush_advice_for_gpus


def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0 done, and those of `drpo_megatron.commands`."""
    parsed = parse_arguments(arguments)
    if "" not in sys.path:  # as for the ranks, by `python -m`: `module:function` may lie in the working directory
        sys.path.insert(0, "")
    hush_advice_for_gpus()
    try:
        sys.exit(parsed.run_command(parsed))
    except ConfigError as error:
        print(f"drpo: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Exits with 2 and a usage line when they are not a `drpo` command."""
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:
        from drpo_megatron.completion import complete

        complete(parser)
    parsed, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positionals at the first option: overrides behind one land here.
    if rest and not (hasattr(parsed, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="drpo", description="DRPO training of language models on Megatron-Core.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"drpo_megatron.commands.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog="\n  ".join(["examples:", *module.EXAMPLES]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run_command=module.run)
    return parser


if __name__ == "__main__":
    main()
