"""The experts that SGLang's routers chose, out of its answers."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.rollout.errors import GenerationError


@dataclass(frozen=True)
class RoutedExpertsFormat:
    """What SGLang records of a model. layers: for each of its layers, whether the MLP is a mixture of experts."""

    layers: tuple[bool, ...]
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, hf: HFModelConfig) -> RoutedExpertsFormat | None:
        """None for a dense model."""
        return None if hf.moe is None else cls(hf.moe.layers, hf.moe.num_experts, hf.moe.top_k)

    @classmethod
    def load(cls, model_path: Path) -> RoutedExpertsFormat | None:
        """From the `config.json` of a Hugging Face directory. Raises what `HFModelConfig.load` raises."""
        return cls.of(HFModelConfig.load(model_path))

    def decode(self, meta: dict[str, Any], positions: int) -> np.ndarray:
        """`Rollout.routed_experts`, int16 [positions, L, K], from the `meta_info` of one answer.

        positions: prompt + response − 1. SGLang sends int32 [positions, layers of the model, K] in base64; the rows of
        a dense layer hold nothing and are dropped. Raises GenerationError when the experts are missing, are not of this
        size, or are not K different experts of the model.
        """
        encoded = meta.get("routed_experts")
        if encoded is None:
            raise GenerationError(
                "an answer has no routed experts: the server must run with enable_return_routed_experts"
            )
        try:
            flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<i4")
        except (binascii.Error, ValueError) as error:
            raise GenerationError(f"the routed experts of an answer cannot be decoded ({error})") from error
        shape = (positions, len(self.layers), self.top_k)
        if flat.size != np.prod(shape):
            raise GenerationError(
                f"an answer has {flat.size} routed experts and {positions} positions × {len(self.layers)} layers × "
                f"{self.top_k} experts a token are {np.prod(shape)}: the server's model is not the trainer's"
            )
        experts_PLK = flat.reshape(shape)[:, np.asarray(self.layers)]
        ordered_PLK = np.sort(experts_PLK, axis=-1)
        if experts_PLK.size and (ordered_PLK.min() < 0 or ordered_PLK.max() >= self.num_experts):
            raise GenerationError(
                f"an answer names the experts {ordered_PLK.min()} to {ordered_PLK.max()} and the model has "
                f"{self.num_experts}"
            )
        if (ordered_PLK[..., 1:] == ordered_PLK[..., :-1]).any():
            raise GenerationError("an answer names an expert twice for one token and layer")
        return experts_PLK.astype(np.int16)
