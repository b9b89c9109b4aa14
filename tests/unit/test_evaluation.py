"""What k of n answers are worth, against enumeration and other libraries; votes; what is written."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from drpo_megatron.config.schema import DataConfig, RewardConfig
from drpo_megatron.evaluation.answers import Answer, Answered
from drpo_megatron.evaluation.results import summarize
from drpo_megatron.evaluation.sets import OpenSet
from drpo_megatron.evaluation.statistics import (
    candidates,
    majority_at_k,
    pass_at_k,
    reward_interval,
    share_interval,
)
from drpo_megatron.evaluation.votes import vote
from drpo_megatron.evaluation.writing import table, write_results
from drpo_megatron.records import Prompt

MATH = RewardConfig(type="math_verify")


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_where_factorials_overflow() -> None:
    """scipy's hypergeometric distribution is computed in another way. One correct answer in n is k/n exactly."""
    for n, correct, k in [(1000, 3, 500), (4096, 1, 1), (4096, 2000, 64), (10000, 1, 2)]:
        none = stats.hypergeom(n, correct, k).logsf(0)
        assert pass_at_k(n, correct, k) == pytest.approx(np.exp(none), rel=1e-9)
    assert pass_at_k(10000, 1, 2) == 2 / 10000
    for n, correct, k in [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)]:
        with pytest.raises(ValueError, match="does not exist"):
            pass_at_k(n, correct, k)


def enumerated_majority(votes: list[str | None], correct: list[bool], k: int) -> float:
    """Over all draws; ties are shared out; an answer counts with the share of its responses that are correct."""
    share = {v: np.mean([c for w, c in zip(votes, correct, strict=True) if w == v]) for v in set(votes)}
    scores = []
    for draw in itertools.combinations(votes, k):
        counts = {v: draw.count(v) for v in draw if v is not None}
        winners = [v for v in counts if counts[v] == max(counts.values())]
        scores.append(np.mean([share[v] for v in winners]) if winners else 0.0)
    return float(np.mean(scores))


def test_majority_is_the_mean_over_all_draws() -> None:
    chance = random.Random(3)
    for _ in range(60):
        n = chance.randint(1, 8)
        votes = [chance.choice(["1", "2", "3", "4", None]) for _ in range(n)]
        correct = [v is not None and (v == "2" or chance.random() < 0.1) for v in votes]
        for k in range(1, n + 1):
            found = majority_at_k(n, candidates(votes, correct), k)
            assert found == pytest.approx(enumerated_majority(votes, correct, k), abs=1e-12), (votes, correct, k)


def test_majority_of_many_answers() -> None:
    """At n = 64 against draws by numpy, within 4 standard errors. One vote is the mean, all are the plain majority."""
    votes = ["a"] * 20 + ["b"] * 18 + [str(i) for i in range(20)] + [None] * 6
    correct = [v == "a" for v in votes]
    found = candidates(votes, correct)
    assert majority_at_k(64, found, 1) == pytest.approx(20 / 64)
    assert majority_at_k(64, found, 64) == 1.0
    generator, k, draws = np.random.default_rng(0), 16, 20_000
    codes = np.array([-1 if v is None else sorted({v for v in votes if v}).index(v) for v in votes])
    right = sorted({v for v in votes if v}).index("a")
    scores = []
    for _ in range(draws):
        counts = np.bincount(codes[generator.permutation(64)[:k]] + 1, minlength=23)[1:]
        winners = np.flatnonzero(counts == counts.max())
        scores.append((right in winners) / len(winners))
    assert abs(majority_at_k(64, found, k) - np.mean(scores)) < 4 * np.std(scores) / np.sqrt(draws)
    assert majority_at_k(3, [], 2) == 0.0
    with pytest.raises(ValueError, match="does not exist"):
        majority_at_k(2, found, 1)


