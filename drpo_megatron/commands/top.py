"""`drpo top`: a run as it goes on, from its files."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from drpo_megatron.commands import EXIT_REFUSED

HELP = "Show a run as it goes on: reward, seconds of each verb, servers, memory, time left."
EXAMPLES = ("drpo top runs/quickstart", "drpo top runs/quickstart --once")
_WIDTH = 120  # of a frame that goes into a pipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory, here or on a shared file system")
    parser.add_argument("--once", action="store_true", help="print what is so now and end, as into a pipe")
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="look again after, 2 by default")


def run(parsed: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.live import Live

    from drpo_megatron.observability.top import RunView

    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else _WIDTH)
    try:
        view = RunView(parsed.run)
        if parsed.once or not terminal:
            console.print(view)
            return 0
        with Live(view, console=console, auto_refresh=False) as live:
            while not view.over:
                time.sleep(parsed.every)
                view.read()
                live.refresh()
    except ValueError as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0
