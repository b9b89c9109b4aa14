"""Record a report of `drpo bench NAME --json` under docs/results/: the JSON, a table, and for `loss` a picture.

    python tools/record_bench.py REPORT.json [--note SENTENCE]

Every number on the page comes from the report. A report of a machine with a GPU gets a page of its own, with its name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TITLES = {
    "loss": "The fused projection and loss",
    "prefix": "What shared prefixes save",
    "sync": "A weight sync over a bare broadcast",
    "checkpoint": "How long a checkpoint holds up training",
    "convert": "A conversion over a bare write of the same bytes",
    "fp8": "FP8 stability, the reduced grid",
    "step": "Where the time of a step goes",
    "update": "What an update costs",
    "plan": "The memory that a plan predicts, over what is measured",
}
LABELS = {
    "ratio_to_gemm_tp1": "TP 1",
    "ratio_to_gemm_tp2": "TP 2",
    "ratio_to_gemm_sparse": "sparse,\nSmolLM2",
    "speedup_vs_dense": "dense\nbackend",
    "speedup_vs_plain": "plain\ntorch",
    "speedup_vs_mcore": "Megatron-\nCore",
    "speedup_vs_trl": "TRL",
    "speedup_vs_verl": "verl",
}


def bars(axis: Any, figures: dict[str, Any], prefix: str, title: str, beside: str = "") -> None:
    """The figures of LABELS whose name starts with `prefix`; next to each the one whose name has `beside` before it."""
    names = [name for name in LABELS if name.startswith(prefix) and name in figures]
    kinds = {"": "#4477aa", beside: "#ee7733"} if beside and beside + names[0] in figures else {"": "#4477aa"}
    width = 0.7 / len(kinds)
    for x, name in enumerate(names):
        for place, (kind, color) in enumerate(kinds.items()):
            value, (low, high) = figures[kind + name]["value"], figures[kind + name]["spread"]
            center = x + (place - (len(kinds) - 1) / 2) * width
            label = (kind.rstrip("_") or "exact") if x == 0 and len(kinds) > 1 else None
            axis.bar(center, value, color=color, width=width, label=label)
            axis.errorbar(center, value, yerr=[[value - low], [high - value]], color="black", capsize=4)
            axis.text(center, 0.03, f"{value:.2f}", ha="center", color="white", size="small")
        bound = float(figures[name]["must"].split()[1])
        axis.plot([x - 0.4, x + 0.4], [bound, bound], color="#cc3311", linewidth=2, label="bound" if x == 0 else None)
    axis.set_xticks(range(len(names)), [LABELS[name] for name in names])
    axis.set_title(title)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right")


def growth(axis: Any, figures: dict[str, Any], what: str, title: str) -> None:
    prefix = f"time_share_{what}_"
    points = {int(name.removeprefix(prefix)): f for name, f in figures.items() if name.startswith(prefix)}
    largest = max(points)
    axis.plot([0, largest], [0, 1], color="#bbbbbb", label="proportional")
    for size, figure in points.items():
        low, high = figure["spread"]
        axis.errorbar(
            size, figure["value"], yerr=[[figure["value"] - low], [high - figure["value"]]], fmt="o", capsize=4
        )
    exponent = figures[f"growth_exponent_{what}"]["value"]
    axis.set_title(f"{title}: time ∝ size^{exponent:.2f}")
    axis.set_xlabel(what)
    axis.legend(loc="upper left")


def draw(figures: dict[str, Any], out: Path) -> None:
    picture = Figure(figsize=(11, 7.5), layout="constrained")
    axes = picture.subplots(2, 2)
    bars(axes[0, 0], figures, "ratio_to_gemm", "time / time of the three bare products")
    bars(axes[0, 1], figures, "speedup_vs", "how many times faster than", beside="sparse_")
    growth(axes[1, 0], figures, "tokens", "time over tokens")
    growth(axes[1, 1], figures, "columns", "time over vocabulary")
    FigureCanvasAgg(picture).print_png(str(out))


def table(report: dict[str, Any]) -> list[str]:
    lines = ["| figure | median | lowest, highest | must | holds |", "|---|---|---|---|---|"]
    for name, figure in report["figures"].items():
        low, high = figure["spread"]
        holds = {True: "yes", False: "**no**", None: ""}[figure["holds"]]
        lines.append(f"| `{name}` | {figure['value']:.4g} | {low:.4g}, {high:.4g} | {figure['must'] or ''} | {holds} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--note", help="what a reader must know of this run")
    parsed = parser.parse_args()
    report = json.loads(parsed.report.read_text().splitlines()[-1])
    name, machine = report["bench"], report["machine"]
    gpu = machine.get("gpu")
    page_name = name if gpu is None else f"{name}-{gpu.removeprefix('NVIDIA ').lower().replace(' ', '-')}"
    (RESULTS / f"{page_name}.json").write_text(json.dumps(report, indent=1) + "\n")
    picture: list[str] = []
    if name == "loss":
        draw(report["figures"], RESULTS / f"{page_name}.png")
        picture = [f"![Ratios, speed-ups and growth]({page_name}.png)", ""]
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    page = [
        f"# {TITLES[name]}" + (f": {gpu}" if gpu else ""),
        "",
        f"{machine['cores']} cores, {machine['cpu']}, {gpu or 'no GPU'}; Python {machine['python']}, {versions}.",
        "Written by `tools/record_bench.py` from the report of",
        "",
        "```bash",
        *(["make peers"] if name == "loss" else []),
        f".venv/bin/drpo bench {name} --json",
        "```",
        "",
        f"What each figure is: the docstring of [bench/{name}.py](../../drpo_megatron/bench/{name}.py).",
        "",
        *([parsed.note, ""] if parsed.note else []),
        *picture,
        *table(report),
    ]
    (RESULTS / f"{page_name}.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
