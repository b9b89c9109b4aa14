"""A run seen from outside, by the files of its directory alone: what `drpo top` shows."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from drpo_megatron.observability.progress import TREND_STEPS, duration, step_view, summary
from drpo_megatron.rollout.status_file import NAME as SERVERS
from launch.local import failure_in, stop_in

_RATE_STEPS = 10
_OLD_S = 30.0  # servers.json is written every five seconds while a run lives


class RunView:
    """A rich renderable of the run in `directory`. `read` brings it up to date; only what was added is read again.

    Raises ValueError when the directory holds no run.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            settings = yaml.safe_load((directory / "config.yaml").read_text())
            self._name, self._steps = str(settings["name"]), int(settings["training"]["steps"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{directory} holds no run whose config.yaml can be read ({type(error).__name__}: {error}); give the "
                "directory of a run, as runs/NAME"
            ) from error
        self._forget()
        self.read()

    def _forget(self) -> None:
        self._offset = 0
        self._file: int | None = None
        self._rows: deque[dict[str, float]] = deque(maxlen=TREND_STEPS)

    @property
    def over(self) -> bool:
        """Whether nothing more is to come: all steps are done, or the run said why it ended."""
        return self._done == self._steps or self._ended is not None

    def read(self) -> None:
        """Raises ValueError for a line of metrics.jsonl that is complete and is none."""
        self._read_metrics()
        self._servers = _servers(self._directory / SERVERS)
        log = self._directory / "log"
        failure = failure_in(log)
        self._ended = f"failed, rank {failure.rank}: {failure.message}" if failure else stop_in(log)

    @property
    def _done(self) -> int:
        return int(self._rows[-1]["step"]) + 1 if self._rows else 0

    def _read_metrics(self) -> None:
        path = self._directory / "metrics.jsonl"
        if not path.exists():
            self._forget()
            return
        with path.open("rb") as file:
            # A run that goes on from a checkpoint replaces the file.
            number = path.stat().st_ino
            if number != self._file:
                self._forget()
                self._file = number
            file.seek(self._offset)
            added = file.read()
        # The last line may be half written: it is read when it is whole.
        whole = added[: added.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self._rows.append({k: math.nan if v is None else float(v) for k, v in row.items()})
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(f"{path}: {line[:80]!r} is not a line of metrics ({error})") from error
        self._offset += len(whole)

    # --- what is shown ------------------------------------------------------------------------------------------

    def __rich__(self) -> RenderableType:
        now = time.time()
        title = Text.assemble((self._name, "bold"), f"  step {self._done}/{self._steps}  {self._state(now)}")
        parts: list[RenderableType] = []
        if self._rows:
            rewards = [row.get("reward/mean", math.nan) for row in self._rows]
            parts.append(step_view(title, rewards, self._values()))
        else:
            parts.append(Text.assemble(title, "  starting: server, model, first sync"))
        if self._servers:
            parts.append(self._server_table(now))
        if self._ended:
            parts.append(Text(self._ended, style="bold red"))
        return Group(*parts)

    def _state(self, now: float) -> str:
        if self._done == self._steps:
            return "done"
        if self._ended:
            return "ended"
        if not self._rows:
            return ""
        seconds = self._seconds_a_step()
        left = duration((self._steps - self._done) * seconds) if math.isfinite(seconds) else "unknown"
        return f"about {left} left, last step {duration(max(0.0, now - self._rows[-1]['time']))} ago"

    def _seconds_a_step(self) -> float:
        """Median of the last ones, from one line to the next: with saving, and what else a step is not charged for."""
        times = [row["time"] for row in self._rows][-_RATE_STEPS - 1 :]
        if len(times) > 1:
            return statistics.median(b - a for a, b in itertools.pairwise(times))
        return self._rows[-1].get("perf/step_s", math.nan)

    def _values(self) -> Iterator[tuple[str, str]]:
        last: Mapping[str, float] = self._rows[-1]
        for label, value in summary(last):
            yield label, value + (self._trend() if label == "reward" else "")
        for label, name, form in (
            ("staleness mean, max", "staleness/mean", "{:.2f}"),
            ("memory of rank 0", "memory/peak_gb", "{:.2f} GB"),
            ("tokens in all", "total/tokens", "{:,.0f}"),
            ("groups ready", "rollout/groups_ready", "{:.0f}"),
        ):
            if name in last:
                more = f", {last['staleness/max']:.0f}" if name == "staleness/mean" and "staleness/max" in last else ""
                yield label, form.format(last[name]) + more

    def _trend(self) -> str:
        """The mean reward of the last steps against that of those before."""
        rewards = [row.get("reward/mean", math.nan) for row in self._rows][-2 * _RATE_STEPS :]
        before, after = rewards[: len(rewards) // 2], rewards[len(rewards) // 2 :]
        if not before:
            return ""
        return f" ({statistics.fmean(after) - statistics.fmean(before):+.3f} over {len(after)} steps)"

    def _server_table(self, now: float) -> RenderableType:
        seen = now - self._servers["time"]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for heading in ("server", "state", "weights", "running", "queued", "restarts", "last failure"):
            table.add_column(heading, header_style="dim")
        for server in self._servers["servers"]:
            cells = [server[key] for key in ("state", "version", "running", "waiting", "restarts")]
            shown = ["–" if cell is None else str(cell) for cell in cells]
            table.add_row(server["name"], *shown, Text(str(server["reason"]), overflow="ellipsis", no_wrap=True))
        if seen < _OLD_S:
            return table
        return Group(table, Text(f"seen {duration(seen)} ago: nobody watches the servers now", style="dim"))


def _servers(path: Path) -> dict[str, Any]:
    """Empty before the run has written it."""
    return json.loads(path.read_text()) if path.exists() else {}
