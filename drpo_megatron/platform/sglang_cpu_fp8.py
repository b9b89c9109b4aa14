"""FP8 in SGLang's server on a machine without CUDA, for `platform.sglang_cpu`.

Its own FP8 layers multiply by kernels that need AMX or a GPU. Here the same numbers come by rounding: the inputs of a
linear layer are quantized and dequantized in groups of 128 (`fp8.groups`), the product is in the model's dtype. Two
kinds of models get that:

* `quant_method: drpo_fp8_emulated` in config.json: weights in the model's dtype, already rounded by whoever sends them.
  Any sizes and dtypes.
* `quant_method: fp8` with 128 × 128 blocks: weights and scales in FP8, in SGLang's own parameters. The sizes that
  SGLang's FP8 layers take, bfloat16 or float16.

Which layers these are is SGLang's own choice, by its rule for `modules_to_not_convert` and by what its model code
gives the quantization to.
"""

from __future__ import annotations

from typing import Any

import torch

EMULATED = "drpo_fp8_emulated"
"""The name of the quantization method, also in config.json."""


def install() -> None:
    """Register the method with SGLang and let its FP8 linear layers compute. Imports SGLang."""
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization import QUANTIZATION_METHODS
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    from drpo_megatron.fp8.groups import round_groups

    class EmulatedFp8LinearMethod(UnquantizedLinearMethod):
        """SGLang's linear layer whose inputs are rounded."""

        emulates_fp8 = True

        def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            rounded: torch.Tensor = super().apply(layer, round_groups(x), bias)
            return rounded

    class EmulatedFp8Config(QuantizationConfig):
        """`modules_to_not_convert` of SGLang's FP8, with the same meaning."""

        def __init__(self, reference: Any) -> None:
            super().__init__()
            self.ignored_layers = reference.ignored_layers
            self.packed_modules_mapping = reference.packed_modules_mapping

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> EmulatedFp8Config:
            return cls(Fp8Config.from_config(config | {"quant_method": "fp8"}))

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.float32, torch.bfloat16, torch.float16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @classmethod
        def get_config_filenames(cls) -> list[str]:
            return []

        def get_name(self) -> str:
            return EMULATED

        def get_scaled_act_names(self) -> list[str]:
            return []

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            if isinstance(layer, FusedMoE):
                raise NotImplementedError("FP8 of a mixture of experts is not emulated on CPU")
            if not isinstance(layer, LinearBase):
                return None
            if is_layer_skipped(prefix, self.ignored_layers, fused_mapping=self.packed_modules_mapping):
                return UnquantizedLinearMethod()
            return EmulatedFp8LinearMethod()

    def keep(self: Any, layer: torch.nn.Module) -> None:
        """Weights stay as they were loaded: there is no kernel to lay them out for."""

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.block_quant or self.use_mxfp8:
            raise NotImplementedError("FP8 on CPU is emulated for weights in 128 × 128 blocks only")
        weight = block_quant_dequant(layer.weight, layer.weight_scale_inv, self.weight_block_size, x.dtype)
        return torch.nn.functional.linear(round_groups(x), weight, bias)

    QUANTIZATION_METHODS[EMULATED] = EmulatedFp8Config
    # Stand-ins, with the parameters of what they stand for.
    Fp8LinearMethod.process_weights_after_loading = keep  # type: ignore[method-assign]
    Fp8LinearMethod.apply = apply  # type: ignore[method-assign]
    # They load, and refuse to compute.
    Fp8MoEMethod.process_weights_after_loading = keep  # type: ignore[method-assign]
