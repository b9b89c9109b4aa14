"""`drpo submit`: train in a SLURM job."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Train in a SLURM job: check it here, and submit it."
EXAMPLES = (
    "drpo submit configs/llama3-70b.yaml --cluster configs/clusters/example.yaml --dry-run",
    "drpo submit configs/quickstart.yaml --cluster configs/clusters/cpu.yaml --sweep optimizer.lr=1e-3,2e-3 "
    "parallel.tensor=1 parallel.data=2 save.every=5",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example training.steps=10")
    parser.add_argument(
        "--cluster", type=Path, required=True, metavar="CLUSTER", help="YAML file, see configs/clusters/"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, write and submit nothing")
    parser.add_argument(
        "--resume", action="store_true", help="go on in the run's directory, from its newest checkpoint"
    )
    parser.add_argument("--sweep", metavar="KEY=A,B,C", help="a run for each value, in an array job")
    parser.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs, each goes on where the one before ends"
    )


def run(parsed: argparse.Namespace) -> int:
    from launch import submit

    return submit.run(parsed)
