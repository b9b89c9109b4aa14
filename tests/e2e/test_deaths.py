"""Servers of a run die, and a user presses Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tests.support import held_rewards
from tests.support.runs import (
    DIGITS,
    LIMIT_S,
    QUICKSTART,
    command,
    descendants,
    dump,
    left_over,
    metrics,
    server_processes,
    settings,
    started,
    started_with,
    wait_for,
    wait_for_steps,
)
from tests.support.server_pool import ServerPool
from tests.support.trainer import drpo, train

pytestmark = [pytest.mark.server, pytest.mark.distributed]

METRICS = (
    "loss/mean reward/mean reward/pass@1 drpo/weight_q01 drpo/weight_q50 drpo/weight_q99 drpo/corrective_frac "
    "drpo/beyond_delta_frac mismatch/k1 mismatch/k3 mismatch/abs_dlogp_mean mismatch/tv mismatch/ess "
    "policy/entropy staleness/mean perf/step_s perf/generate_s perf/train_s perf/sync_s perf/tokens_per_s "
    "perf/mfu perf/tflops_per_gpu sync/bytes sync/seconds memory/peak_gb grad_norm lr "
    "response/len_mean response/len_max time"
)


def test_a_server_dies_and_a_user_presses_ctrl_c(tmp_path: Path) -> None:
    """Every metric is there, the engines agree after each sync, the killed server is replaced, and Ctrl-C leaves
    nothing running.
    """
    words = ("training.steps=1000", "parallel.sequence_parallel=true", "training.profile_steps=[3]")
    with started(command(tmp_path, *words)) as process:
        wait_for_steps(process, tmp_path, 1)
        (server,) = server_processes(tmp_path)
        server.send_signal(signal.SIGKILL)
        # One more than are looked at: a step is written when the next begins.
        wait_for_steps(process, tmp_path, 5)
        family = descendants(process.pid)
        assert len(family) >= 5  # torchrun, two ranks, the server and its workers
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert not alive
    assert process.returncode == 130 and "nothing is left running" in output
    assert "Ctrl-C" not in output  # there is no checkpoint to wait for
    steps = metrics(tmp_path)
    assert [s["step"] for s in steps] == list(range(len(steps)))
    assert steps[4]["sync/server_restarts"] == 1
    for step in steps:
        assert step["mismatch/abs_dlogp_max"] < 1e-3
        assert step["ratio/max_abs_dev"] < 1e-3
        assert step["sync/verified_parameters"] > 0
        assert step["sync/probe_abs_dlogp_max"] < 1e-3
        assert step["staleness/max"] == 1  # the second update trains on tokens that the first one's weights sampled
        assert step["response/truncated_frac"] == 1.0
    assert set(METRICS.split()) <= steps[0].keys()

    rollouts = dump(tmp_path, 3)
    assert len(rollouts) == 32 * 8
    assert {v for r in rollouts for v in r["weight_versions"]} == {6}  # two updates in each of the three steps before
    groups = [rollouts[i : i + 8] for i in range(0, len(rollouts), 8)]
    distances = [abs(p - m) for g in groups[::2] for r in g for p, m in zip(r["logp"], r["logmu"], strict=True)]
    assert max(distances) == pytest.approx(steps[3]["mismatch/abs_dlogp_max"], rel=1e-6)  # of the first update
    assert sum(distances) / len(distances) == pytest.approx(steps[3]["mismatch/abs_dlogp_mean"], rel=1e-6)
    weights = [w for r in rollouts if r["advantage"] for w in r["loss_weight"]]
    assert np.quantile(weights, [0.01, 0.99]).tolist() == pytest.approx(
        [steps[3]["drpo/weight_q01"], steps[3]["drpo/weight_q99"]]
    )
    assert list((tmp_path / "run" / "tb").iterdir())
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["torch"] == version("torch")
    check_profile(tmp_path / "run" / "profile", step=3)
    # One restart, and why: whoever noticed the death first says it in its own words.
    shown = drpo("top", tmp_path / "run", "--once").done().output
    assert re.search(r"server-0 +serving +\d+ +(\d+ +\d+|– +–) +1 +(SGLang ended|no connection)", shown), shown


def check_profile(directory: Path, step: int) -> None:
    """A trace of every verb on each rank, that holds the verb and its matrix products; and a summary."""
    verbs = {"generate", "advantages", "pack", "train", "train_2", "sync", "save"}
    for rank in (0, 1):
        stem = f"step_{step:06d}_rank_{rank}"
        assert {path.stem for path in directory.glob(f"{stem}_*.json")} == {f"{stem}_{verb}" for verb in verbs}
        traced: set[str] = set()
        for verb in verbs:
            events = json.loads((directory / f"{stem}_{verb}.json").read_text())["traceEvents"]
            names = {event.get("name") for event in events}
            traced |= names
            assert verb.removesuffix("_2") in names
            assert ("aten::mm" in names) == verb.startswith(("train", "sync")), verb  # the probe after a sync
        summary = (directory / f"{stem}.txt").read_text()
        first, operations = summary.split("operations on the CPU", 1)
        assert f"step {step}, rank {rank}" in first and all(f"\n{verb} " in first for verb in verbs - {"train_2"})
        rows = [line.split() for line in operations.strip().splitlines()[2:]]
        assert len(rows) == 10 and {row[-1] for row in rows} <= traced
        own_ms = [float(row[0]) for row in rows]
        assert own_ms == sorted(own_ms, reverse=True) and own_ms[0] > 0
    assert len(list(directory.iterdir())) == 2 * (len(verbs) + 1), "of one step alone"


def test_ahead_of_training_one_of_two_servers_dies(servers: ServerPool, tmp_path: Path) -> None:
    """Training goes on with the other, no sample is lost or trained twice, none is too old. Evaluations in between
    change nothing of that. The first sample is held until the server is dead: the run cannot be over before.
    """
    steps, prompts, limit = 12, 8, 4
    words = (
        f"training.steps={steps}",
        f"rollout.prompts_per_step={prompts}",
        "rollout.server.count=2",
        "rollout.server.max_restarts=0",
        "rollout.schedule=asynchronous",
        f"rollout.max_staleness={limit}",
        "sync.transport=delta",
        "evaluation.every=5",
        f"evaluation.sets.digits={DIGITS}",
        "reward.function=tests.support.held_rewards:first_held",
        "reward.workers=2",
        held_rewards.PATIENT,
        "training.export=false",
    )

    def kill_one() -> list[str]:
        """What ran then."""
        try:
            wait_for(lambda: len(metrics(tmp_path)) >= 2 or ended.is_set(), "the second step")
            victim, _ = server_processes(tmp_path)
            others = [" ".join(p.info["cmdline"]) for p in descendants(os.getpid())]
            victim.send_signal(signal.SIGKILL)
        finally:
            (tmp_path / "go").touch()
        return others

    ended = threading.Event()
    held = {held_rewards.FIRST: str(tmp_path)}
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_one)
        try:
            outcome = train(QUICKSTART, *settings(tmp_path), *words, launch=servers.launch, **held)
        finally:
            ended.set()
    outcome.done()
    assert any("router" in line for line in killing.result())
    assert not started_with(str(tmp_path))
    rows = metrics(tmp_path)
    assert len(rows) == steps and rows[0]["sync/servers"] == 2 and min(s["sync/servers"] for s in rows) == 1
    assert [s["step"] for s in rows if "evaluation/digits/avg@1" in s] == [4, 9, 11]
    # Of the held sample, which version 0 sampled; the second update of its batch is one more version away.
    assert max(s["staleness/max"] for s in rows) == limit + 1
    trained = Counter(r["prompt"]["id"] for step in range(steps) for r in dump(tmp_path, step))
    assert set(trained.values()) == {8}, "all samples of a prompt, once"
    assert len(trained) == steps * prompts
