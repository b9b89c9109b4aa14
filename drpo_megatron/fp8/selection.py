"""Which layers and parameters are in FP8 where FP8 is on: the one answer for training, rollouts and the audit.

`weights.fp8.is_quantized` says which kinds of parameters are, by name; the settings leave out whole layers of the
model at its start and its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from drpo_megatron.config.schema import Fp8Config
from drpo_megatron.weights import fp8
from drpo_megatron.weights.families import WeightTable, layer_of
from drpo_megatron.weights.map import WeightRule


@dataclass(frozen=True)
class Selection:
    """`layers`, counted from 0 over the whole model, have their linear layers quantized."""

    layers: range

    @classmethod
    def of(cls, config: Fp8Config, num_layers: int) -> Self:
        return cls(config.quantized_layers(num_layers))

    def parameter(self, name: str, rule: WeightRule, shape: tuple[int, ...]) -> bool:
        """Whether a parameter is, by its Megatron-Core name, its layer counted over the whole model."""
        number = layer_of(name)
        return number is not None and number in self.layers and fp8.is_quantized(name, rule, shape)

    def hf_weights(self, table: WeightTable, shape: Callable[[str], tuple[int, ...]]) -> dict[str, bool]:
        """Every exported Hugging Face tensor of a model, and whether it is quantized. shape: of a tensor by name."""
        weights: dict[str, bool] = {}
        for name, rule in table.parameters():
            if rule.exported:
                weights |= {hf_name: self.parameter(name, rule, shape(hf_name)) for hf_name in rule.hf_names}
        return weights
