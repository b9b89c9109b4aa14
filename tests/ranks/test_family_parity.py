"""Every family of the registry equals transformers on awkward and on random architectures: logits, gradients, and
weights after import and export, to the bit.

The cases write themselves from `models.families.FAMILIES` and from the keys that transformers' configuration has. One
launch runs all of them in all layouts of its number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo_megatron.models.families import FAMILIES
from drpo_megatron.models.hf_config import HFModelConfig, check_layout
from drpo_megatron.platform.layout import ParallelLayout
from tests.ranks.test_model_parity import hf_tensors, pipeline_logits
from tests.ranks.test_moe_parity import batch_seeds, hf_gradients, transformers_results
from tests.support import tiny_models
from tests.support.launch import run_ranks
from tests.support.layouts import many_layouts

pytestmark = pytest.mark.distributed

LOGIT_BOUND = 1e-4
GRADIENT_BOUND = 1e-3
SP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[int, dict[str, ParallelLayout]] = {
    2: {
        "tp1": ParallelLayout(data=2),
        "tp2": ParallelLayout(tensor=2),
        "tp2sp": ParallelLayout(**SP2),
        "pp2": ParallelLayout(pipeline=2),
        "pp2uneven": ParallelLayout(pipeline=2, first_stage_layers=1),
        "ep2": ParallelLayout(data=2, expert=2),
    },
    4: {
        "tp2sp-pp2": ParallelLayout(**SP2, pipeline=2),
        "dp2-tp2sp": ParallelLayout(**SP2, data=2),
        "dp2-pp2-ep2": ParallelLayout(pipeline=2, data=2, expert=2),
        "dp2-tp2sp-ep4": ParallelLayout(**SP2, data=2, expert=4),
        "tp2sp-pp2-ep2": ParallelLayout(**SP2, pipeline=2, expert=2),
    },
}


@dataclass(frozen=True)
class Case:
    """`changes` are over the family's tiny configuration. `gradients`: they are compared as well."""

    family: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    gradients: bool = False

    @property
    def directory(self) -> str:
        return f"{self.family} {self.name}"

    def __str__(self) -> str:
        return f"{self.directory}: {dict(self.changes)}"


def awkward_cases(family: str) -> list[Case]:
    """One for each rotary embedding of the family. They differ in key-value heads, in head width, in whether the output
    projection is the embedding, and have vocabularies that no number of ranks divides.
    """
    cases = []
    for number, kind in enumerate(FAMILIES[family].rope_types):
        changes: dict[str, Any] = {
            "rope_parameters": tiny_models.rope(kind),
            "tie_word_embeddings": number % 2 == 0,
            "vocab_size": (521, 523, 541)[number],
        }
        if FAMILIES[family].mla:
            changes["q_lora_rank"] = (None, 12)[number]
        else:
            # All query heads share one key-value head; each has its own; two share one.
            changes["num_key_value_heads"] = (1, 4, 2)[number]
            # Heads together narrower and wider than the hidden states of 64.
            changes["head_dim"] = (8, 40, 12)[number]
        cases.append(Case(family, kind, changes, gradients=number == 1))
    return cases


def random_cases(family: str, seeds: range) -> list[Case]:
    return [
        Case(family, f"seed {seed}", tiny_models.random_changes(family, seed), gradients=seed == seeds[0])
        for seed in seeds
    ]


def _fits(hf: HFModelConfig, layout: ParallelLayout) -> bool:
    try:
        check_layout(hf, layout)
    except ValueError:
        return False
    return True


def write(root: Path, case: Case) -> None:
    """The model, and what transformers computes with it."""
    model = tiny_models.write(case.family, root / case.directory, **case.changes)
    logits, gradients = transformers_results(model)
    torch.save((logits, gradients), root / case.directory / "expected.pt")


