"""Verifiers, and the pool: time-outs that kill, errors that count, no process left behind."""

from __future__ import annotations

from typing import Any

from drpo_megatron.config.schema import DataConfig, RewardConfig
from drpo_megatron.data.examples import repeat_digit
from drpo_megatron.records import Prompt, Rollout
from drpo_megatron.rewards.examples import matching_characters
from drpo_megatron.rewards.verifiers import checked_reward, make_verifier
from drpo_megatron.rewards.worker import ran_out_of_memory

FUNCTION_DATA = DataConfig.model_validate(
    {"source": {"type": "function", "function": "drpo_megatron.data.examples:repeat_digit"}}
)


def rollout(text: str, answer: str | None = None, metadata: dict[str, Any] | None = None) -> Rollout:
    prompt = Prompt(id=f"p-{text[:12]}", token_ids=[1], text="", answer=answer, metadata=metadata or {})
    return Rollout(prompt, response_ids=[1], logmu=[0.0], weight_versions=[0], finish_reason="stop", text=text)


def test_what_counts_as_out_of_memory() -> None:
    lost = SystemError("error return without exception set")
    hidden = ImportError("numpy: look at its sources")
    hidden.__cause__ = MemoryError()
    assert ran_out_of_memory(lost) and ran_out_of_memory(hidden) and not ran_out_of_memory(ImportError("no module"))


def test_reasoning_gym_and_extraction() -> None:
    data = DataConfig.model_validate({"source": {"type": "reasoning_gym", "task": "basic_arithmetic", "size": 5}})
    entry = {"answer": "-4", "question": "", "metadata": {}}
    plain = make_verifier(RewardConfig(type="reasoning_gym"), data)
    assert plain(" -4 \n", None, {"entry": entry}) == 1.0
    extracting = make_verifier(RewardConfig(type="reasoning_gym", extract="<answer>(.*?)</answer>"), data)
    assert extracting("<answer>3</answer> no, <answer>-4</answer> yes", None, {"entry": entry}) == 1.0
    assert extracting("-4", None, {"entry": entry}) == 0.0
    assert checked_reward(plain, "-4", None, {})[1] == "the verifier raised KeyError: 'entry'"


def test_math_verify() -> None:
    verifier = make_verifier(RewardConfig(type="math_verify"), FUNCTION_DATA)
    for gold, text, expected in [
        ("\\frac{1}{2}", "The answer is $0.5$", 1.0),
        ("34", "so we get \\boxed{34}.", 1.0),
        ("34", "so we get \\boxed{35}.", 0.0),
        ("$x^2+2x+1$", "$(x+1)^2$", 1.0),
        ("34", "", 0.0),
    ]:
        assert checked_reward(verifier, text, gold, {}) == (expected, None), (gold, text)
    assert "no reference answer" in str(checked_reward(verifier, "1", None, {})[1])


def test_quickstart_example() -> None:
    assert repeat_digit(3, 1) == repeat_digit(3, 1)
    problems = [repeat_digit(i, 1) for i in range(100)]
    assert {p["prompt"][0] for p in problems} == set("0123456789")
    answer = next(p["answer"] for p in problems if p["prompt"][0] == "7")
    assert set(answer) == {"7"}
    half = len(answer) // 2
    rewards = [matching_characters(text, answer, {}) for text in (answer + "x", answer[:half] + "x" * half, "x", "")]
    assert rewards == [1.0, half / len(answer), 0.0, 0.0]
