"""Small multiples of a study: a row a staleness, a column a precision, a line a loss."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drpo_megatron.study.grid import LOSSES, PRECISIONS, Cell
from drpo_megatron.study.records import Record

PICTURES = {
    "reward": (("reward/mean",), "reward", "linear"),
    "mismatch": (("mismatch/k3",), "mismatch KL (nat a token)", "log"),
    "weights": (("drpo/weight_q01", "drpo/weight_q99"), "weight w, quantiles 1 % and 99 %", "symlog"),
    "entropy": (("policy/entropy",), "entropy (nat)", "linear"),
}
"""File name → metrics, title, scale."""

_COLOURS = ("#cc3311", "#0077bb", "#009988", "#ee7733", "#555555", "#aa3377", "#bbaa00")


def draw_all(records: Sequence[Record], directory: Path) -> list[Path]:
    """The pictures of the main grid, as PNG files of `directory`: means over seeds, against the updates."""
    parameters = {loss: tuple(sorted(values.items())) for loss, values in LOSSES.items()}
    seeds: dict[Cell, list[Record]] = defaultdict(list)
    for record in records:
        if record.metrics and record.cell.parameters == parameters.get(record.loss):
            seeds[record.cell].append(record)
    directory.mkdir(parents=True, exist_ok=True)
    return [_draw(name, seeds, directory / f"{name}.png") for name in PICTURES] if seeds else []


def _draw(name: str, seeds: dict[Cell, list[Record]], out: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics, title, scale = PICTURES[name]
    rows = sorted({cell.staleness for cell in seeds})
    columns = [precision for precision in PRECISIONS if any(cell.precision == precision for cell in seeds)]
    figure = Figure(figsize=(1 + 2.3 * len(columns), 0.9 + 1.9 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)  # no display, whatever matplotlib's configuration says
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for axes_of_row, staleness in zip(grid, rows, strict=True):
        for axes, precision in zip(axes_of_row, columns, strict=True):
            _panel(axes, metrics, seeds, precision, staleness)
            axes.set_yscale(scale)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize="x-small")
            if axes in grid[0]:
                axes.set_title(precision, fontsize="small")
            if axes in grid[-1]:
                axes.set_xlabel("update", fontsize="x-small")
            if axes is axes_of_row[0]:
                axes.set_ylabel(f"{staleness} on a batch", fontsize="x-small")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
    shown = {loss: lines[loss] for loss in LOSSES if loss in lines}
    figure.legend(shown.values(), shown.keys(), ncols=len(shown), loc="outside lower center", frameon=False)
    figure.suptitle(f"{title}, mean over seeds", fontsize="medium")
    figure.savefig(out, dpi=100)
    return out


def _panel(axes: Any, metrics: Sequence[str], seeds: dict[Cell, list[Record]], precision: str, staleness: int) -> None:
    for colour, loss in zip(_COLOURS, LOSSES, strict=True):
        records = seeds.get(Cell.of(loss, LOSSES[loss], precision, staleness))
        if not records:
            continue
        for metric in metrics:
            mean = mean_curve([record.metrics[metric] for record in records])
            updates = staleness * np.arange(1, len(mean) + 1)
            axes.plot(updates, mean, color=colour, linewidth=1, label=loss)


def mean_curve(curves: Sequence[Sequence[float]]) -> np.ndarray:
    """Step by step, the mean of the curves that have a finite value there; NaN where none has. float64 [longest]."""
    length = max(map(len, curves))
    padded = np.array([[*curve, *[math.nan] * (length - len(curve))] for curve in curves], dtype=np.float64)
    finite = np.isfinite(padded)
    sums = np.where(finite, padded, 0.0).sum(axis=0)
    return np.where(finite.any(axis=0), sums / np.maximum(finite.sum(axis=0), 1), np.nan)
