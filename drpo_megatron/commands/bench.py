"""`drpo bench`: measure."""

from __future__ import annotations

import argparse

from drpo_megatron.bench import BENCHES, run_bench

HELP = "Measure."
EXAMPLES = ("drpo bench step", "drpo bench sync --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--json", action="store_true", help="print one JSON object last on stdout")


def run(parsed: argparse.Namespace) -> int:
    return run_bench(parsed.name, as_json=parsed.json)
