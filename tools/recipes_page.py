"""Write the tables of docs/recipes.md: every recipe by its own file, and what the plan says of those for GPUs.

    python tools/recipes_page.py [--check]

With --check nothing is written, and the exit code is 1 when the page is not what recipes and plan say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import tables

from drpo_megatron.config import RunConfig, load_config
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.plan.devices import DEVICES
from drpo_megatron.plan.run_plan import make_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
MODELS = ROOT / "tests" / "data" / "hf_configs"  # config.json is all that a plan reads
DEVICE = DEVICES["h100"]


def purpose(recipe: Path) -> str:
    """The first sentence of the comment that the file begins with."""
    lines = recipe.read_text().splitlines()
    comment = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"(?<=\.) ", text)[0]


def layout(config: RunConfig) -> str:
    """The sizes above 1, or one rank."""
    axes = {"tensor": "TP", "pipeline": "PP", "context": "CP", "expert": "EP", "data": "DP"}
    sizes = [f"{short} {n}" for axis, short in axes.items() if (n := getattr(config.parallel, axis)) > 1]
    return ", ".join(sizes) or "one rank"


def loss(config: RunConfig) -> str:
    args = ", ".join(f"{name} {value:g}" for name, value in config.algorithm.loss_args.items())
    return f"{config.algorithm.loss}, {args}" if args else config.algorithm.loss


def for_gpus(config: RunConfig) -> bool:
    """The others make their model, and run without a GPU."""
    return config.model.recipe is None


def small() -> str:
    rows = []
    for recipe in RECIPES:
        config = load_config(recipe)
        if not for_gpus(config):
            batch = f"{config.rollout.prompts_per_step} × {config.rollout.samples_per_prompt}"
            model = f"`{config.model.recipe}`, {config.model.dtype}"
            steps = str(config.training.steps)
            rows.append([link(recipe), purpose(recipe), model, layout(config), loss(config), batch, steps])
    return table(["recipe", "what it is", "model", "trainer", "loss", "prompts × samples", "steps"], rows)


def large() -> str:
    rows = []
    for recipe in RECIPES:
        config = load_config(recipe)
        if for_gpus(config):
            servers = config.rollout.server
            longest = config.data.max_prompt_tokens + config.rollout.sampling.max_new_tokens
            batch = f"{config.rollout.prompts_per_step} × {config.rollout.samples_per_prompt}"
            served = f"{servers.count} of {servers.tensor_parallel}"
            rows.append([link(recipe), purpose(recipe), layout(config), served, loss(config), batch, str(longest)])
    heading = ["recipe", "what it is", "trainer", "servers", "loss", "prompts × samples", "longest sequence"]
    return table(heading, rows)


def plans() -> str:
    rows = []
    for recipe in RECIPES:
        config = load_config(recipe)
        if not for_gpus(config):
            continue
        hf = HFModelConfig.load(MODELS / recipe.stem)
        plan = make_plan(config, hf, DEVICE)
        generate = f"{plan.generate.total:.0f}" if plan.generate else "does not fit"
        rows.append(
            [
                recipe.stem,
                f"{plan.parameters / 1e9:.0f}",
                f"{plan.ranks} + {plan.devices - plan.ranks}",
                f"{plan.trainer_bytes / 1e9:.0f} of {DEVICE.memory / 1e9:.0f}",
                generate,
                f"{plan.train.total:.0f}",
                f"{plan.sync.total:.1f}",
                f"{plan.step_seconds:.0f}" if plan.generate else "",
                f"{plan.train.mfu(plan.ranks, DEVICE):.2f}",
            ]
        )
    heading = [
        "recipe",
        "billion parameters",
        f"trainer + servers, {DEVICE.name}",
        "GB a trainer rank",
        "generate s",
        "train s",
        "sync s",
        "step s",
        "MFU",
    ]
    return table(heading, rows)


def link(recipe: Path) -> str:
    return f"[{recipe.stem}](../configs/{recipe.name})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"small": small, "large": large, "plans": plans}


if __name__ == "__main__":
    tables.main(PAGE, TABLES, __doc__)
