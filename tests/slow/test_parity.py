"""Every row of the parity table, three updates each: docs/results/parity.md is written by this test.

`DRPO_WRITE_RESULTS=1` writes the page; that it has the rows of the table is a test of `tests/ranks`.
"""

from __future__ import annotations

import os

import pytest

from tests.support.parity import (
    FP32_BOUND,
    MODELS,
    UPDATES,
    Case,
    check_biases,
    check_case,
    check_reference,
    write_models,
)
from tests.support.parity_table import (
    BIAS_RATE,
    BIASES,
    CASES,
    EXACT,
    PAGE,
    PAGE_HEAD,
    Launches,
    label,
    row,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    root = tmp_path_factory.mktemp("models")
    return Launches(root, write_models(root, list(MODELS), UPDATES), CASES)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_equals_the_reference(case: Case, launches: Launches) -> None:
    check_case(case, launches.outcome(case), launches.expected(case))


@pytest.mark.parametrize("case", [c for c in CASES if c.bounds == EXACT], ids=label)
def test_repeats_to_the_bit(case: Case, launches: Launches) -> None:
    assert launches.outcome(case).equals(launches.expected(case))


@pytest.mark.parametrize("model", MODELS)
def test_one_process_equals_transformers(model: str, launches: Launches) -> None:
    compared = [c for c in launches.references if c.model == model and c.settings.get("model.dtype") != "bfloat16"]
    assert compared
    for case in compared:
        check_reference(case, launches.outcome(case), launches.by_transformers(case))
        if BIASES.items() <= case.settings.items():
            check_biases(launches.root / case.model, launches.updates[case.model], BIAS_RATE, launches.outcome(case))


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_auxiliary_losses_move_the_routers(model: str, launches: Launches) -> None:
    """A hundred times as far as the comparison lets pass, or it would not see them."""
    of_model = [case for case in launches.references if case.model == model]
    losses = [c for c in of_model if "model.moe_aux_loss_coefficient" in c.settings]
    (with_losses,) = [c for c in losses if not BIASES.keys() & c.settings.keys()]
    (plain,) = [c for c in of_model if c.settings.get("model.routing_replay") and c not in losses]
    moved, still = (launches.by_transformers(case).weights for case in (with_losses, plain))
    gates = [name for name in still if name.endswith("gate.weight")]
    assert gates
    for name in gates:
        assert (moved[name] - still[name]).abs().max() > 100 * FP32_BOUND * still[name].abs().max(), name


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_moves(model: str, launches: Launches) -> None:
    """Otherwise equal parameters would say nothing."""
    assert launches.moves()[model] > 10 * FP32_BOUND


def test_the_page_is_written(launches: Launches) -> None:
    moved = ", ".join(f"{move:.1e} ({model})" for model, move in launches.moves().items())
    rows = [row(case, [f"{e:.1e}" if e else "0" for e in launches.errors(case)]) for case in CASES]
    page = PAGE_HEAD.format(moves=moved) + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    if os.environ.get("DRPO_WRITE_RESULTS"):
        PAGE.write_text(page)
    assert page.count("\n| ") == len(CASES) + 1
