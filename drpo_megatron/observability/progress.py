"""What the terminal shows while a run goes on: a live table, or one line a step where there is no terminal."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from drpo_megatron.config.schema import RunConfig

BARS = "▁▂▃▄▅▆▇█"
TREND_STEPS = 40


class Progress(Protocol):
    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the finished `step` (counted from 0)."""


@contextlib.contextmanager
def progress_display(config: RunConfig, terminal: TextIO | None) -> Iterator[Progress]:
    """The display on `terminal`: live on a TTY, one line a step on anything else.

    Nothing is shown without a terminal or with tracking.progress off.
    """
    if terminal is None or not config.tracking.progress:
        yield NoProgress()
    elif terminal.isatty():
        console = Console(file=terminal)
        progress = LiveProgress(config.name, config.training.steps)
        # The process's own stdout goes to a log file: nothing to redirect.
        with Live(progress, console=console, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False):
            yield progress
    else:
        yield LineProgress(config.training.steps, terminal)


class NoProgress:
    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass


class LineProgress:
    """One line a step, for logs."""

    def __init__(self, steps: int, out: TextIO) -> None:
        self._steps, self._out = steps, out

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        parts = [f"step {step + 1}/{self._steps}", *(f"{label} {value}" for label, value in summary(metrics))]
        print("  ".join(parts), file=self._out, flush=True)


class LiveProgress:
    """A rich renderable: step and time, reward with its trend, mismatch, and where the step's seconds go."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._done = 0
        self._metrics: Mapping[str, float] = {}
        self._rewards: deque[float] = deque(maxlen=TREND_STEPS)
        self._start = time.monotonic()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._done, self._metrics = step + 1, metrics
        self._rewards.append(metrics.get("reward/mean", math.nan))

    def __rich__(self) -> RenderableType:
        elapsed = time.monotonic() - self._start
        title = Text.assemble((self._name, "bold"), f"  step {self._done}/{self._steps}  {duration(elapsed)}")
        if not self._done:
            return Text.assemble(title, "  starting: server, model, first sync")
        remaining = (self._steps - self._done) * self._metrics.get("perf/step_s", math.nan)
        if math.isfinite(remaining):
            title.append(f", about {duration(remaining)} left")
        return step_view(title, self._rewards, summary(self._metrics))


def step_view(title: Text, rewards: Iterable[float], values: Iterable[tuple[str, str]]) -> RenderableType:
    """A heading, the trend of the rewards, and labelled values."""
    numbers = Table.grid(padding=(0, 2))
    for label, value in values:
        numbers.add_row(label, Text(value, style="bold" if label == "reward" else ""))
    return Group(title, Text(sparkline(rewards), style="green"), numbers)


def sparkline(values: Iterable[float]) -> str:
    """One block character a value, from the lowest (▁) to the highest (█) of them; a space where it is not finite."""
    values = list(values)
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        " " if not math.isfinite(v) else BARS[round((v - low) / span * (len(BARS) - 1)) if span else 0] for v in values
    )


def summary(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """(label, value) of what is worth a glance, for the metrics that exist."""
    for label, name, form in (
        ("reward", "reward/mean", "{:.3f}"),
        ("entropy", "policy/entropy", "{:.3f}"),
        ("mismatch max|Δlogp|", "mismatch/abs_dlogp_max", "{:.2e}"),
        ("tokens/s", "perf/tokens_per_s", "{:.0f}"),
        ("step", "perf/step_s", "{:.2f} s"),
    ):
        if name in metrics:
            yield label, form.format(metrics[name])
    verbs = [
        f"{name.removeprefix('perf/').removesuffix('_s')} {seconds:.2f}"
        for name, seconds in metrics.items()
        if name.startswith("perf/") and name.endswith("_s") and name != "perf/step_s" and not name.endswith("_per_s")
    ]
    if verbs:
        yield "seconds", ", ".join(verbs)
    for name, value in metrics.items():
        family, _, figure = name.rpartition("/")
        if family.startswith("evaluation/") and figure.startswith("avg@"):
            yield f"{family.removeprefix('evaluation/')} {figure}", f"{value:.3f}"
    if metrics.get("reward/errors"):
        yield "reward errors", f"{metrics['reward/errors']:.0f}"


def duration(seconds: float) -> str:
    """As 2:05 or 1:02:05."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
