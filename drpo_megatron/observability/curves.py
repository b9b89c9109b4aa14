"""Learning curves of one or more runs, drawn from their `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

PANELS = (
    ("reward/mean", "reward"),
    ("policy/entropy", "entropy of the policy (nat)"),
    ("mismatch/abs_dlogp_max", "mismatch, max |log π − log μ| (nat)"),
)


def read_metrics(run_directory: Path) -> list[dict[str, float]]:
    """One mapping a step; null (a value that was not finite) becomes NaN. Raises ValueError with the file and line."""
    path = run_directory / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the directory of a run that finished at least one step")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append({k: math.nan if v is None else float(v) for k, v in row.items()})
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: is not a line of metrics ({error}); remove it") from error
    if not rows:
        raise ValueError(f"{path} is empty: the run finished no step")
    return rows


def plot_runs(run_directories: Sequence[Path], out: Path) -> None:
    """Draw reward, entropy and mismatch against the step into the PNG `out`, the runs over each other.

    Raises ValueError for a run without metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [(directory.resolve().name, read_metrics(directory)) for directory in run_directories]
    figure = Figure(figsize=(4.4 * len(PANELS), 3.4), layout="constrained")
    FigureCanvasAgg(figure)  # no display, whatever matplotlib's configuration says
    for axes, (metric, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for name, rows in runs:
            axes.plot([r["step"] for r in rows], [r.get(metric, math.nan) for r in rows], label=name, linewidth=1.4)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        figure.axes[0].legend(frameon=False, fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
