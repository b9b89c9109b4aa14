"""A reduced grid of the FP8 stability study: drpo, grpo and pg in bf16, with FP8 rollouts only, and FP8 end to end.

Real trainer, real server, `UPDATES` optimizer updates a run, `STALENESS` on each rollout batch, `SEEDS` seeds; FP8 is
emulated without a GPU. What the study is: docs/results/fp8-stability.md.

End to end is blockwise training with the servers' formula of scales (`fp8.block_scales: float32`). With Transformer
Engine's default, powers of two, trainer and servers round the same weights to other numbers: `*_default_scales`.

* `mismatch_kl_*`: nats a token, geometric mean over the runs, with its interval of 95 %.
* `rollout_over_e2e`, `e2e_over_bf16` and so on: how many times the one KL is the other, over pairs of runs of the same
  loss and seed, with the interval of 95 %; above 1 where the order FP8 rollout only > FP8 end to end > bf16 held.
* `order_held`: 1 where both intervals are above 1, 0 where one is not.
* `collapse_share_LOSS`: share of its runs that collapsed, with Wilson's interval.
* `final_reward_LOSS`: mean over its runs, lowest and highest.
* `seconds_per_run`: of one core, without the start of a server.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from drpo_megatron.bench.report import Figure
from drpo_megatron.study import grid
from drpo_megatron.study.grid import Study
from drpo_megatron.study.records import Record
from drpo_megatron.study.statistics import Interval
from drpo_megatron.study.summary import Results

LOSSES = ("drpo", "grpo", "pg")
END_TO_END, DEFAULT_SCALES = "fp8-matched", "fp8-blockwise"
PRECISIONS = ("bf16", "fp8-rollout", END_TO_END, DEFAULT_SCALES)
STALENESS, SEEDS, UPDATES = 8, (0, 1), 96


def measure() -> dict[str, Figure]:
    """Raises RuntimeError when a run failed, and ConfigError for FP8 that this machine cannot do."""
    from drpo_megatron.config import check_config
    from drpo_megatron.models.recipes import ensure_model
    from drpo_megatron.study.pool import run_jobs

    jobs = grid.jobs_of(grid.main_grid(LOSSES, PRECISIONS, (STALENESS,)), SEEDS)
    with tempfile.TemporaryDirectory() as directory:
        study = Study(settings=(f"model.path={directory}/model",), updates=UPDATES)
        ensure_model(str(study.base.model.recipe), study.base.model.path)
        for job in jobs:
            check_config(study.config(job))
        records: list[Record] = []

        def keep(record: Record) -> None:
            records.append(record)
            print(f"{record.job.key}: {record.status} in {record.seconds} s {record.reason}", file=sys.stderr)

        run_jobs(study, jobs, Path(directory) / "runs", len(os.sched_getaffinity(0)), keep)
    return figures_of(records, UPDATES)


def figures_of(records: Sequence[Record], updates: int) -> dict[str, Figure]:
    """Raises RuntimeError for runs that failed."""
    results = Results(records, updates)
    if results.failed:
        raise RuntimeError("; ".join(f"{r.job.key} failed: {r.reason}" for r in results.failed))
    figures: dict[str, Figure] = {}
    names = {"bf16": "bf16", "fp8_rollout": "fp8-rollout", "fp8_e2e": END_TO_END}
    names["fp8_e2e_default_scales"] = DEFAULT_SCALES
    for name, precision in names.items():
        figures[f"mismatch_kl_{name}"] = _figure(results.mismatch(precision))
    ratios = {
        "rollout_over_e2e": results.mismatch_ratio("fp8-rollout", END_TO_END),
        "e2e_over_bf16": results.mismatch_ratio(END_TO_END, "bf16"),
    }
    figures |= {name: _figure(ratio) for name, ratio in ratios.items()}
    figures["rollout_over_e2e_default_scales"] = _figure(results.mismatch_ratio("fp8-rollout", DEFAULT_SCALES))
    held = float(all(figures[name].spread[0] > 1 for name in ratios))
    figures["order_held"] = Figure.of([held])
    for loss in LOSSES:
        cells = [cell for cell in results.by_cell if cell.loss == loss]
        figures[f"collapse_share_{loss}"] = _figure(results.collapse_share(cells))
        finals = [o.final for cell in cells for o in results.by_cell[cell].values()]
        figures[f"final_reward_{loss}"] = Figure(statistics.fmean(finals), (min(finals), max(finals)))
    figures["seconds_per_run"] = Figure.of([record.seconds for record in records])
    return figures


def _figure(interval: Interval | None) -> Figure:
    if interval is None:
        raise RuntimeError("a precision of the grid has no run with a finite mismatch")
    return Figure(interval.value, (interval.low, interval.high))
