"""Inputs of linear layers in FP8 rollouts: e4m3 with one scale for each 1 × 128 group, as SGLang rounds them."""

from __future__ import annotations

import torch

from drpo_megatron.weights.fp8 import BLOCK, FP8

_LARGEST = torch.finfo(FP8).max
_SMALLEST_MAXIMUM = 1e-10


def quantize_groups(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] → (e4m3 [..., K], float32 scales [..., ⌈K / 128⌉]), the last group shorter where 128 does not divide K.

    SGLang's `per_token_group_quant` (kernels/jit/csrc/gemm/per_token_group_quant.cuh): with m the group's largest
    absolute value, at least 1e-10, q = e4m3(x · (448 / m)), saturated, and the scale is m · (1 / 448), all in float32.
    The GPU may differ in the last bit of a quotient, which its compiler may approximate.
    """
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = groups.abs().amax(dim=-1).clamp_min(_SMALLEST_MAXIMUM)
    scaled = groups * (torch.full_like(largest, _LARGEST) / largest).unsqueeze(-1)
    quantized = scaled.clamp(-_LARGEST, _LARGEST).flatten(-2)[..., :width].to(FP8)
    return quantized, largest * torch.tensor(1 / _LARGEST, dtype=torch.float32)


def round_groups(x: torch.Tensor) -> torch.Tensor:
    """`x` [..., K] quantized and dequantized, in its own dtype."""
    quantized, scales = quantize_groups(x)
    return (quantized.float() * scales.repeat_interleave(BLOCK, dim=-1)[..., : x.shape[-1]]).to(x.dtype)
