"""`drpo report`: runs as one HTML file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from drpo_megatron.commands import EXIT_REFUSED

HELP = "Write one HTML file, which needs no network, with the curves, times, settings and samples of runs."
EXAMPLES = (
    "drpo report runs/quickstart --out report.html",
    "drpo report runs/seed0 runs/seed1 --out report.html --samples 1000",
)

SAMPLES = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--out", type=Path, required=True, metavar="HTML")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"of each run at most; {SAMPLES} by default"
    )


def run(parsed: argparse.Namespace) -> int:
    from drpo_megatron.report.page import write_report

    try:
        write_report(parsed.runs, parsed.out, parsed.samples)
    except (ValueError, OSError) as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(f"{parsed.out} holds {len(parsed.runs)} runs, {parsed.out.stat().st_size / 1e6:.1f} MB")
    return 0
