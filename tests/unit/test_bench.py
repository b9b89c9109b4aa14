"""What a bench reports: medians, spreads, bounds and the one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drpo_megatron.bench import loss, report
from drpo_megatron.bench.report import Figure, run_bench


def test_a_figure_is_the_median_with_its_spread() -> None:
    figure = Figure.of([3.0, 1.0, 10.0], must="<= 3")
    assert (figure.value, figure.spread, figure.holds) == (3.0, (1.0, 10.0), True)
    assert Figure.of([3.0], must=">= 3.5").holds is False
    assert Figure.of([3.0]).holds is None
    with pytest.raises(ValueError, match="sample"):
        Figure.of([])


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (2.0, 1)])
def test_json_is_last_on_stdout_and_a_broken_bound_fails(
    value: float, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bench:
        @staticmethod
        def measure() -> dict[str, Figure]:
            return {"ratio": Figure.of([value], must="<= 1.5")}

    monkeypatch.setattr(report.importlib, "import_module", lambda name: Bench)
    assert run_bench("anything", as_json=True) == code
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["figures"] == {
        "ratio": {"value": value, "spread": [value, value], "must": "<= 1.5", "holds": value <= 1.5}
    }
    assert printed["versions"]["megatron-core"] and printed["machine"]["cores"]


def test_growth_of_known_laws() -> None:
    line = {size: [2.0 + 0.5 * size] for size in (10, 20, 40)}
    assert loss.fit_line(line) == pytest.approx((2.0, 0.5))
    for exponent in (1.0, 2.0):
        law = {size: [3.0 * size**exponent, 0.0, 1e9] for size in (10, 20, 40)}
        assert loss.growth_exponent(law) == pytest.approx(exponent)


def test_bench_loss_refuses_without_its_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loss, "PEERS", tmp_path)
    with pytest.raises(FileNotFoundError, match="make peers"):
        loss.measure()
