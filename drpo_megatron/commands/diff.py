"""`drpo diff`: where two runs part."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from drpo_megatron.commands import EXIT_REFUSED

HELP = "Say at which step and metric two runs part; exit code 0 when they are equal, 1 when not."
EXAMPLES = ("drpo diff runs/quickstart.1 runs/quickstart", "drpo diff runs/a runs/b --tolerance 1e-5 --json")

EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="run directory")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help="run directory")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="T",
        help="values are the same up to T · max(1, |a|, |b|); 0 by default. Times, rates and memory do not count",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(parsed: argparse.Namespace) -> int:
    from drpo_megatron.report.parting import as_json, as_text, compare_runs
    from drpo_megatron.report.run_files import read_runs

    try:
        a, b = read_runs([parsed.run_a, parsed.run_b])
        comparison = compare_runs(a, b, parsed.tolerance)
    except (ValueError, OSError) as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(json.dumps(as_json(comparison), indent=1) if parsed.json else as_text(comparison))
    return 0 if comparison.equal else EXIT_DIFFERENT
