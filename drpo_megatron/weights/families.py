"""The weight map: from Megatron-Core parameter names to rules about Hugging Face tensors, made from a family's names.

`models.families` says what a family calls its tensors.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from drpo_megatron.models.families import FAMILIES, TensorNames
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.weights.map import (
    ColumnSharded,
    FusedQKV,
    GatedMLP,
    Replicated,
    RowSharded,
    VocabEmbedding,
    WeightRule,
)

_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_HF_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\..+")
# The experts of a rank one by one, or the weights of one grouped matrix product.
_EXPERT_NAME = re.compile(r"(.*mlp\.experts\.(?:local_experts\.(?=\d+\.)|linear_fc[12]\.weight(?=\d+$)))(\d+)(.*)")


@dataclass(frozen=True)
class WeightTable:
    """Rules by Megatron-Core name. `edges` by full name; `layer(number)` by the name inside layer `number`, from 0.

    Where layer specs name a parameter differently, all names are listed, and a built model has one of them: norms are
    modules of their own or fused into the next linear layer, experts are modules or weights of a grouped product.
    """

    edges: dict[str, WeightRule]
    layer: Callable[[int], dict[str, WeightRule]]
    num_layers: int
    num_mtp_layers: int = 0

    def rule(self, name: str) -> WeightRule:
        """The rule of a parameter whose layer and expert count over the whole model. Raises KeyError naming it."""
        match = _LAYER_NAME.fullmatch(name)
        rules = self.layer(int(match[1])) if match else self.edges
        key = match[2] if match else name
        if key not in rules:
            raise KeyError(f"no rule in the weight map for the Megatron-Core parameter {name}")
        return rules[key]

    def parameters(self) -> Iterator[tuple[str, WeightRule]]:
        """(name, rule) of the whole model, a parameter under each of its names."""
        yield from self.edges.items()
        for number in range(self.num_layers):
            yield from ((f"decoder.layers.{number}.{name}", rule) for name, rule in self.layer(number).items())

    def hf_names(self) -> set[str]:
        """Every Hugging Face tensor of the model."""
        return {name for _, rule in self.parameters() for name in rule.hf_names}

    def is_mtp(self, hf_name: str) -> bool:
        """Whether the tensor belongs to a multi-token-prediction layer: files hold those, and the policy has none."""
        match = _HF_LAYER_NAME.fullmatch(hf_name)
        return match is not None and 0 <= int(match[1]) - self.num_layers < self.num_mtp_layers


def weight_table(hf: HFModelConfig, padded_vocab: int) -> WeightTable:
    """The table of `hf`. `padded_vocab`: rows of the embedding over all tensor-parallel ranks."""
    names = FAMILIES[hf.model_type].names

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

    # A layer of several hundred experts is asked for once for each of them.
    @functools.cache
    def layer(number: int) -> dict[str, WeightRule]:
        prefix = f"model.layers.{number}"
        attention = f"{prefix}.{names.attention}"
        attention_norm = Replicated(f"{prefix}.{names.attention_norm}.weight")
        mlp_norm = Replicated(f"{prefix}.{names.mlp_norm}.weight")
        rules: dict[str, WeightRule] = {
            "input_layernorm.weight": attention_norm,
            "pre_mlp_layernorm.weight": mlp_norm,
            "self_attention.linear_proj.weight": RowSharded(f"{attention}.o_proj.weight"),
        }
        if hf.mla is None:
            rules["self_attention.linear_qkv.layer_norm_weight"] = attention_norm
            rules |= _grouped_query_attention(hf, attention)
        else:
            rules |= _multi_latent_attention(hf, attention)
        if hf.is_moe_layer(number):
            rules |= _mixture_of_experts(hf, names, f"{prefix}.{names.moe}")
        else:
            rules["mlp.linear_fc1.layer_norm_weight"] = mlp_norm
            rules |= _gated_mlp("mlp", f"{prefix}.{names.mlp}", names.gate, names.up, names.down)
        return rules

    return WeightTable(edges, layer, hf.num_layers, hf.num_mtp_layers)


def _grouped_query_attention(hf: HFModelConfig, prefix: str) -> dict[str, WeightRule]:
    """Biases on query, key and value are Qwen2's, norms on query and key heads Qwen3's."""

    def qkv(kind: str) -> WeightRule:
        q, k, v = (f"{prefix}.{letter}_proj.{kind}" for letter in "qkv")
        return FusedQKV(q, k, v, hf.num_heads, hf.num_kv_heads, hf.head_dim)

    rules = {"self_attention.linear_qkv.weight": qkv("weight")}
    if hf.qkv_bias:
        rules["self_attention.linear_qkv.bias"] = qkv("bias")
    if hf.qk_norm:
        rules["self_attention.q_layernorm.weight"] = Replicated(f"{prefix}.q_norm.weight")
        rules["self_attention.k_layernorm.weight"] = Replicated(f"{prefix}.k_norm.weight")
    return rules


def _multi_latent_attention(hf: HFModelConfig, prefix: str) -> dict[str, WeightRule]:
    """Heads are split over the ranks where latents are projected up; Megatron-Core orders rows as the files do."""
    kv_norm = Replicated(f"{prefix}.kv_a_layernorm.weight")
    rules: dict[str, WeightRule] = {
        "self_attention.linear_kv_down_proj.weight": Replicated(f"{prefix}.kv_a_proj_with_mqa.weight"),
        "self_attention.kv_layernorm.weight": kv_norm,
        "self_attention.linear_kv_up_proj.layer_norm_weight": kv_norm,
        "self_attention.linear_kv_up_proj.weight": ColumnSharded(f"{prefix}.kv_b_proj.weight"),
    }
    assert hf.mla is not None
    if hf.mla.q_lora_rank is None:
        rules["self_attention.linear_q_proj.weight"] = ColumnSharded(f"{prefix}.q_proj.weight")
        return rules
    q_norm = Replicated(f"{prefix}.q_a_layernorm.weight")
    return rules | {
        "self_attention.linear_q_down_proj.weight": Replicated(f"{prefix}.q_a_proj.weight"),
        "self_attention.q_layernorm.weight": q_norm,
        "self_attention.linear_q_up_proj.layer_norm_weight": q_norm,
        "self_attention.linear_q_up_proj.weight": ColumnSharded(f"{prefix}.q_b_proj.weight"),
    }


def _mixture_of_experts(hf: HFModelConfig, names: TensorNames, prefix: str) -> dict[str, WeightRule]:
    assert hf.moe is not None
    rules: dict[str, WeightRule] = {"mlp.router.weight": Replicated(f"{prefix}.{names.router}.weight")}
    if hf.moe.expert_bias:
        # float32 in the files of a bf16 model: the choice of experts hangs on its small differences.
        rules["mlp.router.expert_bias"] = Replicated(f"{prefix}.{names.router_bias}", keep_dtype=True)
    if hf.moe.shared_ffn_hidden_size:
        shared = f"{prefix}.{names.shared_experts}"
        rules |= _gated_mlp("mlp.shared_experts", shared, names.gate, names.up, names.down)
    parts = (names.expert_gate, names.expert_up, names.expert_down)
    for expert in range(hf.moe.num_experts):
        one = _gated_mlp(f"mlp.experts.local_experts.{expert}", f"{prefix}.experts.{expert}", *parts)
        fc1, fc2 = one.values()
        rules |= one | {
            f"mlp.experts.linear_fc1.weight{expert}": fc1,
            f"mlp.experts.linear_fc2.weight{expert}": fc2,
        }
    return rules


def _gated_mlp(name: str, prefix: str, gate: str, up: str, down: str) -> dict[str, WeightRule]:
    return {
        f"{name}.linear_fc1.weight": GatedMLP(f"{prefix}.{gate}.weight", f"{prefix}.{up}.weight"),
        f"{name}.linear_fc2.weight": RowSharded(f"{prefix}.{down}.weight"),
    }


def global_name(name: str, first_layer: int, first_expert: int = 0) -> str:
    """A chunk's parameter name with layer and expert counted over the whole model. The firsts count from 0."""
    if expert := _EXPERT_NAME.fullmatch(name):
        name = f"{expert[1]}{int(expert[2]) + first_expert}{expert[3]}"
    match = _LAYER_NAME.fullmatch(name)
    return f"decoder.layers.{int(match[1]) + first_layer}.{match[2]}" if match else name


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter belongs to; None for one outside the layers."""
    match = _LAYER_NAME.fullmatch(name)
    return int(match[1]) if match else None


def expert_of(name: str) -> int | None:
    """The number of the expert that a parameter belongs to; None for a parameter outside the routed experts."""
    match = _EXPERT_NAME.fullmatch(name)
    return int(match[2]) if match else None
