"""A user evaluates: during training, a model that was exported, by a server that runs, and by one of the command's
own; looks at runs side by side; and converts what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from drpo_megatron.data.examples import repeat_digit
from drpo_megatron.evaluation.statistics import pass_at_k
from drpo_megatron.rewards.examples import matching_characters
from tests.support.runs import QUICKSTART, SMALL, dump_path, metrics, settings, started_with, without_times
from tests.support.server_pool import Loans, ServerPool
from tests.support.trainer import drpo, drpo_apart, read_lines, train

pytestmark = [pytest.mark.server, pytest.mark.distributed]

SEED = 77
STEPS = 4
SETTINGS = (*SMALL, "training.deterministic=true", f"training.steps={STEPS}", "sync.transport=shared_memory")


@dataclass(frozen=True)
class Trained:
    """Two runs on one server that differ in whether they evaluate, and what the server and the exported model of the
    second then answered.
    """

    root: Path
    sets: dict[str, Any]
    printed: str
    by_running: str
    by_own: str

    def rows(self, name: str) -> list[dict[str, Any]]:
        return metrics(self.root, name)


@pytest.fixture(scope="module")
def trained(servers: ServerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    root = tmp_path_factory.mktemp("evaluate")
    questions = root / "questions.jsonl"
    rows = [{"question": f"{i}=", "answer": f"the digit {i}\n#### {str(i) * 4}"} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    digits = {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit", "size": 12, "seed": SEED}
    sets = {
        "digits": {"source": digits, "samples": 4},
        "gsm": {"source": {"type": "jsonl", "path": str(questions), "layout": "gsm8k"}, "limit": 5},
    }
    evaluation = (f"evaluation.sets={json.dumps(sets)}", "evaluation.temperature=0.9", "evaluation.samples=2")
    borrow = Loans(servers)
    url = borrow("deterministic").url
    server = f"rollout.server.addresses=[{url}]"
    train(QUICKSTART, *settings(root, "without"), *SETTINGS, server).done()
    checkpoint = ("save.every=4", "evaluation.every=3")
    with_it = train(QUICKSTART, *settings(root, "with"), *SETTINGS, server, *evaluation, *checkpoint).done()
    base = ("evaluate", QUICKSTART, f"model.path={root / 'with' / 'hf'}", "training.deterministic=true", *evaluation)
    by_running = drpo(*base, "--servers", url, "--out", root / "running.jsonl").done().output
    by_own = drpo_apart(*base, "--out", root / "own.jsonl", launch=servers.launch).done().output
    yield Trained(root, sets, with_it.output, by_running, by_own)
    borrow.give_back()


def test_evaluation_and_training_do_not_touch_each_other(trained: Trained) -> None:
    """A run with evaluations is equal to the bit to one without."""
    assert "digits avg@4" in trained.printed  # in the line of the step
    steps = trained.rows("with")
    plain = [{k: v for k, v in s.items() if not k.startswith("evaluation/")} for s in steps]
    assert without_times(plain) == without_times(trained.rows("without"))
    for step in range(STEPS):
        with_it, without = (dump_path(trained.root, step, name) for name in ("with", "without"))
        assert with_it.read_text() == without.read_text()
    weights = [(trained.root / name / "hf" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert [[k for k in s if k.startswith("evaluation/")] != [] for s in steps] == [False, False, True, True]
    assert all(("perf/evaluate_s" in s) == ("evaluation/digits/avg@4" in s) for s in steps)


def test_evaluations_are_what_the_answers_say(trained: Trained) -> None:
    """Figures in the metrics and in the files, and the same from the server that holds the last weights, and from the
    exported model.
    """
    steps, sets = trained.rows("with"), trained.sets
    results = {
        name: [
            read_lines(trained.root / "with" / "evaluation" / name / f"step_{done:06d}.jsonl") for done in (3, STEPS)
        ]
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

    assert not started_with(str(trained.root)), "the server of the command's own has ended"
    for printed, name in ((trained.by_running, "running.jsonl"), (trained.by_own, "own.jsonl")):
        path = trained.root / name
        found = read_lines(path)
        assert [line for line in found if line["kind"] == "prompt"] == prompts
        summaries = [line for line in found if line["kind"] == "summary"]
        assert [s["figures"] for s in summaries] == [results[name][-1][-1]["figures"] for name in sets]
        assert "digits: 12 prompts × 4" in printed and "gsm: 5 prompts × 2" in printed and str(path) in printed
        assert f"  avg@4   {summaries[0]['figures']['avg@4']['value']:.3f}  [" in printed
        assert summaries[0]["weight_version"] == (2 * STEPS if name == "running.jsonl" else 0)


def test_the_checkpoint_converts_to_the_exported_model_and_the_page_has_both_runs(
    trained: Trained, tmp_path: Path
) -> None:
    checkpoint = trained.root / "with" / "checkpoints" / f"step_{STEPS:06d}"
    drpo_apart("convert", checkpoint, tmp_path / "hf", "--to", "hf", "--verify").done()
    converted, exported = (
        load_file(path / "model.safetensors") for path in (tmp_path / "hf", trained.root / "with/hf")
    )
    assert converted.keys() == exported.keys()
    assert all((converted[name] == exported[name]).all() for name in exported)
    page = tmp_path / "page.html"
    said = drpo("report", trained.root / "with", trained.root / "without", "--out", page).done()
    assert f"{page} holds 2 runs" in said.output
    assert '"with"' in page.read_text() and '"without"' in page.read_text()
