"""A plan as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from drpo_megatron.plan.advice import as_overrides
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.parameters import KINDS
from drpo_megatron.plan.run_plan import Plan
from drpo_megatron.plan.search import Candidate

_WIDTH = 120


def as_json(plan: Plan, verdicts: Sequence[str]) -> dict[str, Any]:
    """Bytes, seconds and FLOPs, unrounded."""
    return {
        "name": plan.config.name,
        "device": plan.device.name,
        "devices": plan.devices,
        "trainer_ranks": plan.ranks,
        "parameters": plan.parameters,
        "stages": [
            {
                "layers": len(stage.stage.layers),
                "parameters": {kind: stage.parameters[kind] for kind in KINDS},
                "bytes": stage.by_kind(),
            }
            for stage in plan.stages
        ],
        "trainer_bytes": plan.trainer_bytes,
        "server": {
            "weights": plan.server.weights,
            "kv_bytes_per_token": plan.server.kv_token,
            "available": plan.server.available,
            "kv_tokens": plan.server.kv_tokens,
            "running": plan.generate.running if plan.generate else 0,
        },
        "seconds": {
            "generate": plan.generate.total if plan.generate else None,
            "train": plan.train.total,
            "sync": plan.sync.total,
            "save": plan.save[1],
            "step": plan.step_seconds if plan.generate else None,
        },
        "train": {
            "micro_batches": plan.train.micro_batches,
            "flops": plan.train.flops,
            "mfu": plan.train.mfu(plan.ranks, plan.device),
            **{part: getattr(plan.train, part) for part in ("compute", "tensor", "expert", "bubble", "data")},
        },
        "sync_bytes": plan.sync.nbytes,
        "save_bytes": plan.save[0],
        "assumptions": {name: value for name, value, _ in plan.assumptions.described()},
        "fits": plan.fits,
        "verdicts": list(verdicts),
    }


def proposals_as_json(proposals: Sequence[Candidate], assumed: Assumptions) -> dict[str, Any]:
    """Of a search, best first."""
    return {
        "proposals": [
            {
                "overrides": as_overrides(one.changes),
                "step_s": one.plan.step_seconds,
                "train_s": one.plan.train.total,
                "generate_s": one.plan.generate.total if one.plan.generate else None,
                "mfu": one.plan.train.mfu(one.plan.ranks, one.plan.device),
                "trainer_ranks": one.plan.ranks,
                "devices": one.plan.devices,
                "trainer_bytes": one.plan.trainer_bytes,
            }
            for one in proposals
        ],
        "assumptions": {name: value for name, value, _ in assumed.described()},
    }


def as_text(plan: Plan, verdicts: Sequence[str]) -> str:
    """Memory by kind for each different stage, seconds by verb, and every assumption."""
    config, device = plan.config, plan.device
    lines = [
        f"{config.name}: {plan.parameters / 1e9:.2f} billion parameters; {plan.ranks} trainer ranks, "
        f"{plan.devices} {device.name} in all",
        "",
        _render(_memory_table(plan)),
        _render(_seconds_table(plan)),
        *_assumed(plan.assumptions),
        "",
        *verdicts,
    ]
    return "\n".join(lines)


def _assumed(assumptions: Assumptions) -> list[str]:
    return [
        "assumed (--assume NAME=VALUE):",
        *(f"  {name:24}{value:>9g}  {text}" for name, value, text in assumptions.described()),
    ]


def proposals_text(proposals: Sequence[Candidate], gpus: int, assumed: Assumptions) -> str:
    """The table of a search, the overrides that make each of its layouts, and every assumption."""
    table = Table(
        "", "step s", "generate", "train", "MFU", "GB", "trainer + servers", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for number, one in enumerate(proposals, 1):
        plan = one.plan
        table.add_row(
            str(number),
            f"{plan.step_seconds:.1f}",
            f"{plan.generate.total:.1f}" if plan.generate else "-",
            f"{plan.train.total:.1f}",
            f"{plan.train.mfu(plan.ranks, plan.device):.2f}",
            f"{plan.trainer_bytes / 1e9:.1f}",
            f"{plan.ranks} + {plan.devices - plan.ranks}" if not plan.colocated else f"{plan.ranks}, shared",
        )
    overrides = [f"{number}  {as_overrides(one.changes)}" for number, one in enumerate(proposals, 1)]
    title = f"the best layouts for {gpus} GPUs, by predicted seconds of a step:"
    return "\n".join([title, _render(table), *overrides, "", *_assumed(assumed)])


def _memory_table(plan: Plan) -> Table:
    """One column for each stage that differs from the one before it."""
    columns: list[tuple[str, Any]] = []
    for memory in plan.stages:
        kinds = memory.by_kind() | {kind: memory.parameters[kind] for kind in KINDS}
        if columns and columns[-1][1] == kinds:
            columns[-1] = (f"{columns[-1][0].split('-')[0]}-{memory.stage.index}", kinds)
        else:
            columns.append((f"stage {memory.stage.index}", kinds))
    if len(columns) > 4:
        # The first, the last, and the fullest between them.
        middle = max(columns[1:-1], key=lambda column: column[1]["total"])
        columns = [columns[0], middle, columns[-1]]
    table = Table("GB on a trainer rank", box=box.SIMPLE_HEAD, pad_edge=False)
    for title, _ in columns:
        table.add_column(title, justify="right")
    for kind in plan.stages[0].by_kind():
        table.add_row(
            kind, *(f"{kinds[kind] / 1e9:.2f}" for _, kinds in columns), style="bold" if kind == "total" else ""
        )
    table.add_section()
    for kind in KINDS:
        if any(kinds[kind] for _, kinds in columns):
            table.add_row(f"{kind}, million parameters", *(f"{kinds[kind] / 1e6:,.1f}" for _, kinds in columns))
    return table


def _seconds_table(plan: Plan) -> Table:
    train, generate, workload = plan.train, plan.generate, plan.workload
    table = Table("verb", "seconds", "of which", box=box.SIMPLE_HEAD, pad_edge=False)
    if generate:
        text = (
            f"prefill {generate.prefill:.1f}; {generate.running} sequences a server at "
            f"{1000 * generate.step:.1f} ms a token"
        )
        table.add_row("generate", f"{generate.total:.1f}", text)
    else:
        table.add_row("generate", "-", "a server does not fit")
    table.add_row(
        "train",
        f"{train.total:.1f}",
        f"compute {train.compute:.1f}, tensor {train.tensor:.1f}, experts {train.expert:.1f}, bubble "
        f"{train.bubble:.1f}, data {train.data:.1f}; MFU {train.mfu(plan.ranks, plan.device):.2f}",
    )
    table.add_row("sync", f"{plan.sync.total:.1f}", f"{plan.sync.nbytes / 1e9:.1f} GB in {plan.sync.buckets} buckets")
    every = plan.config.save.every
    text = f"{plan.save[0] / 1e9:.1f} GB a checkpoint, " + (f"every {every} steps" if every else "none (save.every)")
    table.add_row("save", f"{plan.save[1]:.1f}", text)
    table.add_row(
        "step",
        f"{plan.step_seconds:.1f}" if generate else "-",
        f"{workload.sequences} sequences of {workload.length:.0f} tokens, {train.flops:.2e} FLOPs in "
        f"{workload.updates} updates of {train.micro_batches} micro-batches",
    )
    return table


def _render(table: Table) -> str:
    out = StringIO()
    Console(file=out, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip()) + "\n"