def test_intervals_over_prompts() -> None:
    """Against scipy: Wilson's where all values are 0 or 1, Student's elsewhere, which is cut for shares only."""
    flat = share_interval([1.0] * 20)
    wilson = stats.binomtest(20, 20).proportion_ci(0.95, "wilson")
    assert (flat.low, flat.high) == pytest.approx((wilson.low, wilson.high)) and flat.low < 0.9
    values = [0.25, 0.5, 1.0, 0.75, 0.0]
    student = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = share_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, student.low, student.high))
    assert share_interval([0.9, 1.0, 1.0]).high == 1.0
    rewards = [-1.0, 2.0, 0.5]
    student = stats.ttest_1samp(rewards, 0).confidence_interval(0.95)
    assert (reward_interval(rewards).low, reward_interval(rewards).high) == pytest.approx((student.low, student.high))
    assert np.isnan(share_interval([0.5]).low)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"First \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}"),
        (r"so \boxed{ \left( 1, 2 \right) }", "(1,2)"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{3.0}", "3"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        (r"\fbox 7 and more", "7"),
        (r"an open \boxed{3", "3"),
        ("12 apples and 3 more\n#### 15", "15"),
        ("Answer: $34$", "34"),
        ("The final answer is 34.", "34"),
        ("We get 12, then 1,015 in all", "1015"),
        ("no idea", None),
    ],
)
def test_what_a_response_votes_for(text: str, expected: str | None) -> None:
    assert vote(text, MATH) == expected


def test_votes_are_what_is_scored() -> None:
    gym = RewardConfig(type="reasoning_gym", extract=r"<a>(.*?)</a>")
    assert vote("<a>1</a> then <a> 2 </a>", gym) == " 2 " and vote("1", gym) is None
    assert vote(" 12 ", RewardConfig(type="reasoning_gym")) == "12"
    function = RewardConfig(type="function", function="a:b")
    assert vote("seven of 9", function) == "sevenof9" and vote("", function) is None


def opened(samples: int, ks: list[int], prompts: int) -> OpenSet:
    data = DataConfig.model_validate({"source": {"type": "function", "function": "a:b"}})
    return OpenSet("toy", data, MATH, [Prompt(f"p{i}", [1], "2+2=", "4") for i in range(prompts)], samples, ks)


def answer(text: str, reward: float, **other: object) -> Answer:
    return Answer(**{"finish_reason": "stop", "error": None} | other, text=text, vote=text, reward=reward, tokens=2)


def test_figures_file_and_table(tmp_path: Path) -> None:
    chosen = opened(samples=4, ks=[1, 2, 4], prompts=3)
    rights = [4, 2, 0]
    answered = [
        Answered(
            prompt,
            [answer("4", 1.0)] * right
            + [answer(str(i), 0.0, finish_reason="length", error="the verifier raised") for i in range(5, 9 - right)],
        )
        for prompt, right in zip(chosen.prompts, rights, strict=True)
    ]
    result = summarize(chosen, answered)
    values = {name: figure.value for name, figure in result.figures.items()}
    assert list(values) == ["avg@4", "pass@1", "pass@2", "pass@4", "maj@2", "maj@4"]
    assert values["avg@4"] == values["pass@1"] == pytest.approx(6 / 12)
    assert values["pass@2"] == pytest.approx((1 + (1 - 1 / 6) + 0) / 3)
    assert values["maj@2"] == pytest.approx((1 + (1 / 6 + 4 / 6 / 2) + 0) / 3)
    assert values["maj@4"] == pytest.approx(2 / 3)
    assert result.metrics()["evaluation/toy/truncated_frac"] == 0.5 and result.metrics()["evaluation/toy/errors"] == 6
    assert result.metrics()["evaluation/toy/maj@4"] == values["maj@4"]

    write_results(tmp_path / "a" / "out.jsonl", [(result, answered)], {"steps": 12})
    *prompts, summary = [json.loads(line) for line in (tmp_path / "a" / "out.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in prompts] == ["prompt"] * 3 and summary["kind"] == "summary"
    assert [sum(a["reward"] for a in line["answers"]) for line in prompts] == rights
    assert prompts[0]["prompt"] == "2+2=" and prompts[0]["reference"] == "4" and summary["steps"] == 12
    assert summary["figures"]["pass@2"]["value"] == values["pass@2"] and summary["prompts"] == 3
    shown = table([result])
    assert "toy: 3 prompts × 4" in shown and "maj@4   0.667" in shown and "6 not judged" in shown
    alone = summarize(opened(1, [1], 1), [Answered(chosen.prompts[0], [answer("4", 0.5)])])
    write_results(tmp_path / "one.jsonl", [(alone, [])], {})
    assert json.loads((tmp_path / "one.jsonl").read_text())["figures"]["avg@1"]["low"] is None
    assert "one prompt only" in table([alone])
