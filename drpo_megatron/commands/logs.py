"""`drpo logs`: of a run that was submitted."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Print the end of a submitted run's log."
EXAMPLES = ("drpo logs runs/quickstart --lines 100 --all",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="of each file, 40 by default")
    parser.add_argument("--all", action="store_true", help="of the ranks and the servers too")


def run(parsed: argparse.Namespace) -> int:
    from launch import jobs

    return jobs.logs(parsed)
