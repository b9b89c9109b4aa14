"""`drpo status`: of a run that was submitted."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Say how the jobs of a submitted run are."
EXAMPLES = ("drpo status runs/quickstart",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's directory")


def run(parsed: argparse.Namespace) -> int:
    from launch import jobs

    return jobs.status(parsed)
