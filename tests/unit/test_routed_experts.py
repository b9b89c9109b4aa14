"""Routed experts on their way: decoded from the server's answer, kept out of the dump, packed with their tokens."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.client import parse_answer, request_body
from drpo_megatron.rollout.errors import GenerationError
from drpo_megatron.rollout.experts import RoutedExpertsFormat
from drpo_megatron.rollout.turns import Trajectory
from drpo_megatron.training.packing import pack, train_sequences
from tests.support import tiny_models
from tests.unit.test_rollout_client import SAMPLING, answer

PROMPT = Prompt("p", [11, 12, 13], "text")
FORMAT = RoutedExpertsFormat(layers=(False, True, True), num_experts=8, top_k=2)
POSITIONS = 6  # 3 prompt tokens and 4 sampled ones, of which the last is not fed in


def experts(seed: int = 0) -> np.ndarray:
    """int32 [POSITIONS, 3, 2] as the server records them: zeros for the dense layer."""
    recorded = np.random.default_rng(seed).random((POSITIONS, 3, 8)).argsort(-1)[..., :2].astype(np.int32)
    recorded[:, 0] = 0
    return recorded


def with_experts(recorded: np.ndarray | None) -> dict[str, Any]:
    result = answer([21, 22, 23, 24])
    if recorded is not None:
        result["meta_info"]["routed_experts"] = base64.b64encode(recorded.tobytes()).decode()
    return result


def test_the_format_is_the_models() -> None:
    hf = HFModelConfig.from_dict(tiny_models.config("qwen3_moe").to_dict())
    assert RoutedExpertsFormat.of(hf) == RoutedExpertsFormat((False, True, False, True), 8, 3)
    assert RoutedExpertsFormat.of(HFModelConfig.from_dict(tiny_models.config("llama").to_dict())) is None


def test_experts_are_asked_for_and_decoded() -> None:
    assert "return_routed_experts" not in request_body([PROMPT.token_ids] * 2, SAMPLING)
    assert request_body([PROMPT.token_ids] * 2, SAMPLING, routed_experts=True)["return_routed_experts"] is True
    rollout = parse_answer(PROMPT.token_ids, with_experts(experts()), FORMAT)
    assert rollout.routed_experts is not None and rollout.routed_experts.dtype == np.int16
    np.testing.assert_array_equal(rollout.routed_experts, experts()[:, 1:])
    assert parse_answer(PROMPT.token_ids, with_experts(None)).routed_experts is None


def changed(position: int, layer: int, values: list[int]) -> np.ndarray:
    recorded = experts()
    recorded[position, layer] = values
    return recorded


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (None, "must run with enable_return_routed_experts"),
        (experts()[:-1], "has 30 routed experts and 6 positions × 3 layers × 2 experts a token are 36"),
        (experts()[:, 1:], "has 24 routed experts"),
        (changed(5, 2, [3, 8]), "names the experts 0 to 8 and the model has 8"),
        (changed(5, 2, [-1, 3]), "names the experts -1 to 7"),
        (changed(0, 1, [4, 4]), "an expert twice"),
    ],
)
def test_wrong_experts_are_refused(recorded: np.ndarray | None, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        parse_answer(PROMPT.token_ids, with_experts(recorded), FORMAT)


def test_a_damaged_encoding_is_refused() -> None:
    damaged = with_experts(experts())
    damaged["meta_info"]["routed_experts"] = "not base64!"
    with pytest.raises(GenerationError, match="cannot be decoded"):
        parse_answer(PROMPT.token_ids, damaged, FORMAT)


def rollout_of(sampled: dict[str, Any], format: RoutedExpertsFormat | None = None) -> Rollout:
    trajectory = Trajectory(PROMPT)
    trajectory.sampled(parse_answer(PROMPT.token_ids, sampled, format))
    return trajectory.rollout()


def test_the_dump_says_what_it_leaves_out() -> None:
    rollout = rollout_of(with_experts(experts()), FORMAT)
    record = json.loads(json.dumps(rollout.to_json()))
    assert record["left_out"] == {"routed_experts": [6, 2, 2]} and "routed_experts" not in record
    assert rollout.routed_experts is not None
    dense = rollout_of(with_experts(None)).to_json()
    assert "left_out" not in dense and "routed_experts" not in dense


def groups() -> list[RolloutGroup]:
    """Rollouts whose experts at position t of prompt token 10·g + t are all (10·g + t) mod 8 and the one after it."""
    made = []
    for g in range(3):
        prompt = Prompt(str(g), [10 * g, 10 * g + 1], "")
        rollouts = []
        for length in (1, 3, 4):
            tokens = [10 * g, 10 * g + 1, *range(10 * g + 2, 10 * g + 2 + length)]
            first = np.asarray(tokens[:-1]) % 8
            chosen = np.stack([np.stack([first, (first + 1) % 8], -1)] * 2, 1).astype(np.int16)
            rollouts.append(Rollout(prompt, tokens[2:], [-1.0] * length, [0] * length, "stop", routed_experts=chosen))
        made.append(RolloutGroup(prompt, rollouts))
    return made


def test_experts_are_packed_with_their_tokens() -> None:
    sequences = train_sequences(groups(), "token_mean", horizon=4)
    total = sum(s.num_positions for s in sequences)
    seen = 0
    for rank in range(2):
        batches = pack(
            sequences, data_rank=rank, data_size=2, token_budget=8, pad_multiple=4, count_multiple=8, version=0
        )
        assert any(b.num_tokens == 0 for b in batches)  # nine sequences in 16 micro-batches
        for batch in batches:
            assert batch.routed_experts_TLK is not None and batch.num_update_tokens == total
            real_T = batch.routed_experts_TLK[:, 0, 0] >= 0
            assert int(real_T.sum()) == batch.num_tokens and not batch.mask_T[~real_T].any()
            assert (batch.routed_experts_TLK[~real_T] == -1).all()
            first = batch.tokens_T[real_T] % 8
            for layer in range(2):
                assert batch.routed_experts_TLK[real_T, layer, 0].tolist() == first.tolist()
                assert batch.routed_experts_TLK[real_T, layer, 1].tolist() == ((first + 1) % 8).tolist()
            seen += batch.num_tokens
    assert seen == total


def test_packing_refuses_experts_that_do_not_fit() -> None:
    layout = {"data_rank": 0, "data_size": 1, "token_budget": 64, "pad_multiple": 1, "count_multiple": 1, "version": 0}
    some = groups()
    some[0].rollouts[0].routed_experts = None
    with pytest.raises(ValueError, match="in one way"):
        pack(train_sequences(some, "token_mean", horizon=4), **layout)
    some = groups()
    some[0].rollouts[0].routed_experts = some[0].rollouts[1].routed_experts
    with pytest.raises(ValueError, match="2 positions has routed experts for 4"):
        pack(train_sequences(some, "token_mean", horizon=4), **layout)
