"""Answers to a set from a scripted server: order, judgement, seeds, and what ends an evaluation."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

from drpo_megatron.config import RunConfig, load_config
from drpo_megatron.config.schema import DataConfig, RewardConfig
from drpo_megatron.evaluation.answers import answer_set
from drpo_megatron.evaluation.during_training import TrainingEvaluation, results_path
from drpo_megatron.evaluation.sets import OpenSet, open_sets
from drpo_megatron.records import Rollout
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier
from drpo_megatron.rollout import client as client_module
from drpo_megatron.rollout.errors import GenerationError, ServerDied
from tests.unit.test_rollout_client import inputs_of

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
VERSION = 5
SET = "source: {type: function, function: 'drpo_megatron.data.examples:repeat_digit', size: 6, seed: 3}, samples: 3"


class Letters:
    """A tokenizer whose tokens are code points."""

    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def batch_decode(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        return ["".join(map(chr, ids)) for ids in sequences]


@dataclass
class Scripted:
    """The servers, as a client sees them. Sample 0 repeats the prompt's digit four times, the others say `9999`."""

    url: str = ""
    api_key: str | None = None
    up: bool = True
    version: int = VERSION
    release: threading.Event | None = None
    """Until it is set, no request is answered."""
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def serving(self) -> int:
        return int(self.up)

    def check_soon(self) -> None:
        pass

    def answers(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        self.bodies.append(body)
        # the later in the set, the earlier it comes back
        time.sleep(0.02 * (6 - len(self.bodies)) * (len(self.bodies) < 6))
        if self.release:
            self.release.wait()
        texts = [chr(ids[0]) * 4 if number == 0 else "9999" for number, ids in enumerate(inputs_of(body))]
        return [
            {
                "output_ids": [ord(c) for c in text],
                "meta_info": {
                    "output_token_logprobs": [[-1.0, ord(c), None] for c in text],
                    "finish_reason": {"type": "length"},
                    "weight_version": str(self.version),
                },
            }
            for text in texts
        ]


class PoolOfNone:
    """The verifiers of a RewardPool without its processes. With them: tests/e2e evaluates."""

    def __init__(self, reward: RewardConfig, data: DataConfig) -> None:
        self._verifier = make_verifier(reward, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def score_async(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            of = rollout.prompt
            rollout.reward, rollout.reward_error = checked_reward(self._verifier, rollout.text, of.answer, of.metadata)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    scripted = Scripted()
    monkeypatch.setattr("drpo_megatron.evaluation.answers.RewardPool", PoolOfNone)
    monkeypatch.setattr(client_module, "_BACKOFF_S", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = json.dumps(scripted.answers(body)).encode()
            if not scripted.up:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        scripted.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield scripted
        http.shutdown()
        thread.join()


def opened(*overrides: str) -> tuple[RunConfig, OpenSet]:
    config = load_config(QUICKSTART, [f"evaluation.sets={{digits: {{{SET}}}}}", *overrides])
    (chosen,) = open_sets(config, Letters())
    return config, chosen


def test_answers_in_the_order_of_the_prompts(servers: Scripted) -> None:
    config, chosen = opened("evaluation.max_new_tokens=7", "evaluation.temperature=0.5")
    seen: list[int] = []
    answered = answer_set(config, chosen, servers, Letters(), VERSION, progress=seen.append)
    assert answered is not None and [one.prompt for one in answered] == chosen.prompts and len(answered) == 6
    for one in answered:
        first, *others = one.answers
        assert first.text == first.vote == one.prompt.answer and first.reward == 1.0 and first.correct
        assert [a.text for a in others] == ["9999"] * 2 and first.tokens == 4 and first.finish_reason == "length"
        assert [a.correct for a in others] == [one.prompt.answer == "9999"] * 2
    assert seen[-1] == 6
    for body in servers.bodies:
        parameters = body["sampling_params"]
        assert (parameters["temperature"], parameters["max_new_tokens"], len(inputs_of(body))) == (0.5, 7, 3)
        assert "sampling_seed" not in parameters


def test_seeds_are_repeatable_and_different(servers: Scripted) -> None:
    config, chosen = opened("training.deterministic=true")

    def seeds() -> list[int]:
        servers.bodies.clear()
        answer_set(config, chosen, servers, Letters(), VERSION)
        return sorted(one["sampling_seed"] for body in servers.bodies for one in body["sampling_params"])

    first = seeds()
    assert len(set(first)) == 18 and seeds() == first


def test_what_ends_an_evaluation(servers: Scripted) -> None:
    config, chosen = opened("rollout.request_retries=1")
    servers.version = VERSION + 1
    with pytest.raises(GenerationError, match="weights changed from version 5 to 6 during the evaluation"):
        answer_set(config, chosen, servers, Letters(), VERSION)
    servers.version, servers.release = VERSION, threading.Event()
    backstop = threading.Timer(300, servers.release.set)
    backstop.start()
    assert answer_set(config, chosen, servers, Letters(), VERSION, stopped=lambda: True) is None
    assert not servers.release.is_set(), "it waited for the answers"
    backstop.cancel()
    servers.release.set()
    servers.up = False
    with pytest.raises(ServerDied):
        answer_set(config, chosen, servers, Letters(), VERSION)


def test_a_set_that_was_done_is_not_asked_again(servers: Scripted, tmp_path: Path) -> None:
    """A server dies in the second set, comes back, and the evaluation goes on there."""
    again = f"{{digits: {{{SET}}}, more: {{{SET}}}}}"
    overrides = [f"evaluation.sets={again}", "evaluation.every=2", f"tracking.directory={tmp_path}"]
    config = load_config(QUICKSTART, [*overrides, "rollout.request_retries=0", "rollout.concurrency=1"])
    evaluation = TrainingEvaluation(config, Letters())
    ordinary = servers.answers

    def dies(body: dict[str, Any]) -> list[dict[str, Any]]:
        servers.up = len(servers.bodies) < 8
        return ordinary(body) if servers.up else []

    servers.answers = dies  # type: ignore[method-assign]
    with pytest.raises(ServerDied):
        evaluation.run(servers, VERSION, steps_done=4)
    assert results_path(config.run_directory, "digits", 4).exists()
    assert not results_path(config.run_directory, "more", 4).exists()
    servers.up, servers.answers = True, ordinary  # type: ignore[method-assign]
    servers.bodies.clear()
    metrics = evaluation.run(servers, VERSION, steps_done=4)
    assert metrics is not None and len(servers.bodies) == 6
    assert {name.split("/")[1] for name in metrics} == {"digits", "more"} and "evaluation/more/avg@3" in metrics
    servers.bodies.clear()
    assert evaluation.run(servers, VERSION, steps_done=6) == metrics and len(servers.bodies) == 12


def test_without_every_nothing_is_opened() -> None:
    config = load_config(QUICKSTART, ["evaluation.sets={a: {source: {type: jsonl, path: absent.jsonl}}}"])
    assert TrainingEvaluation(config, Letters()).run(Scripted(), VERSION, 1) == {}
