"""Where the time of chosen steps goes: torch's profiler around each verb, and NVTX ranges for NVIDIA's own tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from drpo_megatron import platform

TOP = 10


class StepProfiler:
    """`with profiler(verb): ...` around a verb, on every rank. In the steps of `steps` it writes into `directory`

    * `step_000010_rank_0_train.json`, a Chrome trace of the verb (chrome://tracing, Perfetto); one that runs again in
      the step has a number behind it;
    * `step_000010_rank_0.txt`, the summary of the verbs so far and of the operations with most time of their own.

    In other steps it only names the verb to NVTX, where there is a GPU. NVTX and kernels: not run, see
    docs/gpu-checklist.md.
    """

    def __init__(self, steps: Container[int], directory: Path, rank: int) -> None:
        self._steps, self._directory, self._rank = steps, directory, rank
        self._step: int | None = None

    def begin(self, step: int) -> None:
        """What follows belongs to `step`."""
        self._step = step if step in self._steps else None
        self._verbs: list[tuple[str, float, float]] = []
        self._operations: dict[str, Counter[str]] = {"CPU": Counter(), "GPU": Counter()}
        self._calls: Counter[str] = Counter()

    @contextmanager
    def __call__(self, verb: str) -> Iterator[None]:
        with torch.cuda.nvtx.range(verb) if platform.has_cuda() else nullcontext():
            if self._step is None:
                yield
                return
            with profile() as profiled, record_function(verb):
                yield
        self._write(verb, profiled)

    def _write(self, verb: str, profiled: profile) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        stem = f"step_{self._step:06d}_rank_{self._rank}"
        times = sum(name == verb for name, _, _ in self._verbs)
        profiled.export_chrome_trace(str(self._directory / f"{stem}_{verb}{f'_{times + 1}' if times else ''}.json"))
        for event in profiled.key_averages():
            # The verb's own range: what is left of it is Python, and waiting for others.
            if event.key == verb:
                if event.cpu_time_total:
                    self._verbs.append((verb, event.cpu_time_total / 1e6, event.self_cpu_time_total / 1e6))
                continue
            self._operations["CPU"][event.key] += event.self_cpu_time_total
            self._operations["GPU"][event.key] += event.self_device_time_total
            self._calls[event.key] += event.count
        (self._directory / f"{stem}.txt").write_text(self._summary())

    def _summary(self) -> str:
        lines = [f"step {self._step}, rank {self._rank}", "", "verb                 seconds  outside operations"]
        for verb, seconds, rest in sorted(self._verbs, key=lambda row: -row[1]):
            lines.append(f"{verb:<18} {seconds:>9.3f}  {rest:>18.3f}")
        for device, operations in self._operations.items():
            total = sum(operations.values())
            if not total:
                continue
            lines += ["", f"operations on the {device}: the {TOP} with most time of their own"]
            lines += ["    self ms   share    calls  operation"]
            for name, microseconds in operations.most_common(TOP):
                share = microseconds / total
                lines.append(f"{microseconds / 1e3:>11.1f}  {share:>6.1%}  {self._calls[name]:>7}  {name}")
        return "\n".join(lines) + "\n"
