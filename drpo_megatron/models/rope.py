"""Inverse frequencies of the rotary embedding, from the Hugging Face configuration."""

from __future__ import annotations

import math

import torch

from drpo_megatron.models.hf_config import HFModelConfig


def inverse_frequencies(hf: HFModelConfig) -> torch.Tensor:
    """float32 [head_dim / 2], equal to transformers' for rope types default, linear and llama3.

    Megatron-Core's own scaling fixes llama3's low and high frequency factors and its original context at 1, 4 and
    8192, whatever the configuration says; computing them here takes all of them from the configuration.
    """
    rope = hf.rope
    exponents = torch.arange(0, hf.head_dim, 2, dtype=torch.float32) / hf.head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "default":
        return frequencies
    if rope.type == "linear":
        return frequencies / rope.factor
    # llama3: wavelengths beyond the original context are stretched by `factor`, short ones are kept, and a linear ramp
    # in the number of turns within the original context joins the two.
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor
