"""Training with the rollout's experts, and with auxiliary losses: one update on many layouts, against transformers'
forward with the experts forced on it, autograd and torch's AdamW, one sequence at a time.

Every sequence is a micro-batch of its own, and most of a micro-batch is padding.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.training.packing import TrainSequence
from tests.ranks.test_train_step import CLIP, DELTA, EPS, LR, TEMPERATURE, make_sequences, run_config
from tests.support import tiny_models
from tests.support.launch import run_ranks
from tests.support.layouts import many_layouts

pytestmark = pytest.mark.distributed

FAMILIES = ("qwen3_moe", "deepseek_v3")
LOSSES = {"moe_aux_loss_coefficient": 3.0, "moe_z_loss_coefficient": 0.3}
BIAS_RATE = 0.125


def config_of(path: Path, parallel: dict[str, Any], model: dict[str, Any]) -> RunConfig:
    config = run_config(path, parallel, tokens_per_micro_batch=1)
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def with_experts(sequences: list[TrainSequence], hf: HFModelConfig) -> list[TrainSequence]:
    """Random sets of experts for every position and layer: most are not what a router would choose."""
    assert hf.moe is not None
    rng = np.random.default_rng(5)
    layers, experts, count = sum(hf.moe.layers), hf.moe.num_experts, hf.moe.top_k
    return [
        replace(
            s,
            routed_experts_PLK=rng.random((s.num_positions, layers, experts)).argsort(-1)[..., :count].astype(np.int16),
        )
        for s in sequences
    ]


class ForcedGates:
    """Hooks on transformers' routers: they take the experts of `targets_PLK`, and keep logits and their own choice."""

    def __init__(self, model: Any, hf: HFModelConfig) -> None:
        self.moe = hf.moe
        self.targets_PLK: torch.Tensor | None = None
        gates = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
        self.logits: list[Any] = [None] * len(gates)
        self.own: list[Any] = [None] * len(gates)
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda _, __, output, layer=layer: self._force(layer, output))

    def scores(self, logits_PE: torch.Tensor) -> torch.Tensor:
        return logits_PE.sigmoid() if self.moe.score_function == "sigmoid" else logits_PE.softmax(-1)

    def _force(self, layer: int, output: Any) -> Any:
        logits_PE, weights_PK, own_PK = output
        self.logits[layer], self.own[layer] = logits_PE, own_PK
        if self.targets_PLK is None:
            return output
        target_PK = self.targets_PLK[:, layer]
        weights = self.scores(logits_PE).gather(1, target_PK)
        weights = self.moe.scaling_factor * weights / weights.sum(-1, keepdim=True)
        return logits_PE, weights.to(weights_PK.dtype), target_PK

    def disagreements(self, target_PLK: torch.Tensor, sampled_P: torch.Tensor) -> int:
        """Sampled tokens × layers whose own choice is another set than the target."""
        own_PLK = torch.stack(self.own, dim=1)
        differs_PL = (own_PLK.sort(-1).values != target_PLK.sort(-1).values).any(-1)
        return int(differs_PL[sampled_P].sum())

    def auxiliary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(load-balancing loss of this sequence, sum of squared log-sum-exp over its tokens), summed over layers."""
        balance, z = torch.zeros(()), torch.zeros(())
        for logits_PE in self.logits:
            scores_PE = self.scores(logits_PE)
            scores_PE = scores_PE / scores_PE.sum(-1, keepdim=True)
            chosen_PK = scores_PE.topk(self.moe.top_k).indices
            share_E = torch.bincount(chosen_PK.flatten(), minlength=self.moe.num_experts) / chosen_PK.numel()
            balance = balance + self.moe.num_experts * (share_E * scores_PE.mean(0)).sum()
            z = z + logits_PE.logsumexp(-1).square().sum()
        return balance, z


def reference_update(path: Path, sequences: list[TrainSequence], *, replay: bool, losses: bool) -> dict[str, Any]:
    """The update, in float64 but for what transformers' routers compute in float32."""
    hf = HFModelConfig.load(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    gates = ForcedGates(model, hf)
    total = torch.zeros((), dtype=torch.float64)
    positions, trained, differing = sum(s.num_positions for s in sequences), 0, 0
    balance, z = torch.zeros(()), torch.zeros(())
    for s in sequences:
        tokens_L = torch.from_numpy(s.token_ids_L.astype(np.int64))
        target_PLK = torch.from_numpy(s.routed_experts_PLK).long()
        gates.targets_PLK = target_PLK if replay else None
        logp_LV = torch.log_softmax(model(tokens_L[None, :-1]).logits[0] / TEMPERATURE, -1)
        logp_L = logp_LV.gather(1, tokens_L[1:, None])[:, 0]
        mask_L, logmu_L = torch.from_numpy(s.sampled_L[1:]), torch.from_numpy(s.logmu_L[1:])
        r_L = (logp_L - logmu_L).exp()
        loss_L = -s.advantage * r_L + abs(s.advantage) * logmu_L.exp() * (r_L - 1) ** 2 / (2 * DELTA)
        total = total + s.weight * loss_L[mask_L].sum()
        trained += int(mask_L.sum())
        differing += gates.disagreements(target_PLK, mask_L)
        own_balance, own_z = gates.auxiliary()
        balance, z = balance + own_balance * s.num_positions / positions, z + own_z / positions
    if losses:
        total = total + LOSSES["moe_aux_loss_coefficient"] * balance + LOSSES["moe_z_loss_coefficient"] * z
    model.zero_grad()
    total.backward()
    updated = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(updated, CLIP)
    torch.optim.AdamW(updated, lr=LR, weight_decay=0.0, eps=EPS).step()
    names = {n for n, p in model.named_parameters() if p.grad is not None}
    weights = revert_weight_conversion(model, {n: p.detach() for n, p in model.named_parameters() if n in names})
    layers = sum(hf.moe.layers)
    return {
        "grad_norm": float(norm),
        "weights": {n: w.clone() for n, w in weights.items()},
        "compared": trained * layers,
        "own_disagreements": differing,
        "aux_loss": float(balance.detach()),
        "z_loss": float(z.detach()),
    }


def break_replay() -> None:
    """From here on every token follows the experts of the one before it, and the comparison is not told."""
    from drpo_megatron.models.routing import _RolloutTopK

    choose = _RolloutTopK.get_replay_topk

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.target_NK = self.target_NK.roll(1, 0)
        return choose(self, *args, **kwargs)

    _RolloutTopK.get_replay_topk = shifted


def update_on_ranks(cases: dict[str, tuple[Path, dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """For each case (model, layout, settings of the model): what an update leaves behind, on rank 0."""
    import torch.distributed as dist

    from drpo_megatron.platform import distributed

    answers, initialized = {}, False
    for key, (path, parallel, model) in cases.items():
        config = config_of(path, parallel, model)
        (distributed.change_layout if initialized else distributed.initialize)(config.layout, timeout_s=300, seed=0)
        initialized = True
        from drpo_megatron.training.step import Policy
        from drpo_megatron.weights.exporter import iter_hf_tensors

        hf = HFModelConfig.load(path)
        sequences = with_experts(make_sequences(hf.vocab_size), hf)
        policy = Policy(config)
        if key == "broken":
            break_replay()
        result = policy.update(sequences, version=0)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, result.routing)
        after = {n: t.clone() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}
        poisoned = [*sequences[:-1], replace(sequences[-1], advantage=float("nan"))]
        skipped = policy.update(poisoned, version=0)
        unchanged = {n: t.clone() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}
        answers[key] = {
            "grad_norm": result.grad_norm,
            "after": after,
            "skipped": not skipped.applied and all(torch.equal(after[n], unchanged[n]) for n in after),
            "routing": everyone,
        }
    distributed.shutdown()
    return answers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_models.write(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def references(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """By family, and whether the auxiliary losses are on: replayed. With `-own`: the routers choose."""
    found = {}
    for family, path in models.items():
        hf = HFModelConfig.load(path)
        sequences = with_experts(make_sequences(hf.vocab_size), hf)
        found[family] = reference_update(path, sequences, replay=True, losses=False)
        found[f"{family}-losses"] = reference_update(path, sequences, replay=True, losses=True)
        found[f"{family}-own"] = reference_update(path, sequences, replay=False, losses=False)
    return found


def check(case: str, answer: dict[str, Any], expected: dict[str, Any], *, replay: bool = True) -> None:
    assert answer["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), case
    for name, weight in expected["weights"].items():
        difference = (answer["after"][name] - weight).abs().max()
        assert float(difference) < 1e-3 * LR, (case, name)
    sums = {key: sum(getattr(r, key) for r in answer["routing"]) for key in vars(answer["routing"][0])}
    assert sums["compared"] == expected["compared"], case
    assert sums["own_disagreements"] == expected["own_disagreements"] > 0.8 * expected["compared"], case
    assert sums["disagreements"] == (0 if replay else expected["own_disagreements"]), case
    assert answer["skipped"], case


def check_losses(case: str, answer: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("aux_loss", "z_loss"):
        assert sum(getattr(r, key) for r in answer["routing"]) == pytest.approx(expected[key], rel=1e-5), (case, key)


def test_one_process(models: dict[str, Path], references: dict[str, dict[str, Any]]) -> None:
    """The experts, their gradients, the losses' scale, the experts' biases, and the comparison without replay."""
    cases: dict[str, Any] = {}
    for family, path in models.items():
        cases[family] = (path, {}, {"recompute": "selective"})
        cases[f"{family}-losses"] = (path, {}, LOSSES)
        cases[f"{family}-own"] = (path, {}, {"routing_replay": False})
    cases["biases"] = (models["deepseek_v3"], {}, {"moe_bias_update_rate": BIAS_RATE})
    cases["broken"] = (models["qwen3_moe"], {}, {})  # the last: what it breaks stays broken in its process
    (answers,) = run_ranks(1, update_on_ranks, cases, timeout_s=900)
    biases, broken = answers.pop("biases"), answers.pop("broken")
    for case, answer in answers.items():
        check(case, answer, references[case], replay=not case.endswith("-own"))
        if case.endswith("-losses"):
            check_losses(case, answer, references[case])
            plain = references[case.removesuffix("-losses")]["weights"]
            gates = [name for name in plain if name.endswith("gate.weight")]
            # So far do the losses move the routers' weights: a hundred times what the comparison lets pass.
            assert all((references[case]["weights"][n] - plain[n]).abs().max() > 0.1 * LR for n in gates)
    (routing,) = broken["routing"]
    assert routing.disagreements > 0.5 * routing.compared > 0
    check("biases", biases, references["deepseek_v3"])
    check_biases(models["deepseek_v3"], biases["after"])


def check_biases(path: Path, after: dict[str, torch.Tensor]) -> None:
    """Each expert's bias moved by the rate, against its load in the replayed experts."""
    from safetensors.torch import load_file

    before = load_file(path / "model.safetensors")
    hf = HFModelConfig.load(path)
    experts_PLK = np.concatenate(
        [
            s.routed_experts_PLK
            for s in with_experts(make_sequences(hf.vocab_size), hf)
            if s.routed_experts_PLK is not None
        ]
    )
    layers = [layer for layer in range(hf.num_layers) if hf.is_moe_layer(layer)]
    for index, layer in enumerate(layers):
        load_E = np.bincount(experts_PLK[:, index].ravel(), minlength=hf.moe.num_experts)
        assert len(set(load_E)) > 2
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        expected_E = before[name] + BIAS_RATE * torch.from_numpy(np.sign(load_E.mean() - load_E)).float()
        torch.testing.assert_close(after[name], expected_E, atol=1e-6, rtol=0)


FULL = {"recompute": "full"}
TWO_RANKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "pp2": ("qwen3_moe", {"pipeline": 2}, FULL),
    "pp2-kept": ("deepseek_v3", {"pipeline": 2}, {"moe_bias_update_rate": BIAS_RATE}),
    "ep2": ("deepseek_v3", {"data": 2, "expert": 2}, FULL | {"moe_bias_update_rate": BIAS_RATE}),
    "tp2-ep2": ("qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2}, FULL),
}
FOUR_RANKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vpp2-tp2-ep2": (
        "qwen3_moe",
        {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2, "sequence_parallel": True, "expert": 2},
        FULL,
    ),
    "pp2-dp2-ep2": ("deepseek_v3", {"pipeline": 2, "data": 2, "expert": 2}, FULL | {"moe_bias_update_rate": BIAS_RATE}),
}


@many_layouts
@pytest.mark.parametrize(("world", "layouts"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["2 ranks", "4 ranks"])
def test_layouts(
    world: int, layouts: dict[str, Any], models: dict[str, Path], references: dict[str, dict[str, Any]]
) -> None:
    """Recomputed layers, several micro-batches in flight, several chunks a stage: everyone finds its own experts."""
    cases = {key: (models[family], parallel, model | LOSSES) for key, (family, parallel, model) in layouts.items()}
    answers = run_ranks(world, update_on_ranks, cases, timeout_s=900)[0]
    for key, (family, _, settings) in layouts.items():
        check(key, answers[key], references[f"{family}-losses"])
        check_losses(key, answers[key], references[f"{family}-losses"])
        if "moe_bias_update_rate" in settings:
            check_biases(models[family], answers[key]["after"])
