"""`tools/compare_trl.py` reads the steps of both sides, and sums them up without the first ones."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

_PATH = Path(__file__).parents[2] / "tools" / "compare_trl.py"
_SPEC = importlib.util.spec_from_file_location("compare_trl", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
compare_trl = importlib.util.module_from_spec(_SPEC)
sys.modules["compare_trl"] = compare_trl  # where its dataclass looks for its annotations
_SPEC.loader.exec_module(compare_trl)


def measured(seconds: list[float], **more: Any) -> dict[str, Any]:
    """A row whose steps took `seconds`, with one look at the memory in each: 1 GiB, 2 GiB …"""
    ends = [100.0 + sum(seconds[: n + 1]) for n in range(len(seconds))]
    steps = [
        {"seconds": s, "time": end, "reward": 0.1 * n, "samples": 64, "response_tokens": 600, "generate_s": s / 4}
        for n, (s, end) in enumerate(zip(seconds, ends, strict=True))
    ]
    memory = [(end - 0.5, (n + 1) * 2**30) for n, end in enumerate(ends)]
    return {"name": "x", "busy_cores": 0.3, "steps": steps, "memory": memory} | more


def test_the_first_steps_are_left_out_of_rates_and_memory_but_not_of_the_curve() -> None:
    result = measured([90.0, 80.0, 8.0, 16.0, 10.0])
    result["memory"] += [(95.0, 50 * 2**30), (400.0, 60 * 2**30)]  # while it loads and while it exports
    row = compare_trl.figures(result)
    assert row["steps"] == 3
    assert row["samples_per_s"]["value"] == pytest.approx(6.4)
    assert row["samples_per_s"]["spread"] == pytest.approx([4.0, 8.0])
    assert row["tokens_per_s"]["value"] == pytest.approx(60.0)
    assert (row["generate_s"]["value"], row["rest_s"]["value"]) == pytest.approx((2.5, 7.5))
    assert row["memory_gib"] == 5
    assert [point["s"] for point in row["curve"]] == pytest.approx([90.0, 170.0, 178.0, 194.0, 204.0])


def test_a_step_of_this_project_ends_where_the_next_begins(tmp_path: Path) -> None:
    verbs = {"perf/generate_s": 3.0, "perf/train_s": 4.0, "perf/sync_s": 1.0}
    rows = [
        {"time": end, "perf/step_s": 9.0, "reward/mean": 0.5, "response/len_mean": 7.25} | verbs
        for end in (1000.0, 1009.5, 1021.0)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = compare_trl.steps_of_run(tmp_path, 64)
    assert [step["seconds"] for step in steps] == pytest.approx([9.0, 9.5, 11.5])
    assert steps[1] | {"time": 0} == {
        **{"seconds": 9.5, "time": 0, "reward": 0.5, "samples": 64, "response_tokens": 464},
        **{"generate_s": 3.0, "train_s": 4.0, "sync_s": 1.0},
    }


@pytest.mark.parametrize(("seconds", "says"), [(10.0, "4.00 times"), (20.0, "2.00 times")])
def test_the_page_says_whether_the_goal_holds(seconds: float, says: str) -> None:
    rows = {
        "trl": compare_trl.figures(measured([40.0] * 6)),
        "drpo": compare_trl.figures(measured([seconds] * 6)),
    }
    machine = {"cores": 2, "cpu": "x86_64", "python": "3.12"}
    text = compare_trl.page({"machine": machine, "versions": {"trl": "1"}, "rows": rows})
    assert says in text
    assert ("**does not hold**" in text) == (seconds == 20.0)
    assert f"| {40 / seconds:.2f}× |" in text


def test_when_a_reward_is_reached() -> None:
    curve = [{"s": 10.0 * (n + 1), "reward": reward} for n, reward in enumerate([0, 0, 0, 0, 1, 1, 1, 0, 1])]
    assert [(steps, round(mean, 3)) for steps, _, mean in compare_trl.smoothed(curve)] == [
        *((5, 0.2), (6, 0.4), (7, 0.6), (8, 0.6), (9, 0.8))
    ]
    assert compare_trl.reaches(curve, 0.5) == "70 s, 7 steps" and compare_trl.reaches(curve, 0.9) == "–"


def test_the_model_is_made_before_the_first_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TRL's row reads the model that `drpo train` would make."""
    called = []

    def measure(name: str, *_: Any) -> Any:
        called.append(name)
        raise InterruptedError

    monkeypatch.setattr(compare_trl, "ensure_model", lambda recipe, path: called.append(recipe))
    monkeypatch.setattr(compare_trl, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["compare_trl", "trl", "--directory", str(tmp_path)])
    with pytest.raises(InterruptedError):
        compare_trl.main()
    assert called == ["smollm2_135m", "trl"]
