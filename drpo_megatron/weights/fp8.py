"""Block-scaled FP8 weights of Hugging Face files: e4m3 with a float32 scale for every 128 × 128 block.

The layout is DeepSeek-V3's: `NAME.weight` in float8_e4m3fn beside `NAME.weight_scale_inv`, and a weight is the product
of the two. Linear layers are quantized; embeddings, the output projection, norms, biases and routers stay in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from drpo_megatron.weights.map import VocabEmbedding, WeightRule

BLOCK = 128
FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max
SCALE_SUFFIX = "_scale_inv"


def is_quantized(parameter: str, rule: WeightRule, shape: tuple[int, ...]) -> bool:
    """Whether a parameter, by its Megatron-Core name, is stored in FP8."""
    return len(shape) == 2 and not isinstance(rule, VocabEmbedding) and ".router." not in parameter


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] → (e4m3 [out, in], float32 scales [⌈out / 128⌉, ⌈in / 128⌉]), rounded to nearest.

    A block's largest value becomes 448. A block of zeros has scale 1.
    """
    rows, columns = scale_shape(tuple(weight.shape))
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32, device=weight.device)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    # e4m3fn has no infinity: what rounding lifts over the largest value would become NaN.
    blocks.div_(scales[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    return padded[: weight.shape[0], : weight.shape[1]].to(FP8), scales


def dequantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 weight of a quantized one."""
    return weight.float() * _expanded(scales, weight)


def error_bound(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The largest error that rounding to nearest leaves in each value of a float32 weight.

    e4m3 has three bits of mantissa: half a step is 2⁻⁴ of the value, and 2⁻¹⁰ among subnormals, both in units of the
    scale. 2⁻²² of the value is for the float32 division and product.
    """
    return torch.maximum(weight.abs() * (2.0**-4 + 2.0**-22), _expanded(scales, weight) * 2.0**-10)


def _expanded(scales: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = scales.repeat_interleave(BLOCK, 0)[: weight.shape[0]]
    return rows.repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]


def quantization_config(kept: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. kept: tensors of the model that are not quantized."""
    modules = sorted({name.removesuffix(".weight") for name in kept if name.endswith(".weight")})
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": modules,
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
