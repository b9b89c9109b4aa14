"""The FP8 stability study without its runs: cells, collapse, intervals, records, and that a study goes on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from drpo_megatron.bench import fp8
from drpo_megatron.config import ConfigError
from drpo_megatron.study import grid, outcome, records, report
from drpo_megatron.study.grid import Cell, Job, Study
from drpo_megatron.study.outcome import outcome_of
from drpo_megatron.study.page import write_page
from drpo_megatron.study.plots import draw_all, mean_curve
from drpo_megatron.study.pool import _Place, _places
from drpo_megatron.study.records import Record, Records, Status
from drpo_megatron.study.statistics import (
    Interval,
    geometric_interval,
    mean_interval,
    paired_interval,
    wilson_interval,
)
from drpo_megatron.study.summary import Results

UPDATES = 96


def record(
    rewards: Sequence[float],
    *,
    loss: str = "drpo",
    precision: str = "bf16",
    staleness: int = 8,
    seed: int = 0,
    status: Status = "done",
    k3: float | Sequence[float] = 1e-5,
) -> Record:
    kl = list(k3) if isinstance(k3, Sequence) else [k3] * len(rewards)
    others = {name: [0.5] * len(rewards) for name in records.METRICS}
    return Record(
        loss=loss,
        parameters=grid.LOSSES[loss],
        precision=precision,
        staleness=staleness,
        seed=seed,
        status=status,
        reason="",
        seconds=10.0,
        digest="d",
        settings=(),
        versions={"torch": "2"},
        metrics=others | {"reward/mean": list(rewards), "mismatch/k3": kl},
    )


# --- the grid -------------------------------------------------------------------------------------------------------


def test_cells_differ_in_nothing_but_loss_precision_and_age() -> None:
    study = Study()
    configs = {cell: study.config(Job(cell, 3)) for cell in grid.main_grid()}
    assert len(configs) == 7 * 7 * 3
    totals = set()
    for cell, config in configs.items():
        updates, rollout = config.training.updates_per_batch, config.rollout
        per_update = rollout.prompts_per_step * rollout.samples_per_prompt // updates
        totals.add((config.training.steps * updates, per_update, config.optimizer, config.seed))
        assert updates == cell.staleness and config.algorithm.loss == cell.loss
        assert config.algorithm.loss_args == dict(cell.parameters)
        assert config.fp8.rollout == (cell.precision != "bf16")
        assert config.fp8.backend == ("transformer_engine" if cell.precision == "bf16" else "emulate")
        recipe = "blockwise" if cell.precision == "fp8-matched" else cell.precision.removeprefix("fp8-")
        assert config.fp8.recipe in (recipe, None)
        assert (config.fp8.block_scales == "float32") == (cell.precision == "fp8-matched")
    assert len(totals) == 1 and next(iter(totals))[:2] == (128, 64)
    assert {c.fp8.recipe for c in configs.values()} == {None, *grid.RECIPES}
    # No two runs share a directory.
    assert len({config.name for config in configs.values()}) == len(configs)


def test_the_delta_study_shares_cells_with_the_grid() -> None:
    main, deltas = set(grid.main_grid()), grid.delta_grid()
    assert [dict(c.parameters).get("delta", math.inf) for c in deltas] == [0.05, 0.15, 0.6, 2.5, 12.5, math.inf]
    assert {c.staleness for c in deltas} == {8} and {c.precision for c in deltas} == {"fp8-blockwise"}
    assert [c in main for c in deltas] == [False, False, False, False, True, True]
    jobs = grid.jobs_of([*main, *deltas], (0, 1))
    assert len(jobs) == len(set(jobs)) == 2 * (147 + 4)


def test_jobs_change_the_kind_of_server_once_and_have_seeds_outermost() -> None:
    jobs = grid.jobs_of(grid.main_grid(), (0, 1, 2))
    kinds = [job.cell.precision != "bf16" for job in jobs]
    assert kinds == sorted(kinds)
    seeds = [job.seed for job in jobs if job.cell.precision != "bf16"]
    assert seeds == sorted(seeds)


def test_updates_that_do_not_divide_are_refused() -> None:
    job = Job(Cell.of("pg", {}, "bf16", 8), 0)
    with pytest.raises(ConfigError, match="12 updates"):
        Study(updates=12).config(job)


# --- collapse -------------------------------------------------------------------------------------------------------

LEARNS = [0.0, 0.1, 0.3, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]


@pytest.mark.parametrize(
    ("rewards", "collapse"),
    [
        (LEARNS, None),
        ([*LEARNS[:8], 0.4, 0.3, 0.2, 0.1], "reward"),
        ([*LEARNS[:10], 0.44, 0.44], "reward"),
        ([*LEARNS[:11], 0.1], None),  # one window is not staying
        ([*LEARNS[:6], 0.1, 0.1, 0.1, 0.1, 0.1, 0.46], None),  # it came back
        ([*LEARNS[:10], 0.45, 0.45], None),  # half is not below half
        ([0.0, 0.2, 0.29, 0.29, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], None),  # never learned
        ([0.0, 0.2, 0.3, 0.29, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "reward"),
    ],
)
def test_collapse_of_the_reward(rewards: list[float], collapse: str | None) -> None:
    assert outcome_of(record(rewards), UPDATES).collapse == collapse
    # The same samples with one update a batch: a window is as long.
    by_update = [r for r in rewards for _ in range(8)]
    assert outcome_of(record(by_update, staleness=1), UPDATES).collapse == collapse


def test_collapse_by_numbers() -> None:
    ended = outcome_of(record(LEARNS[:6], status="non_finite"), UPDATES)
    assert ended.collapse == "non-finite"
    assert ended.final == 0 and ended.area == pytest.approx(sum(LEARNS[:6]) / 12)
    above, at = [1e-5] * 11 + [0.11], [1e-5] * 11 + [0.1]
    assert outcome_of(record(LEARNS, k3=above), UPDATES).collapse == "mismatch"
    assert outcome_of(record(LEARNS, k3=at), UPDATES).collapse is None
    # One batch of eight above the bound, whose window is not.
    spike = [1e-5] * 95 + [0.5]
    assert outcome_of(record([0.5] * 96, staleness=1, k3=spike), UPDATES).collapse is None
    with pytest.raises(ValueError, match="failed"):
        outcome_of(record(LEARNS, status="failed"), UPDATES)


def test_final_reward_and_area_are_of_the_same_samples_whatever_the_staleness() -> None:
    by_update = [index / 96 for index in range(96)]
    by_batch = [sum(by_update[i : i + 8]) / 8 for i in range(0, 96, 8)]
    one, eight = (outcome_of(record(r, staleness=s), UPDATES) for r, s in ((by_update, 1), (by_batch, 8)))
    assert one.final == pytest.approx(eight.final) == pytest.approx(np.mean(by_update[-outcome.LAST :]))
    assert one.area == pytest.approx(eight.area) == pytest.approx(np.mean(by_update))
    assert one.peak == pytest.approx(eight.peak)


# --- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_against_scipy() -> None:
    values = [0.3, 0.5, 0.45, 0.9, 0.2]
    ours = mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (ours.value, ours.low, ours.high) == pytest.approx((np.mean(values), low, high))
    for hits, count in ((0, 5), (2, 5), (5, 5), (31, 90)):
        share, reference = wilson_interval(hits, count), scipy.stats.binomtest(hits, count)
        of_scipy = reference.proportion_ci(0.95, method="wilson")
        assert (share.low, share.high) == pytest.approx((of_scipy.low, of_scipy.high), abs=1e-12)
    others = [0.1, 0.4, 0.5, 0.6, 0.3]
    paired, test = paired_interval(values, others), scipy.stats.ttest_rel(values, others).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((test.low, test.high))
    geometric = geometric_interval([1e-5, 1e-4, 1e-3])
    assert geometric.value == pytest.approx(1e-4) and geometric.low * geometric.high == pytest.approx(1e-8)


def test_intervals_of_too_little() -> None:
    assert math.isnan(mean_interval([0.5]).low)
    assert Interval(1.0, 0.1, 2.0, 3).sign == 1 and Interval(-1.0, -2.0, -0.1, 3).sign == -1
    assert Interval(0.1, -0.1, 0.3, 3).sign == 0 and mean_interval([0.5]).sign == 0
    for nothing in (lambda: mean_interval([]), lambda: wilson_interval(0, 0), lambda: wilson_interval(3, 2)):
        with pytest.raises(ValueError):
            nothing()


def test_t_intervals_cover_as_often_as_they_say() -> None:
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        interval = mean_interval([rng.gauss(1.0, 2.0) for _ in range(5)])
        hits += interval.low <= 1.0 <= interval.high
    assert 0.935 < hits / 2000 < 0.965


def test_mismatch_is_compared_in_pairs() -> None:
    kls = {"bf16": 1e-5, "fp8-rollout": 4e-3, "fp8-blockwise": 1e-3}
    runs = [
        record(LEARNS, loss=loss, precision=precision, seed=seed, k3=kl * scale * (1 + 0.1 * seed))
        for precision, kl in kls.items()
        for loss, scale in (("drpo", 1.0), ("pg", 50.0))  # far more apart than precisions are
        for seed in (0, 1, 2)
    ]
    results = Results(runs, UPDATES)
    ratio = results.mismatch_ratio("fp8-rollout", "fp8-blockwise")
    assert ratio is not None and ratio.count == 6
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((4, 4, 4))
    sentences = report.mismatch_order(results, list(kls))
    assert len(sentences) == 2 and all("is larger than" in s for s in sentences)
    assert results.mismatch_ratio("fp8-mxfp8", "bf16") is None


# --- records --------------------------------------------------------------------------------------------------------


def full_record(cell: Cell, seed: int) -> Record:
    """With the digits of a real run."""
    rng = random.Random(f"{cell}{seed}")
    steps = 128 // cell.staleness
    metrics = {name: [rng.random() * 10 ** rng.randrange(-6, 1) for _ in range(steps)] for name in records.METRICS}
    packages = ("drpo-megatron", "torch", "megatron-core", "sglang", "transformers")
    return Record(
        loss=cell.loss,
        parameters=dict(cell.parameters),
        precision=cell.precision,
        staleness=cell.staleness,
        seed=seed,
        status="done",
        reason="",
        seconds=31.4,
        digest="0123456789abcdef",
        settings=("optimizer.lr=0.001",),
        versions=dict.fromkeys(packages, "10.10.10"),
        metrics=metrics,
    )


def test_files_of_the_whole_grid_stay_below_a_megabyte(tmp_path: Path) -> None:
    sizes: dict[str, int] = {}
    for job in grid.jobs_of([*grid.main_grid(), *grid.delta_grid()], grid.SEEDS):
        line = full_record(job.cell, job.seed).to_json()
        sizes[job.cell.loss] = sizes.get(job.cell.loss, 0) + len(line) + 1
    assert max(sizes.values()) < 0.6 * 2**20, sizes


def test_a_record_comes_back_with_its_digits() -> None:
    made = record([0.123456, math.nan, 1.0], loss="grpo", k3=[1.23456e-7, math.inf, 0.0])
    line = made.to_json()
    assert "NaN" not in line and "\n" not in line
    read = Record.from_json(line)
    assert read.metrics["reward/mean"] == pytest.approx([0.1235, math.nan, 1.0], nan_ok=True)
    assert read.metrics["mismatch/k3"] == pytest.approx([1.235e-7, math.nan, 0.0], nan_ok=True)
    assert replace(read, metrics={}) == replace(made, metrics={}) and read.job == made.job


def test_a_study_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    kept = Records(tmp_path)
    jobs = grid.jobs_of([Cell.of(loss, grid.LOSSES[loss], "bf16", 8) for loss in ("drpo", "pg")], (0, 1))
    assert kept.missing(jobs, "d") == jobs
    kept.add(record(LEARNS, seed=0))
    kept.add(record(LEARNS, seed=1, loss="pg", status="non_finite"))
    kept.add(record([], seed=1, status="failed"))
    assert [job.key for job in kept.missing(jobs, "d")] == ["pg/bf16/8/0"]
    assert [job.key for job in kept.missing(jobs, "d", retry_failed=True)] == [
        "pg/bf16/8/0",
        "drpo(delta=12.5)/bf16/8/1",
    ]
    kept.add(record(LEARNS, seed=1))  # in place of the one that failed
    assert sorted(r.status for r in kept) == ["done", "done", "non_finite"]
    with pytest.raises(ConfigError, match="other settings"):
        kept.missing(jobs, "e")
    (tmp_path / "runs-pg.jsonl").write_text('{"loss": "pg"}\n')
    with pytest.raises(ConfigError, match=r"runs-pg\.jsonl:1"):
        list(kept)


def test_one_study_writes_at_a_time(tmp_path: Path) -> None:
    with Records(tmp_path).held(), pytest.raises(ConfigError, match="another study"), Records(tmp_path).held():
        raise AssertionError("two studies hold one directory")
    with Records(tmp_path).held():
        pass


def test_the_digest_is_of_settings_and_not_of_comments(tmp_path: Path) -> None:
    copy = tmp_path / "recipe.yaml"
    copy.write_text("# another comment\n" + grid.RECIPE.read_text())
    assert Study(copy).digest == Study().digest
    assert (
        len(
            {
                Study().digest,
                Study(backend="transformer_engine").digest,
                Study(settings=("optimizer.lr=1",)).digest,
                Study(updates=64).digest,
            }
        )
        == 4
    )


# --- what is written of it ------------------------------------------------------------------------------------------


def small_study() -> list[Record]:
    collapses = [*LEARNS[:6], 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    kls = {"bf16": 1e-5, "fp8-rollout": 4e-3, "fp8-blockwise": 1e-3, "fp8-matched": 5e-4}
    return [
        record(
            collapses if loss == "pg" and precision != "bf16" else [r + 0.01 * seed for r in LEARNS],
            loss=loss,
            precision=precision,
            seed=seed,
            k3=kl * (1 + 0.1 * seed),
        )
        for loss in ("drpo", "grpo", "pg")
        for precision, kl in kls.items()
        for seed in (0, 1)
    ]


def test_the_report_keeps_the_conclusions_and_says_what_numbers_decide(tmp_path: Path) -> None:
    path = tmp_path / "fp8-stability.md"
    runs = small_study()
    report.write_report(path, runs, report.Made(UPDATES, 64, 0.5), {})
    first = path.read_text()
    assert "`pg` collapsed in 6 of 8 runs" in first and "`drpo` collapsed in 0 of 8 runs" in first
    assert "Final reward of `drpo` over `pg`: higher in 3 cells, lower in 0, not told apart in 1." in first
    assert "Final reward of `drpo` over `grpo`: higher in 0 cells, lower in 0, not told apart in 4." in first
    path.write_text(first.replace("Not written yet.", "A person\n\nconcluded this."))
    failed = record([], loss="cispo", status="failed")
    report.write_report(path, [*runs, failed], report.Made(UPDATES, 64, 0.5), {})
    second = path.read_text()
    assert f"{report.BEGIN}\nA person\n\nconcluded this.\n{report.END}" in second
    assert "`cispo(eps_high=0.28)/bf16/8/0`" in second
    # drpo learns alike in all precisions, pg collapses in all but bf16
    changes = second.split("## What FP8 changes")[1].split("Area under the reward:")[0].splitlines()
    assert next(line for line in changes if line.startswith("| `drpo`")).count(" 0.000 [0.000, 0.000] ") == 3
    lost = next(line for line in changes if line.startswith("| `pg`"))
    everything = next(line for line in changes if line.startswith("| all"))
    assert lost.count("**-") == 3 and everything.count("-0.") >= 3


def test_a_report_of_runs_on_a_gpu_says_so_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "gpu.md"
    runs = small_study()
    others = [replace(r, metrics=r.metrics | {"mismatch/k3": [k / 2 for k in r.metrics["mismatch/k3"]]}) for r in runs]
    command = "python tools/fp8_stability.py --set optimizer.lr=1"
    made = report.Made(
        UPDATES, 64, 0.5, "transformer_engine", "One H100.", "On a GPU", ("optimizer.lr=1", "seed=2"), command
    )
    report.write_report(path, runs, made, {"emulated": [r for r in others if r.loss != "pg"]})
    text = path.read_text()
    assert text.startswith("# On a GPU\n") and "in 4 precisions, by 3 losses, with 8 updates" in text
    assert "fp8-stability.yaml), with `optimizer.lr=1` and `seed=2`." in text and f"\n{command}  # goes on" in text
    assert "FP8 is Transformer Engine's, the servers' SGLang's. Every run is a line of `gpu/runs-LOSS.jsonl`" in text
    assert "0.5 hours of one worker, servers' starts left out. One H100. Versions:" in text
    assert "![reward](gpu/reward.png)" in text
    assert "## The same runs in [emulated](emulated.md)" in text
    assert "| `fp8-matched` | 4 | 2.00 [2.00, 2.00] | 0.000 [0.000, 0.000] |" in text


def test_workers_share_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [place.core for place in _places(2)] != [None, None]
    monkeypatch.setattr("drpo_megatron.platform.has_cuda", lambda: True)
    monkeypatch.setattr("drpo_megatron.platform.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _places(3) == [_Place(device="0"), _Place(device="1"), _Place(device="0")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place.device for place in _places(3)] == ["3", "5", "3"]


def test_a_delta_is_named_best_only_with_those_it_is_not_told_apart_from() -> None:
    rewards = {0.05: 0.5, 0.15: 0.9, 0.6: 0.89}
    runs = [
        replace(
            record([value + 0.02 * seed * (-1) ** index] * 12, seed=seed, precision="fp8-blockwise"),
            parameters={"delta": delta},
        )
        for index, (delta, value) in enumerate(rewards.items())
        for seed in (0, 1, 2)
    ]
    text = "\n".join(report._delta_table(Results(runs, UPDATES)))
    assert "δ = 0.6 has the highest final reward; not told apart from it: 0.15." in text


def test_pictures_and_page(tmp_path: Path) -> None:
    runs = small_study()
    pictures = draw_all(runs, tmp_path)
    assert [p.name for p in pictures] == ["reward.png", "mismatch.png", "weights.png", "entropy.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    page = tmp_path / "page.html"
    write_page(page, runs, UPDATES, pictures)
    text = page.read_text()
    assert text.count("<tr") == 1 + 12 and text.count("data:image/png;base64,") == 4
    assert "http://" not in text and "https://" not in text
    assert mean_curve([[1.0, 2.0], [3.0, math.nan, 5.0]]).tolist() == [2.0, 2.0, 5.0]


def test_figures_of_the_bench() -> None:
    figures = fp8.figures_of(small_study(), UPDATES)
    assert figures["mismatch_kl_bf16"].value == pytest.approx(1e-5 * math.sqrt(1.1))
    assert figures["rollout_over_e2e"].value == pytest.approx(8)
    assert figures["rollout_over_e2e_default_scales"].value == pytest.approx(4)
    assert figures["e2e_over_bf16"].value == pytest.approx(50)
    assert figures["order_held"].value == 1
    assert figures["collapse_share_pg"].value == pytest.approx(6 / 8) and figures["collapse_share_drpo"].value == 0
    equal = [replace(r, metrics=r.metrics | {"mismatch/k3": [1e-5] * 12}) for r in small_study()]
    assert fp8.figures_of(equal, UPDATES)["order_held"].value == 0
    assert json.dumps({name: figure.to_json() for name, figure in figures.items()})
    with pytest.raises(RuntimeError, match="failed"):
        fp8.figures_of([*small_study(), record([], loss="spo", status="failed")], UPDATES)
