"""`drpo train` as a user runs it, where it takes minutes: every way in which a run is killed or stopped, placements and
schedules that the stories of `tests/e2e` do not have, and a real model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import held_rewards
from tests.support.runs import (
    DIGITS,
    LIMIT_S,
    MOE,
    QUICKSTART,
    ROOT,
    SMALL,
    command,
    descendants,
    dump,
    left_over,
    metrics,
    run,
    server_processes,
    settings,
    started,
    wait_for,
    wait_for_steps,
)
from tests.support.trainer import read_lines, train

pytestmark = [pytest.mark.server, pytest.mark.distributed]


def test_a_killed_launcher_leaves_nothing_running(tmp_path: Path) -> None:
    with started(command(tmp_path, "training.steps=1000")) as process:
        wait_for_steps(process, tmp_path, 1)
        family = descendants(process.pid)
        assert len(family) >= 5  # torchrun, two ranks, the server and its workers
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LIMIT_S)
        assert not left_over(family)


@pytest.mark.parametrize("stopped", ["the whole group", "the scheduler"])
def test_a_stopped_server_is_explained(tmp_path: Path, stopped: str) -> None:
    """SIGSTOP in mid-run: the server neither dies nor answers. With its scheduler alone stopped it still answers
    /model_info, and generates nothing.
    """
    limit_s = 60
    words = (f"training.verb_timeout_s={limit_s}", "training.steps=1000")
    with started(command(tmp_path, *words)) as process:
        wait_for_steps(process, tmp_path, 1)
        family = descendants(process.pid)
        (server,) = server_processes(tmp_path)
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
    verb = next(name for name in ("generate", "sync") if f", {name}: not done after {limit_s} s" in stacks[0])
    assert all(f"rank {rank}, step " in text and f", {verb}: not done" in text for rank, text in enumerate(stacks))
    waits_in = {"generate": 'rollout/producer.py", line', "sync": 'rollout/admin.py", line'}
    assert f"in {verb}\n" in stacks[0] and waits_in[verb] in stacks[0]
    assert f"in {verb}\n" in stacks[1] and "in broadcast" in stacks[1]
    assert f"process {victim} (" in output and "stopped by a signal (SIGSTOP)" in output
    answer = "answers, weight version" if stopped == "the scheduler" else "/model_info did not answer within 2 s"
    for text in (output, (log / "error_rank_0.txt").read_text(), (log / "rank_0.log").read_text()):
        assert f"{verb}: not done after {limit_s} s; the limit is training.verb_timeout_s = {limit_s} s" in text
        assert answer in text and str(log / "stacks_rank_*.txt") in text and str(log / "server-0.log") in text


def test_a_scheduler_ends_the_whole_job(tmp_path: Path) -> None:
    """SIGTERM reaches every process, the server too: the checkpoint is written all the same."""
    words = (*SMALL, "save.every=2", "rollout.schedule=asynchronous", "rollout.max_staleness=4")
    with started(command(tmp_path, *words, "training.steps=1000")) as process:
        wait_for_steps(process, tmp_path, 2)
        family = descendants(process.pid)
        for victim in [*family, process]:
            victim.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert process.returncode == 75, output
    assert not alive
    done = len(metrics(tmp_path))
    assert (tmp_path / "run" / "checkpoints" / f"step_{done:06d}" / "manifest.json").exists()
    run(command(tmp_path, *words, f"training.steps={done + 1}", "--resume")).done()
    assert [s["step"] for s in metrics(tmp_path)] == list(range(done + 1))


def test_trainer_and_servers_take_turns(tmp_path: Path) -> None:
    """Colocated, as it would be set for GPUs: bf16, sharded main weights, a server on each rank's device. Both servers
    die and come back while the trainer waits for them in host memory. An evaluation is one more turn of theirs.

    Their samples' rewards are held until both are being started again: the step needs them then.
    """
    words = (
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
        "reward.function=tests.support.held_rewards:odd_characters",
        held_rewards.PATIENT,
    )
    with started(command(tmp_path, *words), **held_rewards.after_steps(tmp_path / "run", 1)) as process:
        wait_for_steps(process, tmp_path, 1)
        servers = server_processes(tmp_path)
        for server in servers:
            server.send_signal(signal.SIGKILL)
        wait_for(lambda: len({*server_processes(tmp_path)} - {*servers}) == 2, "two new servers")
        (tmp_path / "run" / "go").touch()
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
    assert {v for r in dump(tmp_path, 4) for v in r["weight_versions"]} == {8}
    assert list((tmp_path / "run" / "hf").glob("*.safetensors"))


def test_one_step_ahead_of_training_one_of_two_servers_dies(tmp_path: Path) -> None:
    """Training goes on with the other, no sample is lost or trained twice, none is too old; evaluations in between."""
    words = (
        "evaluation.every=4",
        f"evaluation.sets.digits={DIGITS}",
        "training.steps=20",
        "rollout.server.count=2",
        "rollout.schedule=one_step_off",
        "training.export=false",
    )
    with started(command(tmp_path, *words)) as process:
        wait_for_steps(process, tmp_path, 2)
        family = descendants(process.pid)
        assert any("router" in " ".join(p.info["cmdline"]) for p in family)
        victim, _ = server_processes(tmp_path)
        victim.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=LIMIT_S)
        alive = left_over(family)
    assert process.returncode == 0, output
    assert not alive
    steps = metrics(tmp_path)
    assert len(steps) == 20 and steps[0]["sync/servers"] == 2 and min(s["sync/servers"] for s in steps) == 1
    assert [s["step"] for s in steps if "evaluation/digits/avg@1" in s] == [3, 7, 11, 15, 19]
    assert max(s["staleness/max"] for s in steps) == 3  # the second update of a batch is one more version away
    trained = Counter(r["prompt"]["id"] for step in range(20) for r in dump(tmp_path, step))
    assert set(trained.values()) == {8}, "all samples of a prompt, once"
    assert len(trained) == 20 * 32


def test_a_mixture_of_experts_beside_its_server(tmp_path: Path) -> None:
    """Placed apart from the trainer, where `tests/e2e` has them take turns; engines that always differ by more than
    that stop a run, and the message tells that the weights do not differ.
    """
    run(command(tmp_path, *SMALL, "training.steps=3", config=MOE)).done()
    steps = metrics(tmp_path)
    assert [s["step"] for s in steps] == [0, 1, 2]
    for step in steps:
        assert step["mismatch/router_disagreement"] == 0 and step["router/own_disagreement"] < 0.02
        assert step["mismatch/abs_dlogp_max"] < 1e-3 and step["sync/probe_abs_dlogp_max"] < 1e-3
    assert {v for r in dump(tmp_path, 2) for v in r["weight_versions"]} == {4}

    stopped = run(command(tmp_path, "training.steps=1", "sync.probe_tolerance=1e-12", config=MOE))
    assert stopped.code == 1
    said = (tmp_path / "run" / "log" / "error_rank_0.txt").read_text()
    assert said.startswith("ProbeMismatch: trainer and rollout server http://127.0.0.1:")
    assert "sync.probe_tolerance is 1e-12; no tensor differs: the engines compute differently" in said
    assert said.removeprefix("ProbeMismatch: ").strip() in stopped.output


def test_rollouts_alone_in_fp8(tmp_path: Path) -> None:
    """The mismatch is rounding's: in float32 it is below 1e-9, here it is above 1e-5."""
    words = (*SMALL, "training.steps=2", "training.export=false", "fp8.rollout=true", "fp8.backend=emulate")
    train(QUICKSTART, *settings(tmp_path), *words, "fp8.unquantized_first_layers=1").done()
    steps = metrics(tmp_path)
    assert len(steps) == 2
    for step in steps:
        assert 1e-5 < step["mismatch/k3"] < 0.1 and step["sync/verified_parameters"] == 19
        assert 1e-2 < step["sync/probe_abs_dlogp_max"] < 5
    layers = json.loads((tmp_path / "run" / "fp8_layers.json").read_text())
    assert set(layers) == {"servers"}
    parts = ("mlp.down_proj", "mlp.gate_up_proj", "self_attn.o_proj", "self_attn.qkv_proj")
    assert layers["servers"]["fp8"] == [f"model.layers.1.{part}.weight" for part in parts]
    assert layers["servers"]["not"] == [f"model.layers.0.{part}.weight" for part in parts]


