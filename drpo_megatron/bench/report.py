"""What a bench prints: figures with a median and a spread, the machine, and the versions."""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drpo_megatron.platform import has_cuda
from drpo_megatron.platform.process import HUGE_PAGES
from drpo_megatron.platform.versions import versions

BENCHES = ("step", "update", "loss", "prefix", "sync", "checkpoint", "convert", "fp8", "plan")


@dataclass(frozen=True)
class Figure:
    """One measured number. must: a bound such as `<= 1.10`, or None where there is none."""

    value: float
    spread: tuple[float, float]
    must: str | None = None

    @classmethod
    def of(cls, samples: Sequence[float], must: str | None = None) -> Figure:
        """Median, and the lowest and highest sample. ValueError without samples."""
        if not samples:
            raise ValueError("a figure needs at least one sample")
        return cls(statistics.median(samples), (min(samples), max(samples)), must)

    @property
    def holds(self) -> bool | None:
        if self.must is None:
            return None
        relation, bound = self.must.split()
        return {"<=": self.value <= float(bound), ">=": self.value >= float(bound)}[relation]

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "spread": list(self.spread), "must": self.must, "holds": self.holds}


def machine() -> dict[str, Any]:
    import torch

    made = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if has_cuda():
        made |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
    return made


def run_worker(module: str, *arguments: object) -> Any:
    """What `python -m module arguments` prints as JSON on its last line, run as a rank of the launcher with one thread.

    Raises CalledProcessError when it fails; its message is on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env={**os.environ, **HUGE_PAGES, "OMP_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_bench(name: str, as_json: bool) -> int:
    """Run one bench and print its figures; as one JSON object last on stdout with `as_json`. Returns the exit code."""
    figures: dict[str, Figure] = importlib.import_module(f"drpo_megatron.bench.{name}").measure()
    for key, figure in figures.items():
        low, high = figure.spread
        print(f"{key:32} {figure.value:12.4g}   [{low:.4g}, {high:.4g}]", file=sys.stderr)
    if as_json:
        report = {
            "bench": name,
            "machine": machine(),
            "versions": versions(),
            "figures": {key: figure.to_json() for key, figure in figures.items()},
        }
        print(json.dumps(report))
    return 0 if all(figure.holds is not False for figure in figures.values()) else 1
