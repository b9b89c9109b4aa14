"""What the settings of FP8 training mean for Megatron-Core and Transformer Engine."""

from __future__ import annotations

import os
from typing import Any, Literal

from drpo_megatron import platform
from drpo_megatron.config.schema import Fp8Config


def is_emulated(fp8: Fp8Config) -> bool:
    return fp8.recipe is not None and fp8.backend == "emulate"


def uses_transformer_engine(fp8: Fp8Config) -> bool:
    return fp8.recipe is not None and fp8.backend == "transformer_engine"


def layer_backend(fp8: Fp8Config) -> Literal["transformer_engine", "local"]:
    """The layer specs of the policy: the emulation needs the local ones, on a GPU too."""
    return "local" if is_emulated(fp8) else platform.spec_backend()


def transformer_engine_arguments(fp8: Fp8Config) -> dict[str, Any]:
    """The fields of Megatron-Core's TransformerConfig, which makes Transformer Engine's recipe of them. None of them is
    set for the emulation: Megatron-Core would look for Transformer Engine.
    """
    if not uses_transformer_engine(fp8):
        return {}
    return {
        "fp8": fp8.number_format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax_algorithm,
        "fp8_param": fp8.parameters,
        "first_last_layers_bf16": bool(fp8.unquantized_first_layers or fp8.unquantized_last_layers),
        "num_layers_at_start_in_bf16": fp8.unquantized_first_layers,
        "num_layers_at_end_in_bf16": fp8.unquantized_last_layers,
    }


def choose_block_scales(fp8: Fp8Config) -> None:
    """Tell Transformer Engine, which reads it from the environment when it is imported: call this before."""
    if uses_transformer_engine(fp8) and fp8.recipe == "blockwise":
        os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = str(int(fp8.block_scales == "float32"))


def token_multiple(fp8: Fp8Config) -> int:
    """What the number of tokens in a product must be a multiple of: 16 values of 8 bits for the tensor cores, whole
    blocks of 32 for mxfp8 (Megatron-Core's `get_fp8_align_size`). The emulation takes any number.
    """
    if not uses_transformer_engine(fp8):
        return 1
    return 32 if fp8.recipe == "mxfp8" else 16
