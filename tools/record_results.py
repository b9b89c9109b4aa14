"""Record finished runs of one recipe under docs/results/: their metrics, a picture of the curves, and a page of facts.

    python tools/record_results.py NAME RUN [RUN …] [--page PAGE --machine MACHINE --overrides OVERRIDES --note NOTE]

NAME is the recipe (configs/NAME.yaml), each RUN a run directory of it. Every number on the page comes from the runs.
The options are for runs that were not made as the recipe says on this machine: the page's name, what the machine is,
with its Python, the settings behind the command, and what a reader must know.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
from pathlib import Path

import yaml

from drpo_megatron.observability.curves import plot_runs, read_metrics

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PACKAGES = ("torch", "megatron-core", "sglang", "transformers")
EDGE = 5


def row(run: Path) -> tuple[int, str]:
    """(seed, table row) of one run. The wall time is from the resolved configuration's writing to the last metrics
    line.
    """
    seed = yaml.safe_load((run / "config.yaml").read_text())["seed"]
    metrics = read_metrics(run)
    rewards = [m["reward/mean"] for m in metrics]
    first, last = statistics.mean(rewards[:EDGE]), statistics.mean(rewards[-EDGE:])
    minutes = (metrics[-1]["time"] - (run / "config.yaml").stat().st_mtime) / 60
    mismatch = max(m["mismatch/abs_dlogp_max"] for m in metrics)
    ratio = max(m["ratio/max_abs_dev"] for m in metrics)
    cells = (seed, len(metrics), f"{rewards[0]:.3f}", f"{rewards[-1]:.3f}", f"{first:.3f}", f"{last:.3f}")
    facts = (f"{last - first:+.3f}", f"{mismatch:.1e}", f"{ratio:.1e}", f"{minutes:.1f}")
    return seed, "| " + " | ".join(str(c) for c in cells + facts) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--page")
    here = f"Python {platform.python_version()}; two cores of an x86-64 machine without a GPU, shared with other work"
    parser.add_argument("--machine", default=here)
    parser.add_argument("--overrides", default="")
    parser.add_argument("--note")
    parsed = parser.parse_args()
    page = parsed.page or parsed.name
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = sorted(row(run) for run in parsed.runs)
    for run in parsed.runs:
        shutil.copy(run / "metrics.jsonl", RESULTS / f"{page}-seed{row(run)[0]}.jsonl")
    plot_runs(parsed.runs, RESULTS / f"{page}.png")
    recorded = json.loads((parsed.runs[0] / "versions.json").read_text())
    versions = ", ".join(f"{package} {recorded[package]}" for package in PACKAGES)
    lines = [
        f"# {page}",
        "",
        f"Recipe: [configs/{parsed.name}.yaml](../../configs/{parsed.name}.yaml).",
        f"{parsed.machine}; {versions}.",
        "Written by `tools/record_results.py`.",
        "",
        "```bash",
        *(
            f".venv/bin/drpo train configs/{parsed.name}.yaml seed={seed} {parsed.overrides}".rstrip()
            for seed, _ in rows
        ),
        "```",
        "",
        f"| seed | steps | first reward | last reward | mean of first {EDGE} | mean of last {EDGE} | gain "
        "| max \\|Δ log p\\| | max \\|r − 1\\|, first update | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(text for _, text in rows),
        "",
        *([parsed.note, ""] if parsed.note else []),
        f"![curves]({page}.png)",
    ]
    (RESULTS / f"{page}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
