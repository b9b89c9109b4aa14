"""`drpo top` on a recorded run: what it shows is what the files say, also while they are being written."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from drpo_megatron import cli
from drpo_megatron.commands import EXIT_REFUSED
from drpo_megatron.observability.top import RunView
from drpo_megatron.rollout.member import Member, State
from drpo_megatron.rollout.server import ExternalServer
from drpo_megatron.rollout.status_file import NAME, StatusFile

ROOT = Path(__file__).parents[2]
RECORDED = (ROOT / "docs" / "results" / "quickstart-seed0.jsonl").read_text().splitlines()
STEPS = len(RECORDED)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """After 30 steps; the last of them has just ended."""
    directory = tmp_path / "quickstart"
    (directory / "log").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "quickstart.yaml", directory / "config.yaml")
    shift = time.time() - json.loads(RECORDED[29])["time"]
    rows = [json.loads(line) for line in RECORDED[:30]]
    lines = [json.dumps(row | {"time": row["time"] + shift}) + "\n" for row in rows]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


def text_of(view: RunView) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(view)
    return console.export_text()


@pytest.fixture
def once(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def show(directory: Path, *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["top", str(directory), *words])
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    return show


def test_one_frame(run: Path, once: Callable[..., tuple[int, str, str]]) -> None:
    rows = [json.loads(line) for line in RECORDED[:30]]
    code, out, _ = once(run, "--once")
    last = rows[-1]
    assert code == 0 and f"quickstart  step 30/{STEPS}  about " in out
    # The mean of the last ten rewards, less that of the ten before.
    rewards = [row["reward/mean"] for row in rows]
    rise = sum(rewards[20:]) / 10 - sum(rewards[10:20]) / 10
    assert f"{last['reward/mean']:.3f} ({rise:+.3f} over 10 steps)" in out
    for words in (
        f"{last['memory/peak_gb']:.2f} GB",
        f"{last['staleness/mean']:.2f}, {last['staleness/max']:.0f}",
        f"tokens/s             {last['perf/tokens_per_s']:.0f}",
        f"train {last['perf/train_s']:.2f}",
        f"sync {last['perf/sync_s']:.2f}",
    ):
        assert words in out, (words, out)
    trend = next(line for line in out.splitlines() if set(line.strip()) <= set("▁▂▃▄▅▆▇█") and line.strip())
    assert len(trend.strip()) == 30 and trend.strip()[0] == "▁"


def test_time_left_is_that_of_the_last_steps(run: Path) -> None:
    path = run / "metrics.jsonl"
    now = time.time()
    rows = [json.loads(line) | {"time": now - 60 * (29 - i)} for i, line in enumerate(RECORDED[:30])]
    rows[-1]["time"] = now - 5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    left = (STEPS - 30) * 60
    assert f"about {left // 60}:00 left, last step 0:05 ago" in text_of(RunView(run))


def test_a_line_that_is_half_written_is_read_when_it_is_whole(run: Path) -> None:
    path = run / "metrics.jsonl"
    with path.open("a") as file:
        file.write(RECORDED[30][:100])
    view = RunView(run)
    assert f"step 30/{STEPS}" in text_of(view)
    with path.open("a") as file:
        file.write(RECORDED[30][100:] + "\n")
    view.read()
    assert f"step 31/{STEPS}" in text_of(view)
    # A run that goes on from a checkpoint writes the file anew.
    beside = path.with_suffix(".tmp")
    beside.write_text(RECORDED[0] + "\n")
    beside.rename(path)
    view.read()
    assert f"step 1/{STEPS}" in text_of(view)
    with path.open("a") as file:
        file.write("what is this\n")
    with pytest.raises(ValueError, match="'what is this' is not a line of metrics"):
        view.read()


def test_servers(run: Path) -> None:
    members = [Member(f"server-{i}", ExternalServer(f"http://127.0.0.1:{i}")) for i in range(2)]
    members[0].state, members[0].version, members[0].load = State.SERVING, 58, (17, 4)
    members[1].state, members[1].restarts, members[1].reason = State.RESTING, 2, "SGLang ended with status -9"
    members[1].load = (1, 1)  # from before it died
    status = StatusFile(run / NAME)
    status.write(members)
    rows = [" ".join(line.split()) for line in text_of(RunView(run)).splitlines() if line.startswith("server-")]
    assert rows == ["server-0 serving 58 17 4 0", "server-1 waiting to restart – – – 2 SGLang ended with status -9"]
    written = (run / NAME).stat().st_mtime_ns
    status.write(members)
    assert (run / NAME).stat().st_mtime_ns == written, "nothing changed"
    members[0].load = (16, 4)
    status.write(members)
    assert " 16 " in text_of(RunView(run)) and "nobody watches" not in text_of(RunView(run))
    old = json.loads((run / NAME).read_text())
    (run / NAME).write_text(json.dumps(old | {"time": time.time() - 100}))
    assert "seen 1:40 ago: nobody watches the servers now" in text_of(RunView(run))
    shutil.rmtree(run)
    members[0].load = (15, 4)
    status.write(members)  # a disk that is gone does not end the fleet


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("error_rank_1.txt", "ValueError: no", "failed, rank 1: ValueError: no"),
        ("stopped.txt", "stopped as it was told to", "stopped as it was told to"),
    ],
)
def test_a_run_that_ended_early_says_why(run: Path, name: str, content: str, shown: str) -> None:
    assert not RunView(run).over
    (run / "log" / name).write_text(f"{content}\n")
    view = RunView(run)
    assert view.over and shown in text_of(view) and "ended" in text_of(view)


def test_before_the_first_step_and_after_the_last(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    assert f"step 0/{STEPS}" in text_of(RunView(run)) and "starting" in text_of(RunView(run))
    (run / "metrics.jsonl").write_text("\n".join(RECORDED) + "\n")
    view = RunView(run)
    assert view.over and f"step {STEPS}/{STEPS}  done" in text_of(view)


def test_a_directory_without_a_run(tmp_path: Path, once: Callable[..., tuple[int, str, str]]) -> None:
    code, _, errors = once(tmp_path, "--once")
    assert code == EXIT_REFUSED and "holds no run" in errors and "runs/NAME" in errors
