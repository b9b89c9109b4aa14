"""What FP8 does to an update: seen without changing it, and equal to what another policy without FP8 gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo_megatron.fp8.health import HealthLog, TensorHealth, UpdateHealth, merged
from tests.support import tiny_models
from tests.support.launch import run_ranks
from tests.support.updates import make_sequences, run_config

LAYOUTS = [{"data": 2}, {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}]
RECIPES = ["delayed", "blockwise"]


def _flat_gradient(policy: Any) -> torch.Tensor:
    """The whole gradient before the optimizer touches it, where the layout leaves it whole on every rank."""
    taken = {}
    step = policy.optimizer.prepare_grads

    def take() -> Any:
        for name, parameter in policy.chunks[0].module.named_parameters():
            taken[name] = parameter.main_grad.clone()
        return step()

    policy.optimizer.prepare_grads = take
    return taken


def look_on_ranks(
    model: Path, sequences: list[Any], layouts: list[dict[str, Any]], recipes: list[str]
) -> dict[str, Any]:
    import torch.distributed as dist

    from drpo_megatron.platform import distributed
    from drpo_megatron.weights.exporter import iter_hf_tensors

    def policy_of(parallel: dict[str, Any], *, whole: bool = False, **changes: Any) -> Any:
        from drpo_megatron.training.step import Policy

        config = run_config(model, parallel)
        fp8 = config.fp8.model_copy(update={"backend": "emulate", "amax_history": 4} | changes)
        optimizer = config.optimizer.model_copy(update={"distributed": not whole})
        return Policy(config.model_copy(update={"fp8": fp8, "optimizer": optimizer}))

    def weights(policy: Any) -> dict[str, torch.Tensor]:
        return {n: t.clone() for b in iter_hf_tensors(policy.modules, policy.hf) for n, t in b}

    answers: dict[str, Any] = {}
    for index, parallel in enumerate(layouts):
        layout = run_config(model, parallel).layout
        (distributed.change_layout if index else distributed.initialize)(layout, seed=0)
        for recipe in recipes:
            # The scales of `delayed` come from the updates before.
            plain, examined = (policy_of(parallel, recipe=recipe) for _ in range(2))
            looks = []
            for version in range(2):
                plain.update(sequences, version)
                looks.append(examined.update(sequences, version, examine=version == 0).fp8)
            plain.update(sequences, 2)
            result = examined.update(sequences, 2, examine=True)
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, result.fp8)
            same = all(
                torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(examined).values(), strict=True)
            )
            state = [
                m.quantizer.state() for p in (plain, examined) for m in p.chunks[0].modules() if hasattr(m, "quantizer")
            ]
            answers[f"{recipe} {parallel}"] = (everyone, same, state, looks[0].gradient_cosine)
    # The cosine by hand: data parallelism without the distributed optimizer leaves every gradient whole.
    distributed.change_layout(run_config(model, {"data": 2}).layout, seed=0)
    exact = policy_of({"data": 2}, whole=True)
    rough = policy_of({"data": 2}, whole=True, recipe="tensorwise")
    gradients = [_flat_gradient(p) for p in (exact, rough)]
    exact.update(sequences, 0)
    rough.update(sequences, 0)
    a, b = (torch.cat([g.flatten() for g in taken.values()]).double() for taken in gradients)
    by_hand = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    looked = policy_of({"data": 2}, recipe="tensorwise").update(sequences, 0, examine=True).fp8
    assert looked is not None
    distributed.shutdown()
    return {"looks": answers, "cosine": (by_hand, looked.gradient_cosine)}


def compare(root: Path, layouts: list[dict[str, Any]], recipes: list[str]) -> None:
    from safetensors.torch import load_file

    tiny_models.write("qwen3", root / "model")
    sequences = make_sequences(tiny_models.VOCAB_SIZE)
    answers = run_ranks(2, look_on_ranks, root / "model", sequences, layouts, recipes)[0]
    by_hand, looked = answers["cosine"]
    assert looked == pytest.approx(by_hand, abs=1e-6)
    assert 0.8 < looked < 0.999
    largest = float(load_file(root / "model" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].abs().max())
    first = [cosine for case, (*_, cosine) in answers["looks"].items() if case.startswith("blockwise")]
    assert len(first) == len(layouts) and max(first) - min(first) < 1e-3 and 0.9 < first[0] < 0.999
    for case, (ranks, same, state, _) in answers["looks"].items():
        assert same, case
        half = len(state) // 2
        for of_plain, of_examined in zip(state[:half], state[half:], strict=True):
            assert of_plain is of_examined is None or all(torch.equal(of_plain[k], of_examined[k]) for k in of_plain), (
                case
            )
        tensors = {(t.layer, t.role): t for t in merged(t for rank in ranks for t in rank.tensors)}
        layers = {layer for layer, _ in tensors}
        assert layers == {
            f"decoder.layers.{n}.{part}"
            for n in range(4)
            for part in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
        }, case
        assert len(tensors) == 3 * len(layers), case
        # Two small updates have moved it since.
        assert tensors["decoder.layers.1.mlp.linear_fc2", "weight"].amax == pytest.approx(largest, abs=0.05), case
        assert all(0 <= t.saturated <= 1 and 0 <= t.underflow <= 1 and t.amax > 0 for t in tensors.values()), case
        assert len({rank.gradient_cosine for rank in ranks}) == 1 and ranks[0].gradient_cosine < 0.999, case


@pytest.mark.distributed
def test_an_examined_update_is_the_same_update(tmp_path: Path) -> None:
    compare(tmp_path, LAYOUTS[1:2], ["blockwise"])


def test_tensors_of_ranks_and_micro_batches_are_one() -> None:
    tensors = [
        TensorHealth("fc1", "input", 2.0, 0.5, 0.0, values=100),
        TensorHealth("fc1", "weight", 8.0, 0.0, 0.25, values=10),
        TensorHealth("fc1", "input", 4.0, 0.1, 0.2, values=300),
    ]
    log = HealthLog()
    rows, metrics = log.add([UpdateHealth(tensors[:2], 0.99), UpdateHealth(tensors[2:], 0.99)])
    assert rows[0] == TensorHealth("fc1", "input", 4.0, pytest.approx(0.2), pytest.approx(0.15), values=400)
    assert metrics == {
        "fp8/gradient_cosine": 0.99,
        "fp8/amax_max": 8.0,
        "fp8/saturated_max": pytest.approx(0.2),
        "fp8/underflow_max": 0.25,
    }
    _, metrics = log.add([UpdateHealth([TensorHealth("fc1", "weight", 1.0, 0.0, 0.0, values=10)], math.nan)])
    assert metrics["fp8/amax_jump_max"] == 3.0
    assert math.isnan(metrics["fp8/gradient_cosine"])
