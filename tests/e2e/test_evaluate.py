"""Evaluation with the real server: during training, of a model directory, and by a server that runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config.schema import ServerConfig
from drpo_megatron.data.examples import repeat_digit
from drpo_megatron.evaluation.statistics import pass_at_k
from drpo_megatron.models.recipes import ensure_model
from drpo_megatron.rewards.examples import matching_characters
from drpo_megatron.rollout.server import SGLangServer
from tests.e2e.test_resume import without_times
from tests.e2e.test_train import LIMIT_S, QUICKSTART, command, metrics

pytestmark = [pytest.mark.server, pytest.mark.distributed]

SETTINGS = (
    "training.deterministic=true",
    "training.steps=4",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
)
SEED = 77


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drpo(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "drpo_megatron.cli", *map(str, words)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_evaluation_and_training_do_not_touch_each_other(tmp_path: Path) -> None:
    """One server for all: a run without evaluation, one with it that is equal to the bit, and then two evaluations of
    its last weights, which that server holds and the exported model too, that give the answers of its last one.
    """
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"{i}=", "answer": f"the digit {i}\n#### {str(i) * 4}"} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digits = {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit", "size": 12, "seed": SEED}
    sets = {
        "digits": {"source": digits, "samples": 4},
        "gsm": {"source": {"type": "jsonl", "path": str(questions), "layout": "gsm8k"}, "limit": 5},
    }
    evaluation = (f"evaluation.sets={json.dumps(sets)}", "evaluation.temperature=0.9", "evaluation.samples=2")
    initial = ensure_model("tiny_qwen3", tmp_path / "initial")
    with SGLangServer(ServerConfig(), initial, "float32", 0, tmp_path / "server.log", deterministic=True) as server:
        url = server.wait_ready()
        shared = (*SETTINGS, f"rollout.server.addresses=[{url}]", "sync.transport=shared_memory")
        without, with_it = tmp_path / "without", tmp_path / "with"
        for directory, more in ((without, ()), (with_it, (*evaluation, "evaluation.every=3"))):
            done = subprocess.run(
                command(directory, *shared, *more), capture_output=True, text=True, timeout=LIMIT_S, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
        assert "digits avg@4" in done.stdout  # in the line of the step
        base = ("evaluate", QUICKSTART, f"model.path={with_it / 'run' / 'hf'}", SETTINGS[0], *evaluation)
        by_running = drpo(*base, "--servers", url, "--out", tmp_path / "running.jsonl")
    by_own = drpo(*base, "--out", tmp_path / "own.jsonl")

    steps = metrics(with_it)
    plain = [{k: v for k, v in s.items() if not k.startswith("evaluation/")} for s in steps]
    assert without_times(plain) == without_times(metrics(without))
    for step in range(4):
        name = f"run/rollouts/step_{step:06d}.jsonl"
        assert (with_it / name).read_text() == (without / name).read_text()
    name = "run/hf/model.safetensors"
    assert (with_it / name).read_bytes() == (without / name).read_bytes()

    assert [[k for k in s if k.startswith("evaluation/")] != [] for s in steps] == [False, False, True, True]
    assert all(("perf/evaluate_s" in s) == ("evaluation/digits/avg@4" in s) for s in steps)
    results = {
        name: [lines(with_it / "run" / "evaluation" / name / f"step_{done:06d}.jsonl") for done in (3, 4)]
        for name in sets
    }
    for position, (at_three, at_four) in enumerate(zip(*results.values(), strict=True)):
        for *prompts, summary in (at_three, at_four):
            n = summary["samples"]
            rewards = [[a["reward"] for a in p["answers"]] for p in prompts]
            right = [sum(r >= 1 for r in of_prompt) for of_prompt in rewards]
            logged = steps[2 + position]
            assert logged[f"evaluation/{summary['set']}/avg@{n}"] == pytest.approx(
                sum(map(sum, rewards)) / n / len(prompts)
            )
            passed = sum(pass_at_k(n, c, 1) for c in right) / len(prompts)
            assert logged[f"evaluation/{summary['set']}/pass@1"] == pytest.approx(passed)
            assert summary["steps"] == 3 + position and summary["weight_version"] == 2 * (3 + position)
            for prompt in prompts:
                for answer in prompt["answers"]:
                    assert answer["reward"] == matching_characters(answer["text"], prompt["reference"], {})
    last = [line for name in sets for line in results[name][-1]]
    prompts = [line for line in last if line["kind"] == "prompt"]
    assert [p["prompt"] for p in prompts] == [
        *(repeat_digit(i, SEED)["prompt"] for i in range(12)),
        *(f"{i}=" for i in range(5)),
    ]
    assert [len(p["answers"]) for p in prompts] == [4] * 12 + [2] * 5
    assert len({a["text"] for p in prompts for a in p["answers"]}) > 10, "samples are drawn"

    for printed, path in ((by_running, tmp_path / "running.jsonl"), (by_own, tmp_path / "own.jsonl")):
        found = lines(path)
        assert [line for line in found if line["kind"] == "prompt"] == prompts
        summaries = [line for line in found if line["kind"] == "summary"]
        assert [s["figures"] for s in summaries] == [results[name][-1][-1]["figures"] for name in sets]
        assert "digits: 12 prompts × 4" in printed and "gsm: 5 prompts × 2" in printed and str(path) in printed
        assert f"  avg@4   {summaries[0]['figures']['avg@4']['value']:.3f}  [" in printed
        assert summaries[0]["weight_version"] == (8 if "running" in path.name else 0)
