"""`drpo plan`: what a configuration needs on GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path

from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.plan.devices import DEVICES

HELP = "Say what a configuration needs on GPUs, without one: memory, seconds, layouts."
EXAMPLES = (
    "drpo plan configs/quickstart.yaml",
    "drpo plan configs/quickstart.yaml parallel.tensor=1 --search --gpus 2 --device h200",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; of the model only config.json is read")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example parallel.tensor=8")
    parser.add_argument("--device", choices=DEVICES, default="h100", help="the GPU, h100 by default")
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=VALUE", help="set an assumption; all are printed"
    )
    parser.add_argument("--search", action="store_true", help="propose layouts of --gpus GPUs instead")
    parser.add_argument("--gpus", type=int, metavar="N", help="of trainer and servers together, for --search")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(parsed: argparse.Namespace) -> int:
    from drpo_megatron.plan import command

    return EXIT_REFUSED if command.run(parsed) else 0
