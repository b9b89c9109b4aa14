"""Train a small task by every loss, in every precision, with tokens of growing age, and record what became of it.

    python tools/fp8_stability.py                       the whole grid and the δ study, over all cores
    python tools/fp8_stability.py --losses drpo grpo --precisions bf16 fp8-blockwise --staleness 8 --seeds 0 1
    python tools/fp8_stability.py --report-only --html fp8-stability.html

A run that has a record in OUT/NAME/ is not made again, whatever ended the study before. Definitions and
statistics: docs/results/fp8-stability.md. Needs no GPU; with one, --backend transformer_engine.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from drpo_megatron.config import ConfigError, check_config
from drpo_megatron.rollout.errors import ServerStartError
from drpo_megatron.study import grid
from drpo_megatron.study.grid import Job, Study
from drpo_megatron.study.page import write_page
from drpo_megatron.study.plots import draw_all
from drpo_megatron.study.pool import WorkersFailed, run_jobs
from drpo_megatron.study.records import Record, Records
from drpo_megatron.study.report import Made, write_report

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RESULTS_NAME = "fp8-stability"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=grid.RECIPE)
    parser.add_argument("--losses", nargs="*", default=list(grid.LOSSES), choices=grid.LOSSES, metavar="LOSS")
    parser.add_argument(
        "--precisions", nargs="*", default=list(grid.PRECISIONS), choices=grid.PRECISIONS, metavar="NAME"
    )
    parser.add_argument("--staleness", nargs="*", type=int, default=list(grid.STALENESS), metavar="UPDATES")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(grid.SEEDS), metavar="SEED")
    parser.add_argument("--no-deltas", action="store_true", help="leave the δ study out")
    parser.add_argument("--updates", type=int, help="optimizer updates of a run; default: training.steps of the recipe")
    parser.add_argument("--backend", default="emulate", choices=("emulate", "transformer_engine"), help="of FP8")
    parser.add_argument("--set", nargs="*", default=[], dest="settings", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, one a core")
    parser.add_argument("--out", type=Path, default=RESULTS, help="gets NAME.md and NAME/")
    parser.add_argument("--name", default=RESULTS_NAME, help="of the page and of the folder of its records")
    parser.add_argument("--title", default="FP8 stability", help="of the page")
    parser.add_argument("--note", default="", metavar="TEXT", help="for the page: a sentence on the machine")
    parser.add_argument(
        "--beside", nargs="*", default=[], metavar="NAME", help="of other studies in --out to compare with"
    )
    parser.add_argument("--scratch", type=Path, default=Path("runs/fp8-stability"), help="logs, and runs that go on")
    parser.add_argument("--retry-failed", action="store_true", help="make runs again that failed")
    parser.add_argument("--report-only", action="store_true", help="make no runs")
    parser.add_argument("--html", type=Path, metavar="PATH", help="write one HTML file too; default: in --out's folder")
    return parser.parse_args()


def check(study: Study, jobs: list[Job]) -> None:
    """Refuse what cannot run before anything is started. Raises ConfigError."""
    from drpo_megatron.models.recipes import ensure_model

    config = study.config(jobs[0])
    if config.model.recipe:
        ensure_model(config.model.recipe, config.model.path)
    for cell in dict.fromkeys(job.cell for job in jobs):
        check_config(study.config(Job(cell, jobs[0].seed)))


def make_runs(study: Study, jobs: list[Job], records: Records, parsed: argparse.Namespace) -> None:
    with records.held():
        missing = records.missing(jobs, study.digest, parsed.retry_failed)
        print(f"{len(jobs)} runs, {len(missing)} of them to be made by {parsed.workers} workers", flush=True)
        if not missing:
            return
        check(study, missing)
        start, made = time.monotonic(), 0

        def keep(record: Record) -> None:
            nonlocal made
            records.add(record)
            made += 1
            passed = time.monotonic() - start
            left = passed / made * (len(missing) - made)
            print(
                f"{made}/{len(missing)}  {record.job.key}  {record.status} in {record.seconds:.0f} s  "
                f"{record.reason}  about {left / 60:.0f} min left",
                flush=True,
            )

        run_jobs(study, missing, parsed.scratch, parsed.workers, keep)


def command_of(parsed: argparse.Namespace, found: list[Record]) -> str:
    """What makes these runs, for the page: of the grid, what is not all of it."""
    command = ["python", "tools/fp8_stability.py"]
    command += ["--name", parsed.name] if parsed.name != RESULTS_NAME else []
    command += ["--backend", parsed.backend] if parsed.backend != "emulate" else []
    whole: dict[str, tuple[Sequence[object], set[object]]] = {
        "--losses": (list(grid.LOSSES), {record.loss for record in found}),
        "--precisions": (list(grid.PRECISIONS), {record.precision for record in found}),
        "--staleness": (grid.STALENESS, {record.staleness for record in found}),
        "--seeds": (grid.SEEDS, {record.seed for record in found}),
    }
    for option, (every, made) in whole.items():
        command += [option, *(str(value) for value in every if value in made)] if made != set(every) else []
    only_deltas = set(grid.delta_grid()) - set(grid.main_grid())
    command += ["--no-deltas"] if only_deltas.isdisjoint(record.cell for record in found) else []
    command += ["--updates", str(parsed.updates)] if parsed.updates else []
    command += ["--set", *parsed.settings] if parsed.settings else []
    return shlex.join(command)


def main() -> int:
    parsed = parse_arguments()
    study = Study(parsed.config, tuple(parsed.settings), parsed.backend, parsed.updates)
    cells = grid.main_grid(parsed.losses, parsed.precisions, parsed.staleness)
    if not parsed.no_deltas:
        cells += grid.delta_grid()
    records = Records(parsed.out / parsed.name)
    try:
        base = study.base
        if not parsed.report_only:
            make_runs(study, grid.jobs_of(cells, parsed.seeds), records, parsed)
        found = list(records)
    except ConfigError as error:
        print(f"fp8_stability: {error}", file=sys.stderr)
        return 2
    except (ServerStartError, WorkersFailed) as error:
        print(f"fp8_stability: stopped, and goes on when it is called again: {error}", file=sys.stderr)
        return 1
    if not found:
        print("fp8_stability: there are no runs to report on", file=sys.stderr)
        return 2
    hours = sum(record.seconds for record in found) / 3600
    samples = base.rollout.prompts_per_step * base.rollout.samples_per_prompt
    pictures = draw_all(found, records.directory)
    made = Made(
        base.training.steps,
        samples,
        hours,
        parsed.backend,
        parsed.note,
        parsed.title,
        study.settings,
        command_of(parsed, found),
    )
    beside = {name: list(Records(parsed.out / name)) for name in parsed.beside}
    write_report(parsed.out / f"{parsed.name}.md", found, made, beside)
    write_page(parsed.html or records.directory / f"{parsed.name}.html", found, base.training.steps, pictures)
    return 1 if any(record.status == "failed" for record in found) else 0


if __name__ == "__main__":
    sys.exit(main())
