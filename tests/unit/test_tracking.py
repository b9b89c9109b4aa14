"""What a run writes and shows."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.observability import Tracker, VerbTimer, progress_display
from drpo_megatron.observability.curves import plot_runs, read_metrics
from drpo_megatron.observability.profiler import StepProfiler
from drpo_megatron.observability.progress import LiveProgress, sparkline
from drpo_megatron.observability.tracker import wandb_is_online
from drpo_megatron.platform import versions
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from tests.unit.test_config import MINIMAL

METRICS = {
    "reward/mean": 0.25,
    "policy/entropy": 2.0,
    "mismatch/abs_dlogp_max": 3e-5,
    "perf/step_s": 2.0,
    "perf/train_s": 1.5,
    "train/tokens": 200.0,
    "perf/tokens_per_s": 100.0,
    "perf/generate_tokens_per_s": 400.0,
}


def run_config(directory: Path, **tracking: Any) -> RunConfig:
    model = directory / "model"
    model.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    return RunConfig.model_validate(
        MINIMAL | {"model": {"path": str(model)}, "tracking": {"directory": str(directory), "wandb": False, **tracking}}
    )


def test_files_of_a_run(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    prompt = Prompt("p:1", [1, 2], "7", "8", {"entry": {"shape": (1, 2)}})
    group = RolloutGroup(prompt, [Rollout(prompt, [3], [-0.5], [4], "stop", text=f"t{i}") for i in range(2)])
    with Tracker(config) as tracker:
        tracker.log(0, METRICS | {"bad": math.inf})
        lines = (tmp_path / "test" / "metrics.jsonl").read_text().splitlines()  # on disk before the run ends
        tracker.dump_rollouts(12, [group])
        tracker.log(1, METRICS)
    row = json.loads(lines[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row.pop("step") == 0 and abs(row.pop("time") - time.time()) < 60 and row.pop("bad") is None
    assert row == METRICS | {"total/tokens": 200.0, "total/seconds": 2.0}
    rollouts = [json.loads(line) for line in (tmp_path / "test/rollouts/step_000012.jsonl").read_text().splitlines()]
    assert [r["text"] for r in rollouts] == ["t0", "t1"] and rollouts[0]["prompt"]["answer"] == "8"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "test" / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(0, 0.25), (1, 0.25)]
    with Tracker(config, first_step=2) as tracker:  # a resumed run goes on in the same file
        tracker.log(2, METRICS)
    rows = read_metrics(tmp_path / "test")
    assert [(r["step"], r["total/tokens"], r["total/seconds"]) for r in rows] == [(0, 200, 2), (1, 400, 4), (2, 600, 6)]


def test_the_tokens_of_a_run_do_not_depend_on_its_seconds(tmp_path: Path) -> None:
    """A rate times its seconds is not the count it was made of, and runs that are equal to the bit differed."""
    seconds = 1 + 15 / 11
    assert 160 / seconds * seconds != 160
    with Tracker(run_config(tmp_path, tensorboard=False)) as tracker:
        tracker.log(0, {"train/tokens": 160.0, "perf/tokens_per_s": 160 / seconds, "perf/step_s": seconds})
    assert [row["total/tokens"] for row in read_metrics(tmp_path / "test")] == [160.0]


def test_tensorboard_shows_samples_configuration_and_code(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(run_config(tmp_path, samples=2)) as tracker:
        tracker.log_samples(3, three_groups())
    events = EventAccumulator(str(tmp_path / "test" / "tb"))
    events.Reload()

    def text(name: str) -> tuple[int, str]:
        (event,) = events.Tensors(f"{name}/text_summary")
        return event.step, event.tensor_proto.string_val[0].decode()

    step, samples = text("samples")
    assert step == 3 and '"question 0" | "answer 0" | 0.0' in samples
    assert "question 1" in samples and "question 2" not in samples, "as many as tracking.samples"
    assert yaml.safe_load(text("config")[1].strip("`"))["tracking"]["samples"] == 2
    assert json.loads(text("code")[1].strip("`"))["torch"] == importlib.metadata.version("torch")


def three_groups() -> list[RolloutGroup]:
    prompts = [Prompt(f"p:{i}", [1, 2], f"question {i}") for i in range(3)]
    return [
        RolloutGroup(p, [Rollout(p, [3], [-0.5], [4], "stop", text=f"answer {i}", reward=float(i))] * 2)
        for i, p in enumerate(prompts)
    ]


def test_the_code_of_a_checkout_has_a_commit(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=n@example.org", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert versions._commit(tmp_path) is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    assert versions._commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert versions._commit(tmp_path) == git("rev-parse", "HEAD") + "+"
    (tmp_path / "b").mkdir()
    assert versions._commit(tmp_path / "b") is None, "somebody else's checkout around it"


def test_a_resumed_run_forgets_what_it_does_again(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    prompt = Prompt("p:1", [1, 2], "7")
    group = RolloutGroup(prompt, [Rollout(prompt, [3], [-0.5], [4], "stop")])
    with Tracker(config) as tracker:
        for step in range(4):
            tracker.log(step, {"reward/mean": float(step)})
            tracker.dump_rollouts(step, [group])
    with (tmp_path / "test" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # the run was killed
    with Tracker(config, first_step=2) as tracker:
        tracker.log(2, {"reward/mean": 9.0})
    rows = [json.loads(line) for line in (tmp_path / "test" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reward/mean"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 9.0)]
    dumps = sorted(path.name for path in (tmp_path / "test" / "rollouts").iterdir())
    assert dumps == ["about.json", "step_000000.jsonl", "step_000001.jsonl"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "test" / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(0, 0.0), (1, 1.0), (2, 9.0)]


def test_switches(tmp_path: Path) -> None:
    with Tracker(run_config(tmp_path, tensorboard=False, dump_rollouts=False)) as tracker:
        tracker.log(0, METRICS)
        tracker.dump_rollouts(0, [])
    assert sorted(p.name for p in (tmp_path / "test").rglob("*")) == ["metrics.jsonl", "rollouts"]


@pytest.fixture
def no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_is_online_only_with_a_key(no_wandb_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wandb_is_online()
    no_wandb_key.write_text("machine example.org login user password x\n")
    assert not wandb_is_online()
    no_wandb_key.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_is_online()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not wandb_is_online()
    monkeypatch.delenv("WANDB_MODE")
    no_wandb_key.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_is_online()


def test_plain_progress(tmp_path: Path) -> None:
    out = io.StringIO()
    with progress_display(run_config(tmp_path), out) as progress:
        progress.update(0, METRICS | {"reward/errors": 2.0})
    (line,) = out.getvalue().splitlines()
    assert line.startswith("step 1/3  reward 0.250")
    assert "3.00e-05" in line and "seconds train 1.50" in line and "tokens/s 100" in line and "reward errors 2" in line
    for nothing in (
        progress_display(run_config(tmp_path), None),
        progress_display(run_config(tmp_path, progress=False), out),
    ):
        with nothing as progress:
            progress.update(1, METRICS)
    assert len(out.getvalue().splitlines()) == 1


def test_live_progress() -> None:
    progress = LiveProgress("test", steps=3)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(progress)
    assert "starting" in console.export_text()
    for step, reward in enumerate((0.0, 0.5, 1.0)):
        progress.update(step, METRICS | {"reward/mean": reward})
    console.print(progress)
    text = console.export_text()
    assert "step 3/3" in text and "▁▅█" in text and "1.000" in text
    assert sparkline(deque([1.0, math.nan, 1.0])) == "▁ ▁"


def test_timer() -> None:
    heard: list[str] = []
    timer = VerbTimer(heard.append)
    for _ in range(2):
        with timer("train"):
            time.sleep(0.01)
    with pytest.raises(ValueError), timer("sync"):
        raise ValueError
    assert list(timer.seconds()) == ["train", "sync"] and 0.02 <= timer.seconds()["train"] < 300
    assert heard == ["train", "what follows train"] * 2 + ["sync", "what follows sync"]
    timer.reset()
    assert timer.seconds() == {}


def test_profile_of_a_step(tmp_path: Path) -> None:
    profiler = StepProfiler([1], tmp_path / "profile", rank=3)
    timer = VerbTimer(around=profiler)
    a_NN = torch.randn(64, 64)
    for step in range(3):
        profiler.begin(step)
        for _ in range(2):
            with timer("train"):
                _ = a_NN @ a_NN
        with timer("sync"):
            time.sleep(0.05)
    stem = "step_000001_rank_3"
    names = [f"{stem}.txt", f"{stem}_sync.json", f"{stem}_train.json", f"{stem}_train_2.json"]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    for name, inside in ((names[1], False), (names[3], True)):
        events = json.loads((tmp_path / "profile" / name).read_text())["traceEvents"]
        assert ("aten::mm" in {event.get("name") for event in events}) == inside
    lines = (tmp_path / "profile" / names[0]).read_text().splitlines()
    verbs = [line.split() for line in lines[3:6]]
    assert [row[0] for row in verbs] == ["sync", "train", "train"] or verbs[0][0] == "train"
    (sync,) = (row for row in verbs if row[0] == "sync")
    assert 0.05 <= float(sync[2]) <= float(sync[1]), "asleep is outside operations"
    (products,) = (line.split() for line in lines if line.endswith("aten::mm"))
    assert products[2] == "2" and 0 < float(products[1].rstrip("%")) <= 100
    with pytest.raises(ValueError), timer("train"):  # what a verb raises is not covered
        raise ValueError


def test_curves(tmp_path: Path) -> None:
    from PIL import Image

    directories = [tmp_path / name for name in ("seed_1", "seed_2")]
    for directory in directories:
        directory.mkdir()
        (directory / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, "time": 0.0} | METRICS) + "\n" for s in range(4))
        )
    plot_runs(directories, tmp_path / "plots" / "out.png")
    with Image.open(tmp_path / "plots" / "out.png") as image:
        assert image.format == "PNG" and image.width > 1000
    with pytest.raises(ValueError, match="does not exist"):
        plot_runs([tmp_path], tmp_path / "x.png")
    (directories[0] / "metrics.jsonl").write_text('{"step": 0}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        plot_runs(directories, tmp_path / "x.png")