def test_a_layer_that_is_not_quantized_stops_the_run(tmp_path: Path) -> None:
    """A server whose list of exceptions is taken by parts of names, as others have done."""
    broken = tmp_path / "broken"
    broken.mkdir()
    # Python runs this in every process of the run.
    (broken / "sitecustomize.py").write_text(
        "import sys\n"
        "def broken():\n"
        "    import sglang.srt.layers.quantization.utils as utils\n"
        "    utils.is_layer_skipped = lambda prefix, ignored_layers, fused_mapping: 'layers.1.mlp' in prefix\n"
        "    install()\n"
        "if 'drpo_megatron.platform.sglang_cpu' in sys.orig_argv:\n"
        "    import drpo_megatron.platform.sglang_cpu_fp8 as emulation\n"
        "    install, emulation.install = emulation.install, broken\n"
    )
    path = os.pathsep.join([str(broken), os.environ.get("PYTHONPATH", "")])
    words = (*SMALL, "training.steps=2", "training.export=false", "fp8.rollout=true", "fp8.backend=emulate")
    outcome = run(command(tmp_path, *words), PYTHONPATH=path)
    assert outcome.code == 1
    assert "2 layers should be in FP8 and are not: model.layers.1.mlp.down_proj.weight" in outcome.output


def test_a_real_model_over_two_pipeline_stages(tmp_path: Path) -> None:
    """SmolLM2: converted from its package, split into stages, gathered from them for the server and for the export."""
    config = ROOT / "configs" / "smollm2-arithmetic.yaml"
    words = (
        f"tracking.directory={tmp_path}",
        f"model.path={tmp_path / 'model'}",
        "tracking.wandb=false",
        "rollout.prompts_per_step=4",
        "rollout.samples_per_prompt=2",
        "training.steps=2",
    )
    run([sys.executable, "-m", "drpo_megatron.cli", "train", str(config), *words]).done()
    path = tmp_path / "smollm2-arithmetic"
    steps = read_lines(path / "metrics.jsonl")
    assert len(steps) == 2
    assert all(s["mismatch/abs_dlogp_max"] < 1e-3 and s["ratio/max_abs_dev"] < 1e-3 for s in steps)
    assert (path / "hf" / "tokenizer.json").exists()
