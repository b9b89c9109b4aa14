"""A user stops a run, goes on with it, in another layout too, trains its rollouts again, and asks where runs part.

The run that was never stopped is the reference; what must be equal to it is equal to the bit.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import held_rewards
from tests.support.runs import (
    LIMIT_S,
    QUICKSTART,
    SMALL,
    command,
    descendants,
    dump,
    dump_path,
    left_over,
    metrics,
    server_processes,
    settings,
    started,
    started_with,
    wait_for,
    wait_for_steps,
    without_times,
)
from tests.support.server_pool import Loans, ServerPool
from tests.support.trainer import Outcome, drpo, drpo_apart, train

pytestmark = [pytest.mark.server, pytest.mark.distributed]

STEPS = 6
LR, WARMUP = 2e-3, 3
SETTINGS = (
    *SMALL,
    f"training.steps={STEPS}",
    "training.deterministic=true",
    "save.every=2",
    "save.hf_every=4",
    "rollout.sampling.temperature=0.8",  # what a trainer that forgets it would get wrong
    f"optimizer.lr={LR}",
    f"optimizer.warmup_steps={WARMUP}",
    "optimizer.schedule=linear",
    "reward.function=tests.support.held_rewards:odd_characters",
    held_rewards.PATIENT,
)
# Of servers and of the process: not functions of the rollouts.
ELSEWHERE = ("sync/", "rollout/", "save/")


def learning_rate(update: int, updates: int) -> float:
    """Of the update with this number, from 0: linear warm-up from 0, then linear decay to 0 at the last."""
    return LR * update / WARMUP if update <= WARMUP else LR * (updates - update) / (updates - WARMUP)


@dataclass(frozen=True)
class Whole:
    """The run that was never stopped. server: where it sampled. sampled: what `drpo rollout` said before, there too."""

    root: Path
    server: str
    sampled: Outcome
    outcome: Outcome


@pytest.fixture(scope="module")
def whole(servers: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    root = tmp_path_factory.mktemp("whole")
    borrow = Loans(servers)
    server = f"rollout.server.addresses=[{borrow('deterministic').url}]"
    # The server has the weights that a run begins with.
    sampled = drpo_apart("rollout", QUICKSTART, *settings(root, "sampled"), *SETTINGS, server, "--steps", "1")
    outcome = train(QUICKSTART, *settings(root), *SETTINGS, server)
    yield Whole(root, server, sampled.done(), outcome.done())
    borrow.give_back()


def test_a_run_that_was_never_stopped(whole: Whole) -> None:
    """The trainer follows the servers at their temperature, learns at the rates that were asked for, and what it has
    learned is exported; the display shows the run as done.
    """
    steps = whole.outcome.metrics
    assert [s["step"] for s in steps] == list(range(STEPS))
    assert all(s["grad_norm"] > 0 and s["mismatch/abs_dlogp_max"] < 1e-3 for s in steps)
    # The rate of a step is that of the second of its two updates.
    expected = [learning_rate(2 * step + 1, 2 * STEPS) for step in range(STEPS)]
    assert [s["lr"] for s in steps] == pytest.approx(expected, rel=1e-9)
    before = load_file(whole.root / "model" / "model.safetensors")
    after = load_file(whole.root / "run" / "hf" / "model.safetensors")
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    assert f"done: {whole.root / 'run'} holds " in whole.outcome.output
    shown = drpo("top", whole.root / "run", "--once").done().output
    assert f"run  step {STEPS}/{STEPS}  done" in shown
    assert "memory of rank 0" in shown and "staleness mean, max" in shown


def test_stopped_and_gone_on(whole: Whole, tmp_path: Path) -> None:
    """By a signal in a step whose samples have no rewards yet; then gone on with in two layouts."""
    with started(command(tmp_path, *SETTINGS), **held_rewards.after_steps(tmp_path / "run", 3)) as process:
        wait_for_steps(process, tmp_path, 3)
        family = descendants(process.pid)
        (server,) = server_processes(tmp_path)
        assert server in family
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert process.returncode == 75, output
    assert not alive
    assert "holds a checkpoint" in output and "drpo train --resume" in output
    assert 3 <= len(metrics(tmp_path)) < STEPS

    train(QUICKSTART, *settings(tmp_path), *SETTINGS, whole.server, "--resume").done()
    assert without_times(metrics(tmp_path)) == without_times(whole.outcome.metrics)
    for name in ("hf/model.safetensors", "exports/step_000004/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole.root / "run" / name).read_bytes()
    for step in range(STEPS):
        assert dump_path(tmp_path, step).read_text() == dump_path(whole.root, step).read_text()
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"]
    same = drpo("diff", whole.root / "run", tmp_path / "run").done()
    assert f" are the same in all {STEPS} steps" in same.output

    # Two steps more, in another layout, without determinism, ahead of training.
    other = ("training.steps=8", "training.deterministic=false", "parallel.tensor=1", "parallel.data=2")
    more = ("rollout.schedule=one_step_off", whole.server, "--resume")
    train(QUICKSTART, *settings(tmp_path), *SETTINGS, *other, *more).done()
    steps = metrics(tmp_path)
    assert [s["step"] for s in steps] == list(range(8))
    assert without_times(steps[:STEPS]) == without_times(whole.outcome.metrics)
    assert [s["lr"] for s in steps[STEPS:]] == pytest.approx([learning_rate(n, 16) for n in (13, 15)], rel=1e-9)
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step_000008" / "manifest.json").read_text())
    assert manifest["layout"]["data"] == 2 and manifest["version"] == 16
    parted = drpo("diff", whole.root / "run", tmp_path / "run")
    assert parted.code == 1 and f"alone has 2 steps; the {STEPS} that both have" in parted.output


def test_a_replay_is_the_run_again(whole: Whole, tmp_path: Path) -> None:
    """Without a server; and the replay's rollouts give it once more."""
    names = ("replay", "again")
    dumps = (whole.root / "run", tmp_path / "replay" / "rollouts")
    for name, rollouts in zip(names, dumps, strict=True):
        train(QUICKSTART, *settings(tmp_path, name), *SETTINGS, "--rollouts", str(rollouts)).done()
    first = without_times(whole.outcome.metrics, *ELSEWHERE)
    assert {"loss/mean", "mismatch/k3", "policy/entropy", "reward/mean", "staleness/max"} <= first[0].keys()
    for name in names:
        assert without_times(metrics(tmp_path, name), *ELSEWHERE) == first
    trained = "hf/model.safetensors"
    weights = [(tmp_path / name / trained).read_bytes() for name in names]
    assert weights[0] == weights[1] == (whole.root / "run" / trained).read_bytes()
    assert weights[0] != (tmp_path / "model" / "model.safetensors").read_bytes()
    for step in range(STEPS):
        assert dump(whole.root, step) == dump(tmp_path, step, "again")
    logs = (path.name for path in (tmp_path / "replay" / "log").iterdir())
    assert not [name for name in logs if name.startswith("server")]
    assert not started_with(str(tmp_path))
    wait_for(lambda: not started_with(str(whole.root)), "the end of what the run started")


def test_sampling_alone_gives_the_first_samples_of_the_run(whole: Whole) -> None:
    """`drpo rollout`: the same seeds and weights; nobody has computed advantages, or trained."""
    reward = whole.outcome.metrics[0]["reward/mean"]
    said = whole.sampled.output
    assert "32 samples of 4.0 tokens" in said and f"step 1/1  reward {reward:.4f}" in said
    sampled = [r | {"advantage": 0.0, "logp": [], "loss_weight": []} for r in dump(whole.root, 0)]
    assert dump(whole.root, 0, "sampled") == sampled
    of_run, of_sampling = (
        json.loads((whole.root / name / "rollouts" / "about.json").read_text()) for name in ("run", "sampled")
    )
    assert of_sampling == of_run | {"run": "sampled"}
    assert not [p for p in started_with(str(whole.root / "sampled")) if p.pid != os.getpid()]
