"""The cases of the parity table, and what runs one: three updates of a tiny model by the real `Policy`.

A case is a line: a model, a layout, settings over those of `tests.ranks.test_train_step.run_config`, and what it
is compared with. Every case of a model has the same weights (one Hugging Face directory) and the same sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.training.packing import TrainSequence
from tests.ranks.test_train_step import DELTA, TEMPERATURE, run_config
from tests.support import tiny_models

UPDATES = 3
MEASURES = ("loss", "gradient norm", "log-probs", "parameters")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {}),
    # A key-value head for each of four ranks.
    "llama": ("llama", {"num_key_value_heads": 4}),
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}
ONE_SEQUENCE = 1
"""A token budget that leaves every sequence alone in its micro-batch."""
SETTINGS: dict[str, Any] = {
    # The weights move by far more than the bounds, and the policy stays near the one that sampled.
    "optimizer.lr": 1e-3,
    # An expert of few tokens has a small gradient, and moves by much less than the others where this is larger.
    "optimizer.eps": 1e-4,
    # Rows that have them say so.
    "training.shared_prefix": "never",
    "model.routing_replay": False,
}
REFERENCE_SETTINGS: dict[str, Any] = {
    "training.tokens_per_micro_batch": ONE_SEQUENCE,
    "optimizer.distributed": False,
    "optimizer.overlap_grad_reduce": False,
}
OVERLAPPED: dict[str, Any] = {
    "optimizer.overlap_grad_reduce": True,
    "optimizer.overlap_param_gather": True,
    # Small enough for several buckets.
    "optimizer.bucket_parameters": 20_000,
}
FP32_BOUND = 1e-5
SP2 = {"tensor": 2, "sequence_parallel": True}


@dataclass(frozen=True)
class Case:
    """One row. `parallel` and `settings` are configuration; `settings` has dotted keys.

    against: another case of the same world size; None is one process with one sequence a micro-batch. bounds: largest
    relative error of each of MEASURES; `reason` says what makes one of them larger than FP32_BOUND.
    """

    name: str
    model: str
    parallel: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    bounds: tuple[float, float, float, float] = (FP32_BOUND,) * 4
    reason: str = ""

    @property
    def world_size(self) -> int:
        sizes = [self.parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context", "data")]
        return int(np.prod(sizes))

    @property
    def reference(self) -> Case:
        """What `against` None stands for: the same mathematics on one process."""
        same = ("model.dtype", "model.routing_replay")
        settings = REFERENCE_SETTINGS | {key: self.settings[key] for key in same if key in self.settings}
        return Case("one process", self.model, {}, settings)


@dataclass(frozen=True)
class Outcome:
    """What the updates of a case left. losses, grad_norms and metrics: one an update. logp_N: of all updates' tokens,
    float64.

    weights: float32, by Hugging Face name.
    """

    losses: list[float]
    grad_norms: list[float]
    metrics: list[dict[str, float]]
    logp_N: np.ndarray
    weights: dict[str, np.ndarray]

    def equals(self, other: Outcome) -> bool:
        """To the bit."""
        return (
            self.losses == other.losses
            and self.grad_norms == other.grad_norms
            and self.metrics == other.metrics
            and np.array_equal(self.logp_N, other.logp_N)
            and self.weights.keys() == other.weights.keys()
            and all(np.array_equal(w, other.weights[name]) for name, w in self.weights.items())
        )


def configuration(case: Case, model_directory: Path) -> RunConfig:
    raw = run_config(model_directory, dict(case.parallel)).model_dump()
    for key, value in (SETTINGS | dict(case.settings)).items():
        section, name = key.rsplit(".", 1)
        place = raw
        for part in section.split("."):
            place = place[part]
        place[name] = value
    return RunConfig.model_validate(raw)


Updates = list[list[TrainSequence]]


def make_updates(model: torch.nn.Module, hf: HFModelConfig) -> Updates:
    """The global batch of each update: four prompts of 4 to 8 tokens, each with two responses of 1 to 8.

    log μ is transformers' log-prob and a little noise, so that no loss is the small difference of large terms. Every
    sampled token has its own, by which results of different packings are brought into one order. Routed experts are
    random sets, alike on the prompts of a group; the last prompt's second response has a negative advantage.
    """
    rng = np.random.default_rng(5)
    updates = []
    for _ in range(UPDATES):
        sequences = []
        for group in range(4):
            # Behind the special tokens: the embedding of padding is 0, where a norm's gradient is 1 / √eps.
            prompt_ids = rng.integers(3, hf.vocab_size, int(rng.integers(4, 9)))
            prompt_experts = _random_experts(rng, hf, len(prompt_ids))
            for sample in range(2):
                response = int(rng.integers(1, 9))
                token_ids_L = np.append(prompt_ids, rng.integers(3, hf.vocab_size, response))
                length, positions = len(token_ids_L), np.arange(len(token_ids_L) - 1)
                sampled_L = np.arange(length) >= len(prompt_ids)
                with torch.no_grad():
                    logits_LV = model(torch.from_numpy(token_ids_L)[None]).logits[0, :-1] / TEMPERATURE
                logp_L = torch.log_softmax(logits_LV, -1).numpy()[positions, token_ids_L[1:]]
                logmu_L = np.append(0.0, logp_L) + 0.3 * rng.normal(size=length)
                experts = None
                if prompt_experts is not None:
                    experts = np.append(prompt_experts, _random_experts(rng, hf, response - 1), axis=0)
                sequences.append(
                    TrainSequence(
                        token_ids_L=token_ids_L.astype(np.int32),
                        sampled_L=sampled_L,
                        logmu_L=(logmu_L * sampled_L).astype(np.float32),
                        version_L=np.zeros(length, dtype=np.int32),
                        advantage=float(rng.uniform(0.5, 1.5)) * (-1 if group == 3 and sample else 1),
                        weight=1 / (8 * response),
                        prompt_length=len(prompt_ids),
                        row=len(sequences),
                        routed_experts_PLK=experts,
                    )
                )
        updates.append(sequences)
    return updates


def _random_experts(rng: np.random.Generator, hf: HFModelConfig, positions: int) -> np.ndarray | None:
    if hf.moe is None:
        return None
    order_PLE = rng.random((positions, sum(hf.moe.layers), hf.moe.num_experts)).argsort(-1)
    return order_PLE[..., : hf.moe.top_k].astype(np.int16)


def write_models(root: Path, names: Sequence[str]) -> dict[str, Updates]:
    """A directory a model, under `root`; returns what each is trained on."""
    updates = {}
    for name in names:
        family, changes = MODELS[name]
        model = tiny_models.write(family, root / name, **changes)
        updates[name] = make_updates(model, HFModelConfig.load(root / name))
    return updates


def run_cases(root: Path, updates: Mapping[str, Updates], cases: Sequence[Case]) -> list[Outcome]:
    """All `cases`, of one world size, one after the other on these ranks; the list is empty but on rank 0."""
    import torch.distributed as dist

    from drpo_megatron.platform import distributed

    outcomes = []
    for index, case in enumerate(cases):
        config = configuration(case, root / case.model)
        if index:
            distributed.change_layout(config.layout, timeout_s=60, seed=0)
        else:
            distributed.initialize(config.layout, timeout_s=60, seed=0, deterministic=config.training.deterministic)
        outcome = _outcome(config, updates[case.model])
        if dist.get_rank() == 0:
            outcomes.append(outcome)
    distributed.shutdown()
    return outcomes


def _outcome(config: RunConfig, updates: Updates) -> Outcome:
    import torch.distributed as dist

    from drpo_megatron.algorithms import TokenStats, summarize
    from drpo_megatron.training.step import Policy
    from drpo_megatron.weights.exporter import iter_hf_tensors

    policy = Policy(config)
    losses, grad_norms, metrics, logp = [], [], [], []
    for version, sequences in enumerate(updates):
        result = policy.update(sequences, version)
        assert result.applied
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (result.stats, result.places_2N))
        stats = TokenStats.cat([s for s, _ in everyone if s is not None])
        places_2N = torch.cat([places for _, places in everyone if places is not None], dim=1)
        logmu_N = [float(sequences[row].logmu_L[index]) for row, index in places_2N.T.tolist()]
        assert stats.logmu_N.tolist() == logmu_N, "tokens are not at their places"
        order_N = torch.argsort(stats.logmu_N)
        assert len(order_N) == sum(int(s.sampled_L.sum()) for s in sequences)
        losses.append(float(stats.objective_N[order_N].double().sum()))
        grad_norms.append(result.grad_norm)
        metrics.append(summarize(stats, DELTA))
        logp.append(stats.logp_N[order_N].double().numpy())
    weights = {n: t.float().cpu().numpy().copy() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}
    return Outcome(losses, grad_norms, metrics, np.concatenate(logp), weights)


def errors(actual: Outcome, expected: Outcome) -> tuple[float, float, float, float]:
    """Relative errors in the order of MEASURES, the worst over updates, tokens and parameters.

    Loss and gradient norm: |a − e| / |e|. Log-probs: largest |a − e| over the largest |e|. Parameters: the same of each
    tensor.
    """
    assert actual.weights.keys() == expected.weights.keys()

    def scaled(a: Any, e: Any) -> float:
        return float(np.abs(np.asarray(a, np.float64) - e).max() / np.abs(e).max())

    return (
        max(scaled(a, e) for a, e in zip(actual.losses, expected.losses, strict=True)),
        max(scaled(a, e) for a, e in zip(actual.grad_norms, expected.grad_norms, strict=True)),
        scaled(actual.logp_N, expected.logp_N),
        max(scaled(actual.weights[name], weight) for name, weight in expected.weights.items()),
    )


def smallest_move(outcome: Outcome, model_directory: Path) -> float:
    """Of the trained parameters, the least largest change over the largest weight. The router's bias is not trained."""
    before = load_file(model_directory / "model.safetensors")
    return min(
        float(np.abs(weight - before[name]).max() / np.abs(before[name]).max())
        for name, weight in outcome.weights.items()
        if not name.endswith("e_score_correction_bias")
    )
