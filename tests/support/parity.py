"""What a row of the parity table is, and what runs one: updates of a tiny model by the real `Policy`.

A case is a line: a model, a layout, settings over those of `tests.support.updates.run_config`, and what it is compared
with. Every case of a model has the same weights (one Hugging Face directory) and, unless it says otherwise, the same
sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.training.packing import TrainSequence
from tests.support import tiny_models
from tests.support.pool import LIMIT_S
from tests.support.references import Reference
from tests.support.updates import DELTA, TEMPERATURE, run_config, short_answers

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
ONE_SEQUENCE = 7
"""A token budget that leaves every sequence alone in its micro-batch: the shortest two have four positions each. With a
smaller one most micro-batches are empty.
"""
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
# What is part of the mathematics: a case and the process that it is compared with have the same.
MATHEMATICS = (
    "model.dtype",
    "model.routing_replay",
    "model.moe_aux_loss_coefficient",
    "model.moe_z_loss_coefficient",
    "model.moe_bias_update_rate",
    "algorithm.loss",
    "algorithm.loss_args",
)
FP32_BOUND = 1e-5
ON_ONE_RANK = "sampled on one rank"
SP2 = {"tensor": 2, "sequence_parallel": True}


@dataclass(frozen=True)
class Case:
    """One row. `parallel` and `settings` are configuration; `settings` has dotted keys.

    against: another case of the same world size; None is one process with one sequence a micro-batch. bounds: largest
    relative error of each of MEASURES; `reason` says what makes one of them larger than FP32_BOUND. sequences: ""
    or ON_ONE_RANK. poisoned: after its updates it gets two that are not finite. fast: a row of the fast tests.
    """

    name: str
    model: str
    parallel: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    bounds: tuple[float, float, float, float] = (FP32_BOUND,) * 4
    reason: str = ""
    sequences: str = ""
    poisoned: bool = False
    fast: bool = False

    @property
    def world_size(self) -> int:
        sizes = [self.parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context", "data")]
        return int(np.prod(sizes))

    @property
    def reference(self) -> Case:
        """What `against` None stands for: the same mathematics on one process."""
        settings = REFERENCE_SETTINGS | {key: self.settings[key] for key in MATHEMATICS if key in self.settings}
        return Case("one process", self.model, {}, settings, sequences=self.sequences)


@dataclass(frozen=True)
class Outcome:
    """What the updates of a case left. losses, grad_norms, metrics and routing: one an update. logp_N: of all updates'
    tokens, float64.

    weights: float32, by Hugging Face name. tokens: of each rank that computed losses, in the first update. saved: the
    share of positions that shared prefixes saved, of the first update. routing: sums over ranks; empty for a dense
    model. stopped: the error after two updates that are not finite; empty where there were none.
    """

    losses: list[float]
    grad_norms: list[float]
    metrics: list[dict[str, float]]
    logp_N: np.ndarray
    weights: dict[str, np.ndarray]
    tokens: list[int]
    saved: float
    routing: list[dict[str, float]]
    stopped: str

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


def make_updates(model: torch.nn.Module, hf: HFModelConfig, count: int = UPDATES) -> Updates:
    """The global batch of each update: four prompts of 4 to 8 tokens, each with two responses of 1 to 8.

    log μ is transformers' log-prob and a little noise, so that no loss is the small difference of large terms. Every
    sampled token has its own, by which results of different packings are brought into one order. Routed experts are
    random sets, alike on the prompts of a group; the last prompt's second response has a negative advantage.
    """
    rng = np.random.default_rng(5)
    updates = []
    for _ in range(count):
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


def sequences_of(case: Case, updates: Updates) -> Updates:
    if case.sequences == ON_ONE_RANK:
        return [short_answers(number) for number in range(len(updates))]
    assert not case.sequences
    return updates


def _random_experts(rng: np.random.Generator, hf: HFModelConfig, positions: int) -> np.ndarray | None:
    if hf.moe is None:
        return None
    order_PLE = rng.random((positions, sum(hf.moe.layers), hf.moe.num_experts)).argsort(-1)
    return order_PLE[..., : hf.moe.top_k].astype(np.int16)


def write_models(root: Path, names: Sequence[str], count: int = UPDATES) -> dict[str, Updates]:
    """A directory a model, under `root`; returns what each is trained on, `count` updates."""
    updates = {}
    for name in names:
        family, changes = MODELS[name]
        model = tiny_models.write(family, root / name, **changes)
        updates[name] = make_updates(model, HFModelConfig.load(root / name), count)
    return updates


def run_cases(root: Path, updates: Mapping[str, Updates], cases: Sequence[Case]) -> list[Outcome]:
    """All `cases`, of one world size, one after the other on these ranks; the list is empty but on rank 0."""
    import torch.distributed as dist

    from drpo_megatron.platform import distributed

    outcomes = []
    for index, case in enumerate(cases):
        config = configuration(case, root / case.model)
        if index:
            distributed.change_layout(config.layout, timeout_s=LIMIT_S, seed=0)
        else:
            distributed.initialize(
                config.layout, timeout_s=LIMIT_S, seed=0, deterministic=config.training.deterministic
            )
        try:
            outcome = _outcome(config, sequences_of(case, updates[case.model]), case.poisoned)
        except Exception as error:
            error.add_note(f"in {case}")
            raise
        if dist.get_rank() == 0:
            outcomes.append(outcome)
    distributed.shutdown()
    return outcomes


def _outcome(config: RunConfig, updates: Updates, poisoned: bool) -> Outcome:
    import torch.distributed as dist

    from drpo_megatron.algorithms import TokenStats, summarize
    from drpo_megatron.training.step import Policy

    policy = Policy(config)
    losses, grad_norms, metrics, logp, tokens, saved, routing = [], [], [], [], [], [], []
    for version, sequences in enumerate(updates):
        result = policy.update(sequences, version)
        assert result.applied
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (result.stats, result.places_2N, result.routing))
        with_stats = [s for s, _, _ in everyone if s is not None]
        stats = TokenStats.cat(with_stats)
        places_2N = torch.cat([places for _, places, _ in everyone if places is not None], dim=1)
        logmu_N = [float(sequences[row].logmu_L[index]) for row, index in places_2N.T.tolist()]
        assert stats.logmu_N.tolist() == logmu_N, "tokens are not at their places"
        order_N = torch.argsort(stats.logmu_N)
        assert len(order_N) == sum(int(s.sampled_L.sum()) for s in sequences)
        losses.append(float(stats.objective_N[order_N].double().sum()))
        grad_norms.append(result.grad_norm)
        metrics.append(summarize(stats, DELTA))
        assert metrics[-1]["loss/mean"] == pytest.approx(losses[-1], rel=1e-5, abs=1e-6)
        assert metrics[-1]["staleness/max"] == version
        logp.append(stats.logp_N[order_N].double().numpy())
        tokens.append([s.logp_N.numel() for s in with_stats])
        saved.append(result.tokens_saved_frac)
        if result.routing is not None:
            routing.append({key: sum(getattr(r, key) for _, _, r in everyone) for key in vars(result.routing)})
    weights = _weights(policy)
    stopped = _refusal(policy, updates[-1], len(updates), weights) if poisoned else ""
    logp_N = np.concatenate(logp)
    return Outcome(losses, grad_norms, metrics, logp_N, weights, tokens[0], saved[0], routing, stopped)


def _weights(policy: Any) -> dict[str, np.ndarray]:
    from drpo_megatron.weights.exporter import iter_hf_tensors

    return {n: t.float().cpu().numpy().copy() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}


def _refusal(policy: Any, sequences: list[TrainSequence], version: int, weights: dict[str, np.ndarray]) -> str:
    """An update that is not finite changes nothing on any rank, and a second one is an error, which is returned."""
    poisoned = [*sequences[:-1], replace(sequences[-1], advantage=float("nan"))]
    assert not policy.update(poisoned, version).applied
    after = _weights(policy)
    assert all(np.array_equal(weight, after[name]) for name, weight in weights.items())
    with pytest.raises(FloatingPointError) as refused:
        policy.update(poisoned, version)
    return str(refused.value)


def _scaled(a: Any, e: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - e).max() / np.abs(e).max())


def errors(actual: Outcome, expected: Outcome | Reference) -> tuple[float, float, float, float]:
    """Relative errors in the order of MEASURES, the worst over updates, tokens and parameters.

    Loss and gradient norm: |a − e| / |e|. Log-probs: largest |a − e| over the largest |e|. Parameters: the same of each
    tensor. The router's bias is no parameter of transformers' models.
    """
    names = set(actual.weights)
    if isinstance(expected, Reference):
        names = {name for name in names if not name.endswith("e_score_correction_bias")}
    assert names == set(expected.weights)
    return (
        max(_scaled(a, e) for a, e in zip(actual.losses, expected.losses, strict=True)),
        max(_scaled(a, e) for a, e in zip(actual.grad_norms, expected.grad_norms, strict=True)),
        _scaled(actual.logp_N, expected.logp_N),
        max(_scaled(actual.weights[name], np.asarray(expected.weights[name])) for name in names),
    )


TRANSFORMERS_BOUNDS = (1e-5, 1e-4, 1e-5, 1e-5)


def check_reference(case: Case, actual: Outcome, expected: Reference) -> None:
    """One process of ours against transformers, in float64: all of it, and what routers were asked and chose."""
    for measure, error, bound in zip(MEASURES, errors(actual, expected), TRANSFORMERS_BOUNDS, strict=True):
        assert error <= bound, f"{case}: {measure}"
    replay = case.settings.get("model.routing_replay", False)
    for update, sums in enumerate(actual.routing):
        compared, own = expected.compared[update], expected.own_disagreements[update]
        assert sums["compared"] == compared, case
        # Most sets of experts are not what a router would choose.
        assert sums["own_disagreements"] == own > 0.8 * compared, case
        assert sums["disagreements"] == (0 if replay else own), case
        for name, value, losses in (("aux", "aux_loss", expected.balance), ("z", "z_loss", expected.z)):
            if case.settings.get(f"model.moe_{name}_loss_coefficient"):
                assert sums[value] == pytest.approx(losses[update], rel=1e-5), (case, value)


def check_case(case: Case, actual: Outcome, expected: Outcome) -> None:
    """A row of the table against what it is compared with."""
    for measure, error, bound in zip(MEASURES, errors(actual, expected), case.bounds, strict=True):
        assert error <= bound, f"{case}: {measure}"
    # Tensor rank 0 of the last stage has them, for each data and context parallel rank its own.
    ranks = case.parallel.get("data", 1) * case.parallel.get("context", 1)
    assert len(actual.tokens) == ranks and sum(actual.tokens) == sum(expected.tokens), case
    if case.sequences == ON_ONE_RANK:
        assert actual.tokens[0] == 0, case
    if case.settings.get("training.shared_prefix") == "always":
        assert 0 < actual.saved < 0.5, case
    else:
        assert actual.saved == 0, case
    for ours, theirs in zip(actual.routing, expected.routing, strict=True):
        for name in ("compared", "own_disagreements", "disagreements"):
            assert ours[name] == theirs[name], (case, name)
        for name in ("aux_loss", "z_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (case, name)
    assert ("2 updates in a row" in actual.stopped) == case.poisoned, case


def check_biases(directory: Path, updates: Updates, rate: float, outcome: Outcome) -> None:
    """Each expert's bias moved in every update by the rate, against its load in the replayed experts."""
    before = load_file(directory / "model.safetensors")
    hf = HFModelConfig.load(directory)
    assert hf.moe is not None
    layers = [layer for layer in range(hf.num_layers) if hf.is_moe_layer(layer)]
    for index, layer in enumerate(layers):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        expected_E = before[name].astype(np.float64)
        for sequences in updates:
            experts = [s.routed_experts_PLK[:, index].ravel() for s in sequences]
            load_E = np.bincount(np.concatenate(experts), minlength=hf.moe.num_experts)
            assert len(set(load_E)) > 2
            expected_E = expected_E + rate * np.sign(load_E.mean() - load_E)
        np.testing.assert_allclose(outcome.weights[name], expected_E, atol=1e-6, rtol=0)


def smallest_move(outcome: Outcome, model_directory: Path, experts: bool = True) -> float:
    """Of the trained parameters, the least largest change over the largest weight. The router's bias is not trained,
    and in few updates no token may have gone to some expert.
    """
    before = load_file(model_directory / "model.safetensors")
    return min(
        float(np.abs(weight - before[name]).max() / np.abs(before[name]).max())
        for name, weight in outcome.weights.items()
        if not name.endswith("e_score_correction_bias") and (experts or ".experts." not in name)
    )
