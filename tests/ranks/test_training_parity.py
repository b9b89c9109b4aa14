"""Updates in every kind of layout equal those of one process, and those equal transformers' in float64.

The rows are those of the parity table that are marked as fast: each axis once. All rows are in `tests/slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.support.launch import run_ranks
from tests.support.parity import (
    FP32_BOUND,
    Case,
    Updates,
    check_biases,
    check_case,
    check_reference,
    configuration,
    write_models,
)
from tests.support.parity_table import (
    ALONE,
    BF16,
    BIAS_RATE,
    BIASES,
    CASES,
    FAST_CASES,
    MEASURED,
    PAGE,
    REPLAY,
    Launches,
    label,
    row,
)

pytestmark = pytest.mark.distributed

UPDATES = 2


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    root = tmp_path_factory.mktemp("models")
    models = list(dict.fromkeys(case.model for case in FAST_CASES))
    return Launches(root, write_models(root, models, UPDATES), FAST_CASES)


@pytest.mark.parametrize("case", FAST_CASES, ids=label)
def test_equals_one_process(case: Case, launches: Launches) -> None:
    check_case(case, launches.outcome(case), launches.expected(case))


def test_one_process_equals_transformers(launches: Launches) -> None:
    compared = [case for case in launches.references if case.settings.get("model.dtype") != BF16["model.dtype"]]
    assert len(compared) >= 6
    for case in compared:
        check_reference(case, launches.outcome(case), launches.by_transformers(case))
        if BIASES.items() <= case.settings.items():
            check_biases(launches.root / case.model, launches.updates[case.model], BIAS_RATE, launches.outcome(case))


def test_every_parameter_moves(launches: Launches) -> None:
    """Otherwise equal parameters would say nothing."""
    moves = launches.moves(experts=False)
    assert len(moves) == 4 and all(move > 10 * FP32_BOUND for move in moves.values())


def test_every_axis_has_a_fast_row() -> None:
    axes = {axis for case in FAST_CASES for axis in case.parallel}
    settings = {setting for case in FAST_CASES for setting in case.settings}
    assert axes >= {"tensor", "sequence_parallel", "pipeline", "virtual_pipeline", "context", "data"}
    assert axes >= {"expert", "expert_tensor"}
    assert settings >= {setting for case in CASES for setting in case.settings} - {
        # One process has them.
        "optimizer.distributed",
        # Its own test has it: tests/ranks/test_fused_loss.py.
        "algorithm.projection.backend",
    }
    assert {"qwen2", "qwen3", "qwen3_moe", "deepseek_v3"} == {case.model for case in FAST_CASES}


def test_page_has_the_rows_of_the_table() -> None:
    """What `make parity` wrote; a row that was changed since is not measured."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    recorded = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(recorded) == len(CASES), "make parity"
    for cells, case in zip(recorded, CASES, strict=True):
        assert cells == row(case, cells[MEASURED]), "make parity"
        for cell, bound in zip(cells[MEASURED], case.bounds, strict=True):
            assert float(cell) <= bound, (label(case), cell)


def replay_goes_wrong(root: Path, updates: Updates) -> dict[str, Any]:
    """Every token follows the experts of the one before it, and the comparison is not told."""
    from drpo_megatron.models.routing import _RolloutTopK
    from drpo_megatron.platform import distributed
    from drpo_megatron.training.step import Policy

    choose = _RolloutTopK.get_replay_topk

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.target_NK = self.target_NK.roll(1, 0)
        return choose(self, *args, **kwargs)

    config = configuration(Case("shifted", "qwen3_moe", {}, REPLAY | ALONE), root / "qwen3_moe")
    distributed.initialize(config.layout, seed=0)
    with mock.patch.object(_RolloutTopK, "get_replay_topk", shifted):
        result = Policy(config).update(updates[0], version=0)
    distributed.shutdown()
    return vars(result.routing)


def test_a_replay_that_goes_wrong_is_counted(launches: Launches) -> None:
    (routing,) = run_ranks(1, replay_goes_wrong, launches.root, launches.updates["qwen3_moe"])
    assert routing["disagreements"] > 0.5 * routing["compared"] > 0
