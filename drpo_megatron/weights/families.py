"""The weight map: one table a model family, from Megatron-Core parameter names to rules about Hugging Face tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.weights.map import (
    FusedQKV,
    GatedMLP,
    Replicated,
    RowSharded,
    VocabEmbedding,
    WeightRule,
)

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class WeightTable:
    """Rules by Megatron-Core name. `edges` by full name; `layer(number)` by the name inside layer `number`, from 0.

    Both the plain norm names and the ones that Transformer Engine fuses into the next linear layer are listed: a built
    model has one of each pair.
    """

    edges: dict[str, WeightRule]
    layer: Callable[[int], dict[str, WeightRule]]
    num_layers: int

    def rule(self, name: str) -> WeightRule:
        """The rule of a parameter whose layer number counts over the whole model. Raises KeyError naming it."""
        match = _LAYER_NAME.fullmatch(name)
        rules = self.layer(int(match[1])) if match else self.edges
        key = match[2] if match else name
        if key not in rules:
            raise KeyError(f"no rule in the weight map for the Megatron-Core parameter {name}")
        return rules[key]

    def hf_names(self) -> set[str]:
        """Every Hugging Face tensor of the model."""
        rules = [*self.edges.values()]
        for number in range(self.num_layers):
            rules += self.layer(number).values()
        return {name for rule in rules for name in rule.hf_names}


def _dense_decoder(hf: HFModelConfig, padded_vocab: int) -> WeightTable:
    """Llama's names, shared by Qwen2 (biases on query, key and value) and Qwen3 (norms on query and key)."""

    def vocabulary(name: str, exported: bool = True) -> WeightRule:
        return VocabEmbedding(name, hf.vocab_size, padded_vocab, exported)

    edges: dict[str, WeightRule] = {
        "embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": Replicated("model.norm.weight"),
        # Tied: a last stage that is not the first holds a copy of the embedding under this name.
        "output_layer.weight": vocabulary("model.embed_tokens.weight", exported=False)
        if hf.tied_embeddings
        else vocabulary("lm_head.weight"),
    }

    def layer(number: int) -> dict[str, WeightRule]:
        prefix = f"model.layers.{number}"

        def qkv(kind: str) -> WeightRule:
            q, k, v = (f"{prefix}.self_attn.{letter}_proj.{kind}" for letter in "qkv")
            return FusedQKV(q, k, v, hf.num_heads, hf.num_kv_heads, hf.head_dim)

        attention_norm = Replicated(f"{prefix}.input_layernorm.weight")
        mlp_norm = Replicated(f"{prefix}.post_attention_layernorm.weight")
        rules: dict[str, WeightRule] = {
            "input_layernorm.weight": attention_norm,
            "self_attention.linear_qkv.layer_norm_weight": attention_norm,
            "self_attention.linear_qkv.weight": qkv("weight"),
            "self_attention.linear_proj.weight": RowSharded(f"{prefix}.self_attn.o_proj.weight"),
            "pre_mlp_layernorm.weight": mlp_norm,
            "mlp.linear_fc1.layer_norm_weight": mlp_norm,
            "mlp.linear_fc1.weight": GatedMLP(f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight"),
            "mlp.linear_fc2.weight": RowSharded(f"{prefix}.mlp.down_proj.weight"),
        }
        if hf.qkv_bias:
            rules["self_attention.linear_qkv.bias"] = qkv("bias")
        if hf.qk_norm:
            rules["self_attention.q_layernorm.weight"] = Replicated(f"{prefix}.self_attn.q_norm.weight")
            rules["self_attention.k_layernorm.weight"] = Replicated(f"{prefix}.self_attn.k_norm.weight")
        return rules

    return WeightTable(edges, layer, hf.num_layers)


FAMILIES: dict[str, Callable[[HFModelConfig, int], WeightTable]] = {
    "llama": _dense_decoder,
    "qwen2": _dense_decoder,
    "qwen3": _dense_decoder,
}


def weight_table(hf: HFModelConfig, padded_vocab: int) -> WeightTable:
    """The table of `hf.model_type`. `padded_vocab`: rows of the embedding over all tensor-parallel ranks."""
    return FAMILIES[hf.model_type](hf, padded_vocab)


def global_name(name: str, first_layer: int) -> str:
    """A chunk's parameter name with the layer counted over the whole model. `first_layer` counts from 0."""
    match = _LAYER_NAME.fullmatch(name)
    return f"decoder.layers.{int(match[1]) + first_layer}.{match[2]}" if match else name
