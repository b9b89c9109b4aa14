"""`drpo evaluate`: a model on sets of prompts, by servers that it starts or that run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Evaluate a model on sets of prompts: avg@k, pass@k, maj@k with intervals."
EXAMPLES = (
    "drpo evaluate runs/quickstart/hf --data gsm8k.jsonl aime=aime24.parquet:aime --samples 8 --k 1,4,8",
    "drpo evaluate configs/smollm2-arithmetic.yaml --data reasoning_gym:basic_arithmetic --limit 200",
    "drpo evaluate configs/quickstart.yaml evaluation.temperature=0 --data test.jsonl --servers http://127.0.0.1:30000",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=Path, metavar="CONFIG|MODEL_DIR", help="a run's YAML file, or a Hugging Face directory"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="for example evaluation.temperature=0.6; before --data"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="SPEC",
        help="[NAME=]FILE[:LAYOUT], a .jsonl or .parquet file in the layout keys, gsm8k, math, aime or dapo, which its "
        "columns tell; or [NAME=]reasoning_gym:TASK. Instead of the configuration's evaluation.sets",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="answers to each prompt")
    parser.add_argument("--k", metavar="1,4,8", help="of pass@k and maj@k; 1 and N by default")
    parser.add_argument("--limit", type=int, metavar="N", help="the first prompts of each set only")
    parser.add_argument(
        "--servers", nargs="+", default=[], metavar="URL", help="servers that run; by default they are started here"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="runs/evaluations/NAME-TIME.jsonl by default")


def run(parsed: argparse.Namespace) -> int:
    from drpo_megatron.evaluation import command

    return command.run(parsed)
