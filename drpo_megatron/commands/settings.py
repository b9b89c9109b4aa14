"""`drpo settings`: the reference of all settings."""

from __future__ import annotations

import argparse

from drpo_megatron.config import setting_reference

HELP = "Print every setting with its type, default and meaning."
EXAMPLES = ("drpo settings", "drpo settings --cluster")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", action="store_true", help="those of the cluster file of `drpo submit`")


def run(parsed: argparse.Namespace) -> int:
    if parsed.cluster:
        from launch.cluster import ClusterConfig

        print(setting_reference(ClusterConfig))
    else:
        print(setting_reference())
    return 0
