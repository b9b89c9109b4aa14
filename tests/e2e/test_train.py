"""`drpo train` as a user runs it: the quickstart recipe with the real server, its death, Ctrl-C, and refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors import safe_open

pytestmark = [pytest.mark.server, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
LIMIT_S = 300
DIGITS = "{source: {type: function, function: 'drpo_megatron.data.examples:repeat_digit', size: 6, seed: 9}}"


def command(directory: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        *("-m", "drpo_megatron.cli", "train", str(QUICKSTART)),
        f"tracking.directory={directory}",
        f"model.path={directory / 'model'}",
        "name=run",
        "tracking.wandb=false",
        *overrides,
    ]


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def metrics(directory: Path) -> list[dict[str, Any]]:
    path = directory / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def server_process(launcher: int) -> psutil.Process:
    """The rollout server among the descendants of the process that the test started."""
    (found,) = server_processes(launcher)
    return found


def server_processes(launcher: int) -> list[psutil.Process]:
    return [p for p in descendants(launcher) if "drpo_megatron.platform.sglang_cpu" in p.info["cmdline"]]


def descendants(process: int) -> list[psutil.Process]:
    """With what they are in `info`. Those that end while they are looked at, as helpers of a start do, are left out."""
    wanted = {p.pid for p in psutil.Process(process).children(recursive=True)}
    return [p for p in psutil.process_iter(["name", "cmdline", "ppid"]) if p.pid in wanted and p.info["cmdline"]]


def left_over(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after a minute. One that ended and waits for its parent to notice does not run."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    zombies = {p.pid for p in psutil.process_iter(["status"]) if p.info["status"] == psutil.STATUS_ZOMBIE}
    return [p for p in alive if p.is_running() and p.pid not in zombies]


def test_training_survives_a_dead_server(tmp_path: Path) -> None:
    """Every metric is there, the engines agree after each sync, a killed server is replaced, the model is exported."""
    with subprocess.Popen(
        command(tmp_path, "training.steps=4", "parallel.sequence_parallel=true", "training.profile_steps=[3]"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_for(lambda: metrics(tmp_path) or process.poll() is not None, "the first step")
        if process.poll() is None:
            server_process(process.pid).send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    steps = metrics(tmp_path)
    assert [s["step"] for s in steps] == [0, 1, 2, 3]
    assert steps[-1]["sync/server_restarts"] == 1
    for step in steps:
        assert step["mismatch/abs_dlogp_max"] < 1e-3
        assert step["ratio/max_abs_dev"] < 1e-3
        assert step["sync/verified_parameters"] > 0
        assert step["sync/probe_abs_dlogp_max"] < 1e-3
        assert step["staleness/max"] == 1  # the second update trains on tokens that the first one's weights sampled
        assert step["response/truncated_frac"] == 1.0
    expected = (
        "loss/mean reward/mean reward/pass@1 drpo/weight_q01 drpo/weight_q50 drpo/weight_q99 drpo/corrective_frac "
        "drpo/beyond_delta_frac mismatch/k1 mismatch/k3 mismatch/abs_dlogp_mean mismatch/tv mismatch/ess "
        "policy/entropy staleness/mean perf/step_s perf/generate_s perf/train_s perf/sync_s perf/tokens_per_s "
        "perf/mfu perf/tflops_per_gpu sync/bytes sync/seconds memory/peak_gb grad_norm lr "
        "response/len_mean response/len_max time"
    )
    assert set(expected.split()) <= steps[0].keys()

    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000003.jsonl").open()]
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
    with (
        safe_open(tmp_path / "model" / "model.safetensors", "pt") as before,
        safe_open(next((tmp_path / "run" / "hf").glob("*.safetensors")), "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        assert any((before.get_tensor(n) != after.get_tensor(n)).any() for n in before.keys())  # noqa: SIM118
    assert list((tmp_path / "run" / "tb").iterdir())
    assert json.loads((tmp_path / "run" / "versions.json").read_text())["torch"] == version("torch")
    assert str(tmp_path / "run") in output.splitlines()[-1]
    check_profile(tmp_path / "run" / "profile", step=3)
    check_view(tmp_path / "run")


def check_view(run: Path) -> None:
    """`drpo top` of the run, when it is over."""
    top = [sys.executable, "-m", "drpo_megatron.cli", "top", str(run), "--once"]
    shown = subprocess.run(top, capture_output=True, text=True, check=True).stdout
    assert "run  step 4/4  done" in shown and "memory of rank 0" in shown and "staleness mean, max" in shown
    # One restart, and why: whoever noticed the death first says it in its own words.
    assert re.search(r"server-0 +serving +8 +(\d+ +\d+|– +–) +1 +(SGLang ended|no connection)", shown), shown


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


def test_trainer_and_servers_take_turns(tmp_path: Path) -> None:
    """Colocated, as it would be set for GPUs: bf16, sharded main weights, a server on each rank's device. Both servers
    die and come back while the trainer waits for them in host memory. An evaluation is one more turn of theirs.
    """
    overrides = (
        "training.steps=5",
        "evaluation.every=2",
        f"evaluation.sets.digits={DIGITS}",
        "rollout.prompts_per_step=8",
        "rollout.placement=colocated",
        "rollout.server.count=2",
        "model.dtype=bfloat16",
        "parallel.tensor=1",
        "parallel.data=2",
        "optimizer.overlap_param_gather=true",
        "sync.transport=shared_memory",
    )
    with subprocess.Popen(
        command(tmp_path, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(lambda: metrics(tmp_path) or process.poll() is not None, "the first step")
        servers = server_processes(process.pid) if process.poll() is None else []
        for server in servers:
            server.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    assert len(servers) == 2 and "no memory becomes free" in output
    steps = metrics(tmp_path)
    assert [s["step"] for s in steps] == [0, 1, 2, 3, 4]
    assert [s["sync/servers"] for s in steps] == [2] * 5
    assert steps[-1]["sync/server_restarts"] == 2
    assert ["evaluation/digits/avg@1" in s for s in steps] == [False, True, False, True, True]
    for step in steps:
        # bf16 on both sides: a few units in the last place of a log-probability of some nats
        assert step["mismatch/abs_dlogp_mean"] < 0.05
        assert step["sync/verified_parameters"] > 0
        assert 0 < step["sync/probe_abs_dlogp_max"] < 0.5
        assert step["train/skipped_updates"] == 0 and step["grad_norm"] > 0
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step_000004.jsonl").open()]
    assert {v for r in rollouts for v in r["weight_versions"]} == {8}
    assert list((tmp_path / "run" / "hf").glob("*.safetensors"))


@pytest.mark.parametrize("victim", ["launcher-ctrl-c", "launcher-killed"])
def test_nothing_is_left_running(tmp_path: Path, victim: str) -> None:
    with subprocess.Popen(
        command(tmp_path, "training.steps=1000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal: a background job of a shell ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        wait_for(lambda: metrics(tmp_path) or process.poll() is not None, "the first step")
        family = descendants(process.pid)
        assert len(family) >= 5  # torchrun, two ranks, the server and its workers
        process.send_signal(signal.SIGINT if victim == "launcher-ctrl-c" else signal.SIGKILL)
        _, errors = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert not alive
    if victim == "launcher-ctrl-c":
        assert process.returncode == 130
        assert "nothing is left running" in errors


@pytest.mark.parametrize("stopped", ["the whole group", "the scheduler"])
def test_a_stopped_server_is_explained(tmp_path: Path, stopped: str) -> None:
    """SIGSTOP in mid-run: the server neither dies nor answers. With its scheduler alone stopped it still answers
    /model_info, and generates nothing.
    """
    limit = ["training.verb_timeout_s=20", "training.steps=1000"]
    with subprocess.Popen(
        command(tmp_path, *limit), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(lambda: metrics(tmp_path) or process.poll() is not None, "the first step")
        family = descendants(process.pid)
        server = server_process(process.pid)
        if stopped == "the whole group":
            os.killpg(server.pid, signal.SIGSTOP)
            victim = server.pid
        else:
            victim = next(p.pid for p in descendants(server.pid) if p.info["name"].startswith("sglang::schedul"))
            os.kill(victim, signal.SIGSTOP)
        steps = len(metrics(tmp_path))
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert process.returncode == 75, output
    assert not alive
    assert len(metrics(tmp_path)) <= steps + 1
    log = tmp_path / "run" / "log"
    stacks = [(log / f"stacks_rank_{rank}.txt").read_text() for rank in (0, 1)]
    verb = next(name for name in ("generate", "sync") if f", {name}: not done after 20 s" in stacks[0])
    assert all(f"rank {rank}, step " in text and f", {verb}: not done" in text for rank, text in enumerate(stacks))
    waits_in = {"generate": 'rollout/producer.py", line', "sync": 'rollout/admin.py", line'}
    assert f"in {verb}\n" in stacks[0] and waits_in[verb] in stacks[0]
    assert f"in {verb}\n" in stacks[1] and "in broadcast" in stacks[1]
    assert f"process {victim} (" in output and "stopped by a signal (SIGSTOP)" in output
    answer = "answers, weight version" if stopped == "the scheduler" else "/model_info did not answer within 2 s"
    for text in (output, (log / "error_rank_0.txt").read_text(), (log / "rank_0.log").read_text()):
        assert f"{verb}: not done after 20 s; the limit is training.verb_timeout_s = 20 s" in text
        assert answer in text and str(log / "stacks_rank_*.txt") in text and str(log / "server-0.log") in text


def test_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    before = set(psutil.pids())
    done = subprocess.run([*command(tmp_path), "--dry-run"], capture_output=True, text=True, check=True)
    assert "rank 1: tensor 1" in done.stdout
    assert "torch.distributed.run" in done.stdout and "--nproc-per-node=2" in done.stdout
    assert "sglang" in done.stdout
    assert "updates_per_batch: 2" in done.stdout
    assert not (tmp_path / "run").exists()
    assert not [p for p in psutil.process_iter(["ppid"]) if p.pid not in before and p.info["ppid"] == os.getpid()]


@pytest.mark.parametrize("schedule", ["one_step_off", "asynchronous"])
def test_ahead_of_training_with_two_servers(tmp_path: Path, schedule: str) -> None:
    """One of the servers dies: training goes on with the other, no sample is lost or trained twice, none is too old.
    Evaluations in between change nothing of that.
    """
    overrides = [
        "evaluation.every=4",
        f"evaluation.sets.digits={DIGITS}",
        "training.steps=20",
        "rollout.server.count=2",
        f"rollout.schedule={schedule}",
        "training.export=false",
        *(["rollout.max_staleness=4", "sync.transport=delta"] if schedule == "asynchronous" else []),
    ]
    limit = 4 if schedule == "asynchronous" else 2
    with subprocess.Popen(
        command(tmp_path, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_for(lambda: len(metrics(tmp_path)) > 1 or process.poll() is not None, "the second step")
        family = descendants(process.pid) if process.poll() is None else []
        commands = {p: " ".join(p.info["cmdline"]) for p in family}
        assert any("router" in line for line in commands.values()), commands
        ranks = {p.pid for p, line in commands.items() if "drpo_megatron.training.main" in line}
        victims = [p for p, line in commands.items() if "sglang_cpu" in line and p.info["ppid"] in ranks]
        assert len(victims) == 2
        victims[0].send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert process.returncode == 0, output
    assert not alive
    steps = metrics(tmp_path)
    assert len(steps) == 20 and steps[0]["sync/servers"] == 2 and min(s["sync/servers"] for s in steps) == 1
    assert [s["step"] for s in steps if "evaluation/digits/avg@1" in s] == [3, 7, 11, 15, 19]
    # the second update of a batch is one more version away
    assert max(s["staleness/max"] for s in steps) == limit + 1
    trained = []
    for step in range(20):
        lines = (tmp_path / "run" / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        trained += [json.loads(line)["prompt"]["id"] for line in lines]
    assert set(Counter(trained).values()) == {8}, "all samples of a prompt, once"
    assert len(set(trained)) == 20 * 32


def test_a_real_model_over_two_pipeline_stages(tmp_path: Path) -> None:
    """SmolLM2: converted from its package, split into stages, gathered from them for the server and for the export."""
    config = ROOT / "configs" / "smollm2-arithmetic.yaml"
    overrides = [
        f"tracking.directory={tmp_path}",
        f"model.path={tmp_path / 'model'}",
        "tracking.wandb=false",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=2",
        "training.steps=2",
    ]
    arguments = [sys.executable, "-m", "drpo_megatron.cli", "train", str(config), *overrides]
    subprocess.run(arguments, check=True, timeout=600, stdout=subprocess.DEVNULL)
    path = tmp_path / "smollm2-arithmetic"
    steps = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(s["mismatch/abs_dlogp_max"] < 1e-3 and s["ratio/max_abs_dev"] < 1e-3 for s in steps)
    assert (path / "hf" / "tokenizer.json").exists()
