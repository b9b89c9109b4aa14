"""`drpo inspect`: what a checkpoint or a model directory holds."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from drpo_megatron.commands import EXIT_FAILED, EXIT_REFUSED

HELP = "Say what a checkpoint, a checkpoints directory or a model directory holds."
EXAMPLES = ("drpo inspect runs/quickstart/checkpoints", "drpo inspect runs/quickstart/hf --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--checksums", action="store_true", help="read all files and compare their checksums")


def run(parsed: argparse.Namespace) -> int:
    from drpo_megatron.checkpoint.manifest import CheckpointError
    from drpo_megatron.weights.describe import as_text, describe

    try:
        described = describe(parsed.path, checksums=parsed.checksums)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"drpo: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(json.dumps(described, indent=1) if parsed.json else as_text(described))
    return EXIT_FAILED if described.get("damage") else 0
