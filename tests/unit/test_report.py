"""`drpo report` and `drpo diff` against what was written into the runs. The page in a browser: slow."""

from __future__ import annotations

import html.parser
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.report.page import MAX_BARS, curves, thinned, verb_times, write_report
from drpo_megatron.report.parting import compare_runs
from drpo_megatron.report.run_files import config_differences, read_runs
from drpo_megatron.report.samples import MAX_TOKENS, evenly, split_text, take_samples
from tests.support.report_runs import TRAPS, metrics, rollout, write_run


def drpo(*words: Any) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([str(word) for word in words])
    return int(exit_info.value.code or 0)


# ---- diff


def test_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times, rates and memory differ in every run, and two settings do here."""
    a = write_run(tmp_path / "a", [metrics(step) for step in range(5)])
    measured = {
        "time": 5.0,
        "perf/train_s": 9.0,
        "perf/tokens_per_s": 1.0,
        "memory/peak_gb": 3.0,
        "sync/seconds": 1.0,
        "total/seconds": 9.0,
        "rollout/groups_ready": 6.0,
    }
    rows = [metrics(step, **measured) for step in range(5)]
    b = write_run(tmp_path / "b", rows, config={"seed": 1})
    assert drpo("diff", a, b) == 0
    said = capsys.readouterr().out
    assert said.startswith("a and b are the same in all 5 steps") and "seed" in said and '"b"' in said


def test_the_first_step_and_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss comes first in the file; what was sampled comes first in the run."""
    a = write_run(tmp_path / "a", [metrics(step) for step in range(6)])
    rows = [metrics(step) for step in range(6)]
    rows[3] = metrics(3, **{"loss/mean": 0.5, "reward/mean": 0.3 + 1e-9, "grad_norm": 0.75, "new/metric": 1.0})
    rows[5] = metrics(5, **{"reward/mean": 7.0})
    b = write_run(tmp_path / "b", rows)
    assert drpo("diff", a, b) == 1
    assert capsys.readouterr().out.startswith("a and b part at step 3: reward/mean is the first")
    assert drpo("diff", a, b, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 3 and found["equal"] is False and found["common"] == 6
    assert [d["metric"] for d in found["differences"]] == ["reward/mean", "loss/mean", "grad_norm", "new/metric"]
    assert found["differences"][2] == {"metric": "grad_norm", "a": 0.5, "b": 0.75}
    assert found["differences"][3] == {"metric": "new/metric", "b": 1.0}
    assert found["config"] == {"name": ['"a"', '"b"'], "model.path": found["config"]["model.path"]}
    # The tolerance is absolute below 1 and relative above.
    assert drpo("diff", a, b, "--json", "--tolerance", "1e-6") == 1
    assert [d["metric"] for d in json.loads(capsys.readouterr().out)["differences"]][:1] == ["loss/mean"]


def test_the_first_difference_of_random_runs(tmp_path: Path) -> None:
    """Against numpy: the first row in which a column is further away than the tolerance."""
    names = ["reward/mean", "loss/mean", "grad_norm"]
    for trial in range(20):
        # Noise of 1e-9 and 1e-3 is within 1e-6 for no value and for small ones too: those are taken as if they were 1.
        values = np.random.default_rng(trial).normal(0, 100, (8, 3)) * np.array([1, 1e-4, 1e-2])
        noise = np.random.default_rng(trial + 100).choice([0, 1e-9, 1e-3], (8, 3), p=[0.8, 0.1, 0.1])
        for tolerance in (0.0, 1e-6):
            runs = []
            for name, matrix in (("a", values), ("b", values * (1 + noise))):
                rows = [
                    {"step": float(i)} | dict(zip(names, map(float, row), strict=True)) for i, row in enumerate(matrix)
                ]
                runs += read_runs([write_run(tmp_path / f"{trial}-{tolerance}" / name, rows)])
            other = values * (1 + noise)
            limit = tolerance * np.maximum(1, np.maximum(np.abs(values), np.abs(other)))
            apart = np.abs(values - other) > limit
            expected = int(np.argmax(apart.any(axis=1))) if apart.any() else None
            found = compare_runs(*runs, tolerance)
            assert found.step == expected and found.equal == (expected is None)
            if expected is not None:
                assert [d.metric for d in found.differences] == [
                    n for n, x in zip(names, apart[expected], strict=True) if x
                ]


def test_not_finite_and_missing_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", [metrics(0, **{"loss/mean": None}), metrics(1)])
    b = write_run(tmp_path / "b", [metrics(0, **{"loss/mean": None}), metrics(1), metrics(2)])
    assert drpo("diff", a, b) == 1
    assert "b alone has 1 steps; the 2 that both have are the same" in capsys.readouterr().out
    c = write_run(tmp_path / "c", [metrics(0), metrics(1)])
    assert drpo("diff", a, c, "--json") == 1
    assert json.loads(capsys.readouterr().out)["differences"] == [{"metric": "loss/mean", "a": None, "b": 0.0}]


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", [metrics(0)])
    b = write_run(tmp_path / "b", [metrics(7)])
    for words, message in (
        ([a, b], "none of them is in both"),
        ([a, a], "given twice"),
        ([a, tmp_path / "none"], "does not exist"),
        ([a, b, "--tolerance", "-1"], "number from 0"),
    ):
        assert drpo("diff", *words) == EXIT_REFUSED
        assert message in capsys.readouterr().err


def test_settings_that_differ() -> None:
    a = {"name": "a", "loss": {"args": {"delta": 1}}, "same": [1, 2], "empty": {}}
    b = {"name": "b", "loss": {"args": {"delta": 1.5, "more": True}}, "same": [1, 2], "empty": {}}
    assert config_differences([a, b, b]) == {
        "name": ['"a"', '"b"', '"b"'],
        "loss.args.delta": ["1", "1.5", "1.5"],
        "loss.args.more": ["(not set)", "true", "true"],
    }


# ---- the data of a page


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    places = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert [run.name for run in read_runs([write_run(p, [metrics(0)]) for p in places])] == ["x/run", "y/run"]


def test_thinned_curves_keep_the_spikes() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    values[1234], values[4321] = 50, -50
    points = [(i, float(v)) for i, v in enumerate(values)]
    kept = thinned(points, limit=100)
    assert len(kept) <= 100 and set(kept) <= set(points) and kept == sorted(kept)
    for stretch in np.split(np.arange(5000), 50):
        assert {values[stretch].min(), values[stretch].max()} <= {v for _, v in kept}
    assert thinned(points[:100], limit=100) == points[:100]
    assert curves([{"step": 0.0, "a": math.nan}, {"step": 2.0, "a": 1 / 3}]) == {"a": [[0, 2], [None, 0.333333]]}


def test_bars_of_many_steps_are_means() -> None:
    steps = 3 * MAX_BARS + 7
    rows = [metrics(step) for step in range(steps)]
    found = verb_times([{k: math.nan if v is None else v for k, v in row.items()} for row in rows])
    assert found["verbs"] == ["generate", "train"] and len(found["bars"]) == MAX_BARS
    covered = [step for first, last, _ in found["bars"] for step in range(first, last + 1)]
    assert covered == list(range(steps))
    for first, last, (generate, train) in found["bars"]:
        assert generate == pytest.approx(1 + (first + last) / 2) and train == 2.0


def test_samples_are_taken_evenly(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics(step) for step in range(40)], dumped=range(40))
    samples = take_samples(*read_runs([run]), limit=24)
    assert (samples.total_steps, samples.steps, samples.of_steps) == (40, 3, 24)
    assert Counter(item["step"] for item in samples.items) == {0: 8, 20: 8, 39: 8}
    few = take_samples(*read_runs([run]), limit=2)
    assert [(item["step"], item["reward"]) for item in few.items] == [(39, 0.0), (39, 7 / 8)]
    assert len(take_samples(*read_runs([run]), limit=7).items) == 7
    item = samples.items[0]
    assert item["ratio"] == [0.25, -0.5, 0] and item["weight"] == [1.5, -0.5, 0] and item["mask"] == [1, 1, 0]
    assert samples.without_tokenizer and item["tokens"] == ["3 ", "4 ", "5 "]
    for count in range(1, 30):
        for limit in range(1, 30):
            found = evenly(count, limit)
            assert len(set(found)) == len(found) == min(count, limit) and found[-1] == count - 1


