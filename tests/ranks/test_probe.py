"""The trainer's side of the log-prob probe, in every kind of layout, against transformers' log-softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from drpo_megatron.models.hf_config import HFModelConfig
from tests.support import tiny_models
from tests.support.launch import run_ranks
from tests.support.references import ForcedGates
from tests.support.updates import make_sequences, run_config

pytestmark = pytest.mark.distributed

# An odd number of tokens: padding stands behind them in every layout.
LENGTH = 37
TOLERANCE = 1e-4
TP2 = {"tensor": 2, "sequence_parallel": True}
OVERLAP = {"overlap_param_gather": True, "overlap_grad_reduce": True, "bucket_parameters": 20_000}

Case = tuple[str, dict[str, Any], dict[str, Any]]
"""Family, layout, settings of the optimizer."""

FOUR_RANKS: dict[str, Case] = {
    "tp2-pp2-vpp2": ("qwen2", {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}, {}),
    "cp2-dp2": ("qwen3", {"context": 2, "data": 2}, OVERLAP),
    "tp2-cp2-ep2": ("qwen3_moe", TP2 | {"context": 2, "expert": 2}, {}),
}


def tokens_of(hf: HFModelConfig) -> list[int]:
    return np.random.default_rng(11).integers(3, hf.vocab_size, LENGTH).tolist()


def experts_of(hf: HFModelConfig) -> np.ndarray | None:
    """Random sets, most of which no router would choose."""
    if hf.moe is None:
        return None
    shape = (LENGTH - 1, sum(hf.moe.layers), hf.moe.num_experts)
    return np.random.default_rng(12).random(shape).argsort(-1)[..., : hf.moe.top_k].astype(np.int16)


def reference(model: PreTrainedModel, hf: HFModelConfig) -> np.ndarray:
    tokens_L = torch.tensor(tokens_of(hf))
    experts_PLK = experts_of(hf)
    if experts_PLK is not None:
        ForcedGates(model, hf).targets_PLK = torch.from_numpy(experts_PLK).long()
    with torch.no_grad():
        logits_PV = model(tokens_L[None, :-1]).logits[0]
    return torch.log_softmax(logits_PV, -1).gather(1, tokens_L[1:, None])[:, 0].numpy()


def probe_on_ranks(models: dict[str, Path], cases: dict[str, Case]) -> dict[str, Any]:
    """Log-probs before and after an update, and the weights after it; on rank 0, and None elsewhere."""
    from drpo_megatron.platform import distributed

    answers: dict[str, Any] = {}
    for key, (family, parallel, optimizer) in cases.items():
        config = run_config(models[family], parallel)
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=optimizer)})
        (distributed.change_layout if answers else distributed.initialize)(config.layout, seed=0)
        from drpo_megatron.training.probe import policy_logprobs
        from drpo_megatron.training.step import Policy
        from drpo_megatron.weights.exporter import iter_hf_tensors

        policy = Policy(config)
        tokens, experts_PLK = tokens_of(policy.hf), experts_of(policy.hf)
        answers[key] = {"before": policy_logprobs(policy, tokens, experts_PLK)}
        if optimizer:
            sequences = make_sequences(policy.hf.vocab_size)
            policy.update(sequences, version=0)
            answers[key]["after"] = policy_logprobs(policy, tokens, experts_PLK)
            answers[key]["weights"] = {n: t.clone() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}
            answers[key]["goes on"] = policy.update(sequences, version=1).applied
    distributed.shutdown()
    return answers


def compare(root: Path, cases: dict[str, Case], world: int) -> None:
    models = {family: root / family for family in {family for family, _, _ in cases.values()}}
    expected = {}
    for family, path in models.items():
        tiny_models.write(family, path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
        expected[family] = reference(model, HFModelConfig.load(path))
    answers, *others = run_ranks(world, probe_on_ranks, models, cases)
    assert all(answer["before"] is None for other in others for answer in other.values())
    for key, (family, _, optimizer) in cases.items():
        assert np.abs(answers[key]["before"] - expected[family]).max() < TOLERANCE, key
        if optimizer:
            model = AutoModelForCausalLM.from_pretrained(models[family], dtype=torch.float32)
            model.load_state_dict(answers[key]["weights"])
            after = reference(model, HFModelConfig.load(models[family]))
            assert np.abs(answers[key]["after"] - after).max() < TOLERANCE, key
            assert np.abs(after - expected[family]).max() > 10 * TOLERANCE, key
            assert answers[key]["goes on"], key


def test_logprobs_are_transformers(tmp_path: Path) -> None:
    compare(tmp_path, FOUR_RANKS, 4)


def test_probe_tokens_are_fixed() -> None:
    from drpo_megatron.training.probe import NUM_TOKENS, probe_tokens

    tokens = probe_tokens(515, 3)
    assert tokens == probe_tokens(515, 3) != probe_tokens(515, 4)
    assert len(tokens) == NUM_TOKENS and len(set(tokens)) > NUM_TOKENS / 2
    assert max(max(probe_tokens(5, seed)) for seed in range(9)) == 3, (
        "the last id is left out, and the last but one is not"
    )
