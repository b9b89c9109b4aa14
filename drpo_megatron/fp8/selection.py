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
    """`first` and `last` layers of a model of `num_layers` stay in its dtype."""

    num_layers: int
    first: int = 0
    last: int = 0

    @classmethod
    def of(cls, config: Fp8Config, num_layers: int) -> Self:
        return cls(num_layers, config.unquantized_first_layers, config.unquantized_last_layers)

    def layer(self, number: int) -> bool:
        """Whether the linear layers of layer `number`, from 0 over the whole model, are quantized."""
        return self.first <= number < self.num_layers - self.last

    def parameter(self, name: str, rule: WeightRule, shape: tuple[int, ...]) -> bool:
        """Whether a parameter is, by its Megatron-Core name, its layer counted over the whole model."""
        number = layer_of(name)
        return number is not None and self.layer(number) and fp8.is_quantized(name, rule, shape)

    def hf_weights(self, table: WeightTable, shape: Callable[[str], tuple[int, ...]]) -> dict[str, bool]:
        """Every exported Hugging Face tensor of a model, and whether it is quantized. shape: of a tensor by name."""
        weights: dict[str, bool] = {}
        for name, rule in table.parameters():
            if rule.exported:
                weights |= {hf_name: self.parameter(name, rule, shape(hf_name)) for hf_name in rule.hf_names}
        return weights