def test_staleness_counts_trained_tokens(tmp_path: Path) -> None:
    """Two updates a step: the groups take turns, so half of the tokens is a version older. One update was skipped."""
    rows = [metrics(0), metrics(1), metrics(2, **{"train/skipped_updates": 1.0}), metrics(3)]
    run = write_run(tmp_path / "run", rows, dumped=[2, 3])
    samples = take_samples(*read_runs([run]), limit=100)
    # Step 2 is sampled and first trained by version 4, step 3 is written as sampled by version 6 and trained by 5.
    assert samples.staleness == {-1: 8, 0: 8 + 8, 1: 8}
    lines = [json.dumps(rollout(2, i, weight_versions=[4 - i // 2] * 3)) for i in range(8)]
    (run / "rollouts" / "step_000002.jsonl").write_text("\n".join(lines) + "\n")
    (run / "rollouts" / "step_000003.jsonl").unlink()
    # Each of the four groups is one version older than the one before, and every other one is trained one later.
    assert take_samples(*read_runs([run]), limit=100).staleness == {0: 4, 2: 8, 4: 4}


def test_pieces_of_text_are_the_text() -> None:
    """Bytes as tokens: a character of several ends with its last."""
    text = "a ü 漢🙂"
    ids = list(text.encode())
    pieces = split_text(lambda part: bytes(part).decode(errors="replace"), ids)
    assert "".join(pieces) == text and len(pieces) == len(ids)
    assert pieces[:5] == ["a", " ", "", "ü", " "] and pieces[-4:] == ["", "", "", "🙂"]
    cut = split_text(lambda part: bytes(part).decode(errors="replace"), ids[:-1])
    assert "".join(cut) == text[:-1] + "\ufffd"


def test_a_tokenizer_that_drops_the_first_space() -> None:
    """As those of SentencePiece do, of whatever is decoded."""
    words = [" one", " two", " three"]
    assert split_text(lambda part: "".join(words[i] for i in part)[1:], [0, 1, 2]) == ["one", " two", " three"]


# ---- the page


class Page(html.parser.HTMLParser):
    """The scripts of a page, and the names of its elements and addresses."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: Counter[str] = Counter()
        self.addresses: list[str | None] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def test_a_page_with_markup_in_its_samples(tmp_path: Path) -> None:
    """Names, prompts, answers and settings that look like markup arrive as they are, and are none."""
    a = write_run(tmp_path / "a<b>", [metrics(0)], dumped=[0], traps=True, config={"note": TRAPS[0]})
    b = write_run(tmp_path / "b", [metrics(0)], dumped=[0], traps=True, config={"note": TRAPS[1]})
    write_report([a, b], tmp_path / "out" / "page.html", samples=100)
    page = Page(tmp_path / "out" / "page.html")
    assert page.tags["script"] == 2 and page.tags["img"] == 0 and page.tags["b"] == 0
    assert all(address and address.startswith(("#", "data:")) for address in page.addresses)
    (_, data), _ = page.scripts
    assert "<" not in data
    read = json.loads(data)
    assert [run["name"] for run in read["runs"]] == ["a<b>", "b"]
    items = {item["index"]: item for item in read["runs"][0]["samples"]["items"]}
    for index in range(8):
        assert items[index]["prompt"] == rollout(0, index, traps=True)["prompt"]["text"]
        assert items[index]["text"].endswith(TRAPS[index % len(TRAPS)])
    assert read["runs"][0]["curves"]["reward/mean"] == [[0], [0.0]] and "time" not in read["runs"][0]["curves"]


def test_a_long_response_is_cut_and_the_page_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics(0)])
    many = MAX_TOKENS + 50
    long = rollout(0, 0, trained=False, response_ids=[7] * many, logmu=[-1.0] * many, response_mask=[1] * many)
    (run / "rollouts" / "step_000000.jsonl").write_text(json.dumps(long | {"weight_versions": [0] * many}) + "\n")
    (item,) = take_samples(*read_runs([run]), limit=5).items
    assert item["length"] == many and len(item["tokens"]) == len(item["logmu"]) == MAX_TOKENS and "ratio" not in item


def test_what_cannot_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [metrics(0)], dumped=[0])
    out = tmp_path / "x.html"
    assert drpo("report", run, "--out", out, "--samples", "0") == EXIT_REFUSED
    assert "number from 1" in capsys.readouterr().err
    (run / "rollouts" / "step_000000.jsonl").write_text('{"cut')
    assert drpo("report", run, "--out", out) == EXIT_REFUSED
    assert "step_000000.jsonl:1" in capsys.readouterr().err and not out.exists()
