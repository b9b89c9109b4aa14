"""Rollouts of several turns: what is trained of them, and the calculator."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from drpo_megatron.config.schema import SamplingConfig
from drpo_megatron.records import Prompt, RolloutGroup
from drpo_megatron.rollout.client import Completion, RolloutClient
from drpo_megatron.rollout.errors import GenerationError
from drpo_megatron.rollout.examples import calculator, evaluate
from drpo_megatron.rollout.turns import FunctionSampler, Session, Trajectory
from drpo_megatron.training.packing import train_sequences
from tests.unit.test_rollout_client import Fleet, answer, config, serve

PROMPT = Prompt("p", [1, 2], "12 + 7")


class Letters:
    """A tokenizer with a token a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(t) for t in token_ids)


def scripted(*turns: str) -> tuple[Any, list[Any]]:
    """A server that says one of `turns` after the other, as weight versions 3, 4, …; and what it was asked."""
    asked: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        body = await request.json()
        asked.append(body)
        text = turns[len(asked) - 1]
        return web.json_response([answer([ord(c) for c in text], str(2 + len(asked)))])

    return handler, asked


def run(handler: Any, function: Any, max_new_tokens: int = 40, stop: list[str] | None = None) -> RolloutGroup:
    sampling = SamplingConfig(max_new_tokens=max_new_tokens, stop=stop or [])

    async def work(client: RolloutClient, fleet: Fleet) -> RolloutGroup:
        return await FunctionSampler(PROMPT, 1, sampling, function, Letters()).run(client)

    made: RolloutGroup = serve(handler, work, config())
    return made


def test_the_calculators_answer_is_read_and_not_trained() -> None:
    handler, asked = scripted(" 12 + 7 =", "Answer: 19")
    (rollout,) = run(handler, calculator, stop=["\n\n"]).rollouts
    text = Letters().decode(rollout.response_ids)
    assert text == " 12 + 7 = 19\nAnswer: 19"
    assert [body["input_ids"] for body in asked] == [[[1, 2]], [[1, 2, *map(ord, " 12 + 7 = 19\n")]]]
    assert asked[0]["sampling_params"][0]["stop"] == ["\n\n", "="]
    assert [p["max_new_tokens"] for body in asked for p in body["sampling_params"]] == [40, 40 - 13]
    inserted = [i for i, mask in enumerate(rollout.response_mask) if not mask]
    assert Letters().decode([rollout.response_ids[i] for i in inserted]) == " 19\n"
    assert rollout.weight_versions == [3] * 13 + [4] * 10
    # what the trainer makes of it: the loss sees the sampled tokens only
    rollout.advantage = 1.0
    (sequence,) = train_sequences([RolloutGroup(PROMPT, [rollout])], "token_mean", 40)
    assert int(sequence.sampled_L.sum()) == len(text) - 4


def test_what_is_not_sampled_at_the_end_is_dropped() -> None:
    trajectory = Trajectory(PROMPT)
    experts = np.arange(6, dtype=np.int16).reshape(3, 1, 2)  # two prompt tokens and two sampled ones, the last no input
    trajectory.sampled(Completion([5, 6], [-1.0, -2.0], [3, 3], "stop", experts))
    trajectory.inserted([7, 8])
    rollout = trajectory.rollout()
    assert rollout.response_ids == [5, 6] and rollout.response_mask == [1, 1]
    assert rollout.routed_experts is not None and len(rollout.routed_experts) == 3
    with pytest.raises(GenerationError, match="sampled nothing"):
        Trajectory(PROMPT).rollout()


def test_the_budget_holds_for_everything_after_the_prompt() -> None:
    handler, _ = scripted(" 12 + 7 =", "x")
    (rollout,) = run(handler, calculator, max_new_tokens=11).rollouts
    assert Letters().decode(rollout.response_ids) == " 12 + 7 ="  # nothing fits behind " 1"

    async def greedy(prompt: Prompt, session: Session) -> Trajectory:
        trajectory = Trajectory(prompt)
        await session.sample(trajectory)
        trajectory.inserted([1] * 100)
        return trajectory

    handler, _ = scripted("abc")
    with pytest.raises(GenerationError, match=r"103 tokens.*max_new_tokens is 40"):
        run(handler, greedy)

    async def too_late(prompt: Prompt, session: Session) -> Trajectory:
        trajectory = Trajectory(prompt)
        trajectory.inserted([1] * 40)
        await session.sample(trajectory)
        return trajectory

    handler, _ = scripted()
    with pytest.raises(ValueError, match=r"look at session\.left"):
        run(handler, too_late)


def test_a_function_that_fails_ends_its_other_samples() -> None:
    ended = asyncio.Event()

    async def one_fails(prompt: Prompt, session: Session) -> Trajectory:
        if one_fails.calls == 0:  # type: ignore[attr-defined]
            one_fails.calls = 1  # type: ignore[attr-defined]
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
        raise KeyError("a bug of the user's")

    one_fails.calls = 0  # type: ignore[attr-defined]

    async def work(client: RolloutClient, fleet: Fleet) -> None:
        sampler = FunctionSampler(PROMPT, 2, SamplingConfig(max_new_tokens=4), one_fails, Letters())
        with pytest.raises(KeyError):
            await sampler.run(client)
        assert ended.is_set()

    serve(scripted()[0], work, config())

    async def nothing(prompt: Prompt, session: Session) -> Any:
        return "text"

    with pytest.raises(GenerationError, match="return the prompt's Trajectory"):
        run(scripted()[0], nothing)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 12 + 7 ", "19"),
        ("Calculator: 3 * (2 - 5)", "-9"),
        ("it is\n7 / 2", "3.5"),
        ("-4 - -6", "2"),
        ("two plus two", None),
        ("1 / 0", None),
        ("9 ** 9 ** 9", None),
        ("__import__('os')", None),
        ("True + 1", None),
        ("", None),
        ("1e308 * 10", None),
    ],
)
def test_evaluate(text: str, value: str | None) -> None:
    assert evaluate(text) == value
