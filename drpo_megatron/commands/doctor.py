"""`drpo doctor`: whether this machine can train."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from drpo_megatron.commands import EXIT_FAILED

HELP = "Say whether this machine is well enough to train, and what to do where it is not."
EXAMPLES = ("drpo doctor", "drpo doctor configs/quickstart.yaml rollout.server.port=30000", "drpo doctor --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file: look at what its run needs")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for example rollout.server.count=2")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(parsed: argparse.Namespace) -> int:
    from drpo_megatron.config import load_config
    from drpo_megatron.doctor import FAIL, examine

    config = load_config(parsed.config, parsed.overrides) if parsed.config else None
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if not parsed.json:
            print(finding.line(), flush=True)
    failed = sum(finding.state == FAIL for finding in findings)
    if parsed.json:
        print(json.dumps({"findings": [dataclasses.asdict(f) for f in findings], "failed": failed}, indent=1))
    return EXIT_FAILED if failed else 0
