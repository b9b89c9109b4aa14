"""The trainer's memory between updates: off the device and back with the real DDP and optimizers, and nothing
changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from drpo_megatron.training.packing import TrainSequence
from tests.support.launch import run_ranks
from tests.support.tiny_models import VOCAB_SIZE, write
from tests.support.updates import make_sequences, run_config

pytestmark = pytest.mark.distributed

CASES = {
    "float32, distributed optimizer": {"optimizer.distributed": True},
    "float32": {"optimizer.distributed": False},
    "bfloat16, distributed optimizer": {"optimizer.distributed": True, "model.dtype": "bfloat16"},
    "bfloat16": {"optimizer.distributed": False, "model.dtype": "bfloat16"},
    "bfloat16, overlapped": {
        "optimizer.overlap_param_gather": True,
        "optimizer.bucket_parameters": 20_000,
        "model.dtype": "bfloat16",
    },
}
UPDATES = 3


def policy_of(model_path: str, parallel: dict[str, Any], settings: dict[str, Any]) -> Any:
    from drpo_megatron.config.schema import RunConfig
    from drpo_megatron.training.step import Policy

    values = run_config(Path(model_path), parallel, steps=UPDATES).model_dump()
    for key, value in (settings | {"model.routing_replay": False}).items():
        section, name = key.split(".")
        values[section][name] = value
    return Policy(RunConfig.model_validate(values))


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    """This rank's parameters."""
    return {
        f"{index} {name}": parameter.detach().clone()
        for index, module in enumerate(policy.modules)
        for name, parameter in module.named_parameters()
    }


def device_bytes(policy: Any) -> tuple[int, int]:
    """Bytes behind the weights and behind the gradients, as the tensors of the model see them."""
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    return (
        sum(s.nbytes() for s in {p.untyped_storage() for p in parameters}),
        sum(s.nbytes() for s in {p.main_grad.untyped_storage() for p in parameters}),
    )


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [t.untyped_storage()._cdata for t in tensors]


def move_between_updates(
    model_path: str, parallel: dict[str, Any], sequences: list[TrainSequence], cases: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each case: the weights after updates with everything moved out and back between them, and without."""
    from megatron.core.optimizer import MegatronOptimizer

    from drpo_megatron.platform import distributed

    distributed.initialize(run_config(Path(model_path), parallel).layout, seed=0)
    calls: list[MegatronOptimizer] = []
    offload = MegatronOptimizer.offload_to_cpu
    with mock.patch.object(MegatronOptimizer, "offload_to_cpu", lambda self: (calls.append(self), offload(self))[1]):
        reports = _reports(model_path, parallel, sequences, cases, calls)
    distributed.shutdown()
    return reports


def _reports(
    model_path: str,
    parallel: dict[str, Any],
    sequences: list[TrainSequence],
    cases: dict[str, dict[str, Any]],
    calls: list[Any],
) -> dict[str, dict[str, Any]]:
    """`calls` gets Megatron's optimizers that moved."""
    from drpo_megatron.training.placement import TrainerMemory

    reports: dict[str, dict[str, Any]] = {}
    for name, settings in cases.items():
        plain = policy_of(model_path, parallel, settings)
        for version in range(UPDATES):
            plain.update(sequences, version)
        expected = weights_of(plain)

        policy = policy_of(model_path, parallel, settings)
        memory = TrainerMemory(policy.chunks, policy.optimizer)
        parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
        accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in parameters]
        before = addresses(parameters), device_bytes(policy)
        calls.clear()
        emptied, synced, left = [], [], 0
        for version in range(UPDATES):
            policy.update(sequences, version)
            # The turns of a step: sync, generate, train.
            memory.training_state_to_host()
            during_sync = device_bytes(policy)
            synced.append(weights_of(policy))
            memory.to_host()
            memory.to_host()
            emptied.append((during_sync, device_bytes(policy)))
            left = max(left, sum(t.untyped_storage().nbytes() for t in optimizer_tensors(memory) if t.is_cuda))
            memory.to_device()
            memory.to_device()
        after = weights_of(policy)
        reports[name] = {
            "expected": expected,
            "after": after,
            "last sync": synced[-1],
            "moved": any(not torch.equal(synced[0][n], after[n]) for n in after),
            "before": before[1],
            "emptied": emptied,
            "same storages": before[0] == addresses(parameters),
            "hooks": all(
                p.expand_as(p).grad_fn.next_functions[0][0] is a for p, a in zip(parameters, accumulators, strict=True)
            ),
            "megatron": len(calls),
            "left on a GPU": left,
            "state": len(optimizer_tensors(memory)) - len(parameters),
        }
    return reports


def optimizer_tensors(memory: Any) -> list[torch.Tensor]:
    """Main weights, or the model's own where the optimizer has no others, and the optimizer's state."""
    parts = [part for part in memory._owning + memory._sharing if part.param_groups]
    state = [t for part in parts for values in part.optimizer.state.values() for t in values.values()]
    main = [p for part in parts for group in part.param_groups for p in group["params"]]
    return main + [t for t in state if isinstance(t, torch.Tensor)]


def compare(root: Path, family: str, parallel: dict[str, Any], cases: dict[str, dict[str, Any]]) -> None:
    write(family, root / family)
    sequences = make_sequences(VOCAB_SIZE)
    reports = run_ranks(2, move_between_updates, str(root / family), parallel, sequences, cases)
    for report in reports:
        for case, found in report.items():
            weights, gradients = found["before"]
            assert weights > 0 and gradients > 0, case
            assert found["emptied"] == [((weights, 0), (0, 0))] * UPDATES, case
            assert found["moved"] and found["state"] > 0 and found["left on a GPU"] == 0, case
            for name, weight in found["expected"].items():
                assert torch.equal(found["after"][name], weight), (case, name)
                assert torch.equal(found["last sync"][name], weight), (case, name)
            # What the distributed optimizer's shards and DDP's hooks hang on.
            assert found["same storages"] and found["hooks"], case
            # Megatron's own call where the optimizer's parameters are its own, ours where they are the model's.
            assert (found["megatron"] > 0) == case.startswith("bfloat16"), case


@pytest.mark.parametrize(
    ("family", "parallel", "case"),
    [
        ("qwen2", {"data": 2}, "bfloat16, distributed optimizer"),
        ("qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2}, "float32"),
    ],
    ids=["qwen2", "qwen3_moe"],
)
def test_moving_out_and_back_changes_nothing(tmp_path: Path, family: str, parallel: dict[str, Any], case: str) -> None:
    compare(tmp_path, family, parallel, {case: CASES[case]})