def _check(root: Path, case: Case, layout: ParallelLayout) -> dict[str, float] | None:
    """Largest errors; None where the model does not fit the layout. Gradient errors are on rank 0."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps

    from drpo_megatron.models.builder import build_model
    from drpo_megatron.weights.exporter import iter_hf_tensors
    from drpo_megatron.weights.importer import load_hf

    source = root / case.directory
    hf = HFModelConfig.load(source)
    if not _fits(hf, layout):
        return None
    expected_logits, expected_gradients = torch.load(source / "expected.pt")
    chunks = build_model(hf, layout, params_dtype=torch.float32, spec_backend="local")
    load_hf(chunks, source, hf)
    exported = {name: t.clone() for bucket in iter_hf_tensors(chunks, hf) for name, t in bucket}
    if dist.get_rank() == 0:
        written = hf_tensors(source)
        assert exported.keys() == written.keys()
        changed = [name for name, tensor in written.items() if not torch.equal(exported[name], tensor)]
        assert not changed, f"{changed} changed between import and export"
    errors = {}
    seed = batch_seeds(layout, ps.get_data_parallel_rank())[0]
    logits = pipeline_logits(chunks, hf, layout, seed=seed)
    if logits is not None:
        assert expected_logits[seed].std() > 0.3
        assert logits.shape == expected_logits[seed].shape
        errors["logits"] = float((torch.from_numpy(logits) - expected_logits[seed]).abs().max())
    if case.gradients:
        actual = hf_gradients(chunks, hf, layout)
        seeds = [s for rank in range(layout.data) for s in batch_seeds(layout, rank)]
        if dist.get_rank() == 0:
            errors["gradients"] = _gradient_error(actual, [expected_gradients[s] for s in seeds])
    return errors


def _gradient_error(actual: Mapping[str, Any], expected: list[dict[str, torch.Tensor]]) -> float:
    """The worst over parameters, each by its largest gradient."""
    outside = {name for name in actual if name == "lm_head.weight" or name.endswith("e_score_correction_bias")}
    assert actual.keys() - outside == expected[0].keys()
    worst = 0.0
    for name in expected[0]:
        total = sum(gradients[name] for gradients in expected)
        difference, scale = float((torch.from_numpy(actual[name]) - total).abs().max()), float(total.abs().max())
        # No token may have gone to an expert.
        assert scale > 0 or ".experts." in name, f"{name} has no gradient in the reference"
        worst = max(worst, difference / scale if scale else difference)
    return worst


def _run(root: Path, cases: list[Case], layouts: dict[str, ParallelLayout]) -> dict[str, dict[str, float] | None]:
    from drpo_megatron.platform.distributed import change_layout, initialize, shutdown

    answers = {}
    for number, (key, layout) in enumerate(layouts.items()):
        if number:
            change_layout(layout, timeout_s=60)
        else:
            initialize(layout, timeout_s=60, seed=1)
        for case in cases:
            try:
                answers[f"{key}, {case.directory}"] = _check(root, case, layout)
            except Exception as error:
                error.add_note(f"in layout {key}: {case}")
                raise
    shutdown()
    return answers


def compare(root: Path, cases: list[Case], world: int) -> None:
    for case in cases:
        write(root, case)
    layouts = LAYOUTS[world]
    ranks = run_ranks(world, _run, root, cases, layouts, timeout_s=1200)
    ran: dict[str, set[str]] = {case.directory: set() for case in cases}
    wrong = []
    for case in cases:
        for key in layouts:
            answers = [rank[f"{key}, {case.directory}"] for rank in ranks]
            if answers[0] is None:
                continue
            ran[case.directory].add(key)
            errors = {name: max(a.get(name, 0.0) for a in answers) for name in ("logits", "gradients")}
            assert any("logits" in answer for answer in answers)
            assert ("gradients" in answers[0]) is case.gradients
            # Not "above": a result that is not a number is wrong too.
            if not (errors["logits"] < LOGIT_BOUND and errors["gradients"] < GRADIENT_BOUND):
                wrong.append(f"{key}, {case}: {errors}")
    assert not wrong, "\n".join(wrong)
    if world == 2:
        _were_not_left_out(root, cases, ran)
    else:
        # A single key-value head or three layers fit few layouts of four ranks.
        assert sum(map(bool, ran.values())) > len(cases) / 2


def _were_not_left_out(root: Path, cases: list[Case], ran: dict[str, set[str]]) -> None:
    """Which layouts fit is known without `check_layout`."""
    for case in cases:
        hf = HFModelConfig.load(root / case.directory)
        expected = {"tp1"}
        if hf.num_kv_heads % 2 == 0:
            expected |= {"tp2sp"} | (set() if hf.moe or hf.mla else {"tp2"})
        if hf.num_layers % 2 == 0:
            expected |= {"pp2"}
        if hf.moe:
            expected |= {"ep2"}
        assert expected == ran[case.directory] - {"pp2uneven"}, case
        assert {"pp2", "pp2uneven"} & ran[case.directory], case


def test_every_family(tmp_path: Path) -> None:
    compare(tmp_path, [case for f in FAMILIES for case in [*awkward_cases(f), *random_cases(f, range(2))]], 2)


@many_layouts
@pytest.mark.parametrize("world", [2, 4])
def test_many_random_architectures(world: int, tmp_path: Path) -> None:
    compare(tmp_path, [case for f in FAMILIES for case in random_cases(f, range(2, 22))], world)
