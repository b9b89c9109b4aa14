"""Floating-point operations of training, from the architecture."""

from __future__ import annotations

from collections.abc import Sequence

from drpo_megatron.models.hf_config import HFModelConfig


def training_flops(hf: HFModelConfig, lengths: Sequence[int], projected_tokens: int) -> float:
    """FLOPs of one forward and backward over sequences of these lengths (recomputation not counted).

    Matrix products only: 2 FLOPs a multiply-add, and the backward is twice the forward. Causal attention does half of
    the L² products. `projected_tokens` positions reach the output projection: the sampled ones.
    """
    query, key_value = hf.num_heads * hf.head_dim, hf.num_kv_heads * hf.head_dim
    weights_a_layer = hf.hidden_size * (2 * query + 2 * key_value) + 3 * hf.hidden_size * hf.ffn_hidden_size
    linear = hf.num_layers * weights_a_layer * sum(lengths) + hf.hidden_size * hf.vocab_size * projected_tokens
    attention = hf.num_layers * query * sum(length * length for length in lengths)  # 2 products × L²/2
    return 3 * 2.0 * (linear + attention)
