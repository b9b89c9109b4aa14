"""The cells of the study: loss × precision × staleness, and the values of δ.

Between cells only those three change. Equal in all of them: the learning rate and the rest of the recipe, the
optimizer updates of a run, the samples of an update, and so the samples of a run. Staleness U means U updates on each
rollout batch, whose log-probs are the rollout's in all of them (2606.09821): the batch is U times larger and there are
U times fewer of them, so that a token is up to U − 1 updates old.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from drpo_megatron.config import ConfigError, RunConfig, load_config

RECIPE = Path(__file__).parents[2] / "configs" / "fp8-stability.yaml"

LOSSES: dict[str, dict[str, float]] = {
    "drpo": {"delta": 12.5},  # the paper's and its authors' released value: a mild brake, see the δ study
    "dppo_tv": {"delta": 0.15},  # the paper's for bf16; it takes 0.6 for end-to-end FP8
    "grpo": {"eps_low": 0.2, "eps_high": 0.28},  # DAPO's clip-higher
    "spo": {"eps": 0.2},
    "pg": {},
    "cispo": {"eps_high": 0.28},  # the paper states none: GRPO's upper clip
    "gspo": {"eps_low": 3e-4, "eps_high": 4e-4},
}
"""Each loss with the parameters of its source. They are the same in every precision: nothing is tuned."""

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
PRECISIONS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8-rollout": ("fp8.rollout=true",),
    **{f"fp8-{recipe}": ("fp8.rollout=true", f"fp8.recipe={recipe}") for recipe in RECIPES},
    "fp8-matched": ("fp8.rollout=true", "fp8.recipe=blockwise", "fp8.block_scales=float32"),
}
"""Name → settings. bf16 stands for the recipe's model.dtype, in training and rollouts; from the third on they are end
to end, and the last trains with the servers' own formula of scales."""

STALENESS = (1, 4, 8)
SEEDS = (0, 1, 2, 3, 4)
DELTAS = (0.05, 0.15, 0.6, 2.5, 12.5)
"""δ of drpo. δ → ∞ is pg."""
DELTA_PRECISION = "fp8-blockwise"


@dataclass(frozen=True, order=True)
class Cell:
    """What a run has in common with those of other seeds. `parameters`: the loss's, sorted by name."""

    loss: str
    parameters: tuple[tuple[str, float], ...]
    precision: str
    staleness: int

    @classmethod
    def of(cls, loss: str, parameters: dict[str, float], precision: str, staleness: int) -> Cell:
        return cls(loss, tuple(sorted(parameters.items())), precision, staleness)

    @property
    def method(self) -> str:
        """The loss with its parameters, as tables and file names call it: `drpo(delta=12.5)`, `pg`."""
        values = ",".join(f"{name}={value:g}" for name, value in self.parameters)
        return f"{self.loss}({values})" if values else self.loss

    @property
    def name(self) -> str:
        return f"{self.method}/{self.precision}/{self.staleness}"


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    cell: Cell
    seed: int

    @property
    def key(self) -> str:
        return f"{self.cell.name}/{self.seed}"


@dataclass(frozen=True)
class Study:
    """A configuration with the settings that hold for every run of it. `updates`: of a run; None takes the recipe's
    training.steps. Every staleness must divide it. `backend`: fp8.backend of the runs with FP8.
    """

    recipe: Path = RECIPE
    settings: tuple[str, ...] = ()
    backend: Literal["emulate", "transformer_engine"] = "emulate"
    updates: int | None = None

    def config(self, job: Job, extra: Sequence[str] = ()) -> RunConfig:
        """The configuration of a run, named by its key. Raises ConfigError for settings that do not exist, and for a
        staleness that does not divide the updates.
        """
        return load_config(self.recipe, [*self.settings, *self._of_job(job), *extra])

    @property
    def base(self) -> RunConfig:
        """The recipe with the study's settings; training.steps are the updates of a run."""
        updates = [] if self.updates is None else [f"training.steps={self.updates}"]
        return load_config(self.recipe, [*self.settings, *updates])

    def _of_job(self, job: Job) -> list[str]:
        base, cell = self.base, job.cell
        updates = base.training.steps
        if updates % cell.staleness:
            raise ConfigError([f"{updates} updates do not divide into batches of {cell.staleness}: choose a multiple"])
        return [
            f"name={''.join(c if c.isalnum() or c in '._-' else '-' for c in job.key)}",
            f"seed={job.seed}",
            f"algorithm.loss={cell.loss}",
            f"algorithm.loss_args={json.dumps(dict(cell.parameters))}",
            f"training.steps={updates // cell.staleness}",
            f"training.updates_per_batch={cell.staleness}",
            f"rollout.prompts_per_step={base.rollout.prompts_per_step * cell.staleness}",
            *((f"fp8.backend={self.backend}", *settings) if (settings := PRECISIONS[cell.precision]) else ()),
        ]

    @property
    def digest(self) -> str:
        """Names what all runs have in common: records with another one are of another study."""
        content: dict[str, Any] = {
            "recipe": yaml.safe_load(self.recipe.read_text()),
            "settings": self.settings,
            "backend": self.backend,
            "updates": self.updates,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def main_grid(
    losses: Sequence[str] = tuple(LOSSES),
    precisions: Sequence[str] = tuple(PRECISIONS),
    staleness: Sequence[int] = STALENESS,
) -> list[Cell]:
    return [
        Cell.of(loss, LOSSES[loss], precision, updates)
        for loss, precision, updates in itertools.product(losses, precisions, staleness)
    ]


def delta_grid(precision: str = DELTA_PRECISION, staleness: int = max(STALENESS)) -> list[Cell]:
    """drpo with each δ, and pg. Two of them are cells of the main grid too."""
    cells = [Cell.of("drpo", {"delta": delta}, precision, staleness) for delta in DELTAS]
    return [*cells, Cell.of("pg", {}, precision, staleness)]


def jobs_of(cells: Sequence[Cell], seeds: Sequence[int]) -> list[Job]:
    """Every cell once with each seed, in the order in which they are run.

    By the kind of server first, which takes longest to start. Then seeds outermost: what else the machine does falls on
    all cells alike, and a study that is stopped has whole seeds.
    """

    def order(cell: Cell) -> bool:
        return "fp8.rollout=true" in PRECISIONS[cell.precision]

    unique = sorted(dict.fromkeys(cells), key=order)
    return list(_seeds_outermost(unique, seeds, order))


def _seeds_outermost(cells: Sequence[Cell], seeds: Sequence[int], order: Any) -> Iterator[Job]:
    for _, same_server in itertools.groupby(cells, key=order):
        of_kind = list(same_server)
        for seed in seeds:
            yield from (Job(cell, seed) for cell in of_kind)
