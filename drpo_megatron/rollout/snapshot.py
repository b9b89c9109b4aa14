"""Sampled tokens as plain data and tensors, for a checkpoint, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from drpo_megatron.records import Prompt, Rollout, RolloutGroup
from drpo_megatron.rollout.client import Completion


def completion_state(completion: Completion) -> dict[str, Any]:
    return _with_tensor(_fields(completion))


def completion_from(state: dict[str, Any]) -> Completion:
    return Completion(**_with_array(state))


def group_state(group: RolloutGroup) -> list[dict[str, Any]]:
    """Of the rollouts, without their prompt."""
    return [_with_tensor({k: v for k, v in _fields(r).items() if k != "prompt"}) for r in group.rollouts]


def group_from(prompt: Prompt, state: list[dict[str, Any]]) -> RolloutGroup:
    return RolloutGroup(prompt, [Rollout(prompt=prompt, **_with_array(of_one)) for of_one in state])


def _fields(record: Completion | Rollout) -> dict[str, Any]:
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}


def _with_tensor(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint is read without unpickling, and that knows tensors and no arrays."""
    experts: np.ndarray | None = state["routed_experts"]
    return state | {"routed_experts": None if experts is None else torch.from_numpy(experts.copy())}


def _with_array(state: dict[str, Any]) -> dict[str, Any]:
    experts: torch.Tensor | None = state["routed_experts"]
    return state | {"routed_experts": None if experts is None else experts.numpy()}
