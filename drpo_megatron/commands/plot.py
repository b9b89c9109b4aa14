"""`drpo plot`: curves of runs as a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from drpo_megatron.commands import EXIT_REFUSED

HELP = "Draw the metrics of one or more runs into a PNG."
EXAMPLES = ("drpo plot runs/quickstart --out curves.png",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")


def run(parsed: argparse.Namespace) -> int:
    from drpo_megatron.observability.curves import plot_runs

    try:
        plot_runs(parsed.runs, parsed.out)
    except (ValueError, OSError) as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0
