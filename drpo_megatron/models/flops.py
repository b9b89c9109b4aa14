"""Floating-point operations of training, from the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drpo_megatron.models.hf_config import HFModelConfig


@dataclass(frozen=True)
class SequenceCost:
    """Multiply-adds of one forward over a sequence, as a function of its length, without the output projection.

    Positions before it that it attends to, and that are not computed again, count with their products only.

    linear: weights that each token meets. quadratic: products for each pair of tokens, of which causal attention does
    half.
    """

    linear: float
    quadratic: float

    @classmethod
    def of(cls, hf: HFModelConfig) -> SequenceCost:
        value_dim = hf.mla.v_head_dim if hf.mla else hf.head_dim
        return cls(
            linear=sum(layer_weights(hf, layer) for layer in range(hf.num_layers)),
            # scores, and their sum of values
            quadratic=hf.num_layers * hf.num_heads * (hf.head_dim + value_dim),
        )

    def __call__(self, length: int, prefix_length: int = 0) -> float:
        return self.linear * length + self.quadratic * length * (prefix_length + length / 2)


def training_flops(
    hf: HFModelConfig, lengths: Sequence[int], projected_tokens: int, prefix_lengths: Sequence[int] | None = None
) -> float:
    """FLOPs of one forward and backward over sequences of these lengths (recomputation not counted).

    prefix_lengths: for each sequence, the positions before it that it attends to and that are not computed again.

    Matrix products only: 2 FLOPs a multiply-add, and the backward is twice the forward. Of the routed experts those
    that a token reaches count. Causal attention does half of the L² products. `projected_tokens` positions reach the
    output projection: the sampled ones.
    """
    cost = SequenceCost.of(hf)
    computed = sum(map(cost, lengths, prefix_lengths or [0] * len(lengths)))
    return 3 * 2.0 * (computed + hf.hidden_size * hf.vocab_size * projected_tokens)


def layer_weights(hf: HFModelConfig, layer: int) -> int:
    """Weights of a layer, counted from 0, that each token meets: its matrices, and of the experts those it takes."""
    return _attention_weights(hf) + _mlp_weights(hf, layer)


def routed_weights(hf: HFModelConfig, layer: int) -> int:
    """Of those, the routed experts'."""
    if hf.moe is None or not hf.is_moe_layer(layer):
        return 0
    return 3 * hf.hidden_size * hf.moe.top_k * hf.moe.ffn_hidden_size


def _attention_weights(hf: HFModelConfig) -> int:
    """Weights of a layer's attention that each token meets."""
    query = hf.num_heads * hf.head_dim
    if hf.mla is None:
        return hf.hidden_size * (2 * query + 2 * hf.num_kv_heads * hf.head_dim)
    mla = hf.mla
    rank = mla.q_lora_rank
    queries = hf.hidden_size * query if rank is None else rank * (hf.hidden_size + query)
    keys_and_values = hf.hidden_size * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank * hf.num_heads * (
        mla.qk_nope_head_dim + mla.v_head_dim
    )
    return queries + keys_and_values + hf.num_heads * mla.v_head_dim * hf.hidden_size


def _mlp_weights(hf: HFModelConfig, layer: int) -> int:
    """Weights of the layer's MLP, with its router, that each token meets."""
    if hf.moe is None or not hf.is_moe_layer(layer):
        return 3 * hf.hidden_size * hf.ffn_hidden_size
    moe = hf.moe
    width = moe.top_k * moe.ffn_hidden_size + moe.shared_ffn_hidden_size
    return hf.hidden_size * (3 * width + moe.num_experts)
