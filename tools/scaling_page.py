"""Write the numbers of docs/scaling.md: every table between its markers comes from the plan's own code.

    python tools/scaling_page.py [--check]

With --check nothing is written, and the exit code is 1 when the page is not what the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import tables

from drpo_megatron.config import load_config
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.assumptions import Assumptions
from drpo_megatron.plan.devices import DEVICES
from drpo_megatron.plan.run_plan import Plan, make_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
CONFIGS = ROOT / "tests" / "data" / "hf_configs"

# Of 70B and 235B one of what `drpo plan --search` proposes with rollout.concurrency=4096; 671B keeps its recipe's.
CASES = {
    ("llama3-70b", 64): "parallel.virtual_pipeline=4 parallel.data=3 model.recompute=none rollout.server.count=2",
    ("qwen3-235b-a22b", 256): (
        "parallel.context=4 parallel.data=1 model.recompute=none rollout.server.count=8 "
        "rollout.server.tensor_parallel=16"
    ),
    ("deepseek-v3-671b", 512): "rollout.server.count=8",
}
CONCURRENCY = "rollout.concurrency=4096"
# Strong scaling of 671B: copies of the trainer, and servers beside them.
STRONG = ((512, 2, 8), (1024, 4, 16), (2048, 8, 32), (4096, 16, 64))
# The same with as many more prompts a step.
GROWING = ((512, 128), (4096, 1024))
# Published MFU of verl, and the layouts of as many GPUs that are compared with it.
PUBLISHED_MFU = (
    ("qwen3-30b-a3b", 8, "parallel.data=4 parallel.tensor=2 parallel.expert=8", "0.31-0.40 on 8-32 GPUs"),
    ("qwen3-30b-a3b", 32, "parallel.data=16 parallel.tensor=2 parallel.expert=8", "0.31-0.40 on 8-32 GPUs"),
    (
        "deepseek-v3-671b",
        96,
        "parallel.tensor=1 parallel.sequence_parallel=false parallel.pipeline=12 parallel.first_stage_layers=6 "
        "parallel.last_stage_layers=5 parallel.expert=8 parallel.data=8",
        "0.19 on 96 GPUs",
    ),
)
# Published seconds of a sync, of miles.
PUBLISHED_SYNC = (
    ("qwen3-30b-a3b", "2.2-2.7 (30B-A3B)"),
    ("qwen3-235b-a22b", "3.2-10.8 (235B)"),
    ("deepseek-v3-671b", "8.5-58 (744B)"),
)


def plan_of(recipe: str, *overrides: str) -> Plan:
    config = load_config(ROOT / "configs" / f"{recipe}.yaml", [word for one in overrides for word in one.split()])
    return make_plan(config, HFModelConfig.load(CONFIGS / recipe), DEVICES["h100"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cases() -> str:
    rows = []
    for (recipe, gpus), overrides in CASES.items():
        plan = plan_of(recipe, CONCURRENCY, overrides)
        if plan.devices != gpus or not plan.fits:
            raise ValueError(f"{recipe} takes {plan.devices} GPUs, not {gpus}, or does not fit: correct CASES")
        assert plan.generate is not None
        layout = plan.config.layout
        servers = plan.config.rollout.server
        rows.append(
            [
                f"{recipe}, {gpus}",
                f"{plan.ranks} + {plan.devices - plan.ranks}",
                f"TP {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, EP {layout.expert}, DP {layout.data}; "
                f"recompute {plan.config.model.recompute}; {servers.count} servers of {servers.tensor_parallel}",
                f"{plan.trainer_bytes / 1e9:.0f}",
                f"{plan.generate.total:.0f}",
                f"{plan.train.total:.0f}",
                f"{plan.sync.total:.1f}",
                f"{plan.step_seconds:.0f}",
                f"{plan.train.mfu(plan.ranks, plan.device):.2f}",
            ]
        )
    return table(
        [
            "recipe, H100",
            "trainer + servers",
            "layout",
            "GB a trainer rank",
            "generate s",
            "train s",
            "sync s",
            "step s",
            "MFU",
        ],
        rows,
    )


def parts() -> str:
    rows = []
    for (recipe, gpus), overrides in CASES.items():
        train = plan_of(recipe, CONCURRENCY, overrides).train
        spent = {name: getattr(train, name) for name in ("compute", "tensor", "expert", "bubble", "data")}
        spent["other"] = train.total - sum(spent.values())
        rows.append([f"{recipe}, {gpus}", *(f"{100 * part / train.total:.0f} %" for part in spent.values())])
    return table(
        ["share of train", "compute", "tensor collectives", "experts' all-to-all", "bubble", "gradients", "other"], rows
    )


_STEP_COLUMNS = [
    "H100",
    "prompts a step",
    "micro-batches",
    "generate s",
    "train s",
    "sync s",
    "step s",
    "MFU",
    "step, GPU hours",
]


def strong() -> str:
    rows = []
    for gpus, data, servers in STRONG:
        plan = plan_of("deepseek-v3-671b", CONCURRENCY, f"parallel.data={data} rollout.server.count={servers}")
        rows.append([str(gpus), *_step_cells(plan)])
    return table(
        _STEP_COLUMNS,
        rows,
    )


def growing() -> str:
    rows = []
    by_gpus = {gpus: (data, servers) for gpus, data, servers in STRONG}
    for gpus, prompts in GROWING:
        data, servers = by_gpus[gpus]
        plan = plan_of(
            "deepseek-v3-671b",
            "rollout.concurrency=32768",
            f"parallel.data={data} rollout.server.count={servers} rollout.prompts_per_step={prompts}",
        )
        rows.append([str(gpus), *_step_cells(plan)])
    return table(
        _STEP_COLUMNS,
        rows,
    )


def _step_cells(plan: Plan) -> list[str]:
    assert plan.generate is not None
    return [
        str(plan.workload.prompts),
        str(plan.train.micro_batches),
        f"{plan.generate.total:.0f}",
        f"{plan.train.total:.1f}",
        f"{plan.sync.total:.1f}",
        f"{plan.step_seconds:.0f}",
        f"{plan.train.mfu(plan.ranks, plan.device):.2f}",
        f"{plan.step_seconds * plan.devices / 3600:.0f}",
    ]


def published() -> str:
    rows = []
    for recipe, gpus, overrides, figure in PUBLISHED_MFU:
        plan = plan_of(recipe, overrides)
        if plan.ranks != gpus:
            raise ValueError(f"{recipe} trains on {plan.ranks} GPUs, not {gpus}: correct PUBLISHED_MFU")
        memory = f"{plan.trainer_bytes / 1e9:.0f}"
        rows.append([f"MFU, {recipe} on {gpus}", f"{plan.train.mfu(plan.ranks, plan.device):.2f}", memory, figure])
    for recipe, figure in PUBLISHED_SYNC:
        sync = plan_of(recipe).sync
        rows.append([f"sync seconds, {recipe}, {sync.nbytes / 1e9:.0f} GB", f"{sync.total:.1f}", "", figure])
    return table(["figure", "plan", "at GB a trainer rank", "published"], rows)


def assumptions() -> str:
    config = load_config(ROOT / "configs" / "llama3-70b.yaml")
    rows = [[f"`{name}`", f"{value:g}", text] for name, value, text in Assumptions.of(config).described()]
    rows = [row for row in rows if row[0] not in ("`prompt_tokens`", "`response_tokens`")]
    return table(["assumption", "value", "meaning"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "cases": cases,
    "parts": parts,
    "strong": strong,
    "growing": growing,
    "published": published,
    "assumptions": assumptions,
}


if __name__ == "__main__":
    tables.main(PAGE, TABLES, __doc__)
