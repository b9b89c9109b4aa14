"""The model families: how each reads `config.json`, and what it calls its tensors. No torch, no Megatron.

A family is one entry of `FAMILIES`; `drpo_megatron/weights/README.md` shows how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from drpo_megatron.models.hf_reader import ConfigReader
from drpo_megatron.models.hf_rope import MLA_ROPE_TYPES, ROPE_TYPES, RopeTypes
from drpo_megatron.models.hf_sections import MLAConfig, MoEConfig

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class TensorNames:
    """What the files call the parts of a layer. Embedding, final norm and output projection are alike in all families.

    Names are of modules, inside `model.layers.N`, and inside the attention, the MLP or an expert there. gate, up, down
    are of dense layers and shared experts; expert_gate, expert_up and expert_down of routed experts. The router's name
    and its bias' are inside the mixture of experts.
    """

    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    moe: str = "mlp"
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    router: str = "gate"
    router_bias: str = "gate.e_score_correction_bias"
    shared_experts: str = "shared_experts"


@dataclass(frozen=True)
class Family:
    """What is particular to the models of one `model_type`.

    defaults: what transformers takes for a key that the file omits, added to `hf_reader.DEFAULTS`; a key without one
    must be stated. fixed: the values that are supported, for keys that have others; they are added to `FIXED`. ignored:
    keys without effect on the computation of this family, with the reason; they are added to `hf_reader.IGNORED`. The
    other keys are those that `HFModelConfig.from_dict`, `moe` and `mla` read; what nobody reads is refused.

    activations: by the value of hidden_act; an absent one counts as the first. rope_theta: where the file has none.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, Activation] = field(default_factory=lambda: {"silu": "silu"})
    rope_types: RopeTypes = field(default_factory=lambda: ROPE_TYPES)
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    zero_centered_norms: bool = False
    scaled_embeddings: bool = False
    moe: Callable[[ConfigReader], MoEConfig] | None = None
    mla: Callable[[ConfigReader], MLAConfig] | None = None
    names: TensorNames = field(default_factory=TensorNames)


FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
}
"""Values that all families support. A key that is absent and has no default in its family counts as the first."""


def _qwen3_moe(reader: ConfigReader) -> MoEConfig:
    step, dense = reader.size("decoder_sparse_step"), set(reader.value("mlp_only_layers") or ())
    num_layers = reader.size("num_hidden_layers")
    if not dense <= set(range(num_layers)):
        raise reader.refuse("mlp_only_layers", sorted(dense), f"because the model has {num_layers} layers")
    return MoEConfig(
        num_experts=reader.size("num_experts", "num_local_experts"),
        top_k=reader.size("num_experts_per_tok"),
        ffn_hidden_size=reader.size("moe_intermediate_size"),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
        normalize=reader.flag("norm_topk_prob"),
    )


def _mixtral_moe(reader: ConfigReader) -> MoEConfig:
    return MoEConfig(
        num_experts=reader.size("num_local_experts", "num_experts"),
        top_k=reader.size("num_experts_per_tok"),
        ffn_hidden_size=reader.size("intermediate_size"),
        layers=(True,) * reader.size("num_hidden_layers"),
    )


def _deepseek_v3_moe(reader: ConfigReader) -> MoEConfig:
    for key, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("moe_layer_freq", 1)):
        reader.only(key, (value,))
    if not reader.flag("norm_topk_prob"):
        raise reader.refuse("norm_topk_prob", False, "because Megatron-Core normalizes the weights of sigmoid scores")
    dense = reader.integer("first_k_dense_replace")
    num_experts, top_k = reader.size("n_routed_experts", "num_local_experts"), reader.size("num_experts_per_tok")
    num_groups, topk_groups = reader.size("n_group"), reader.size("topk_group")
    if num_experts % num_groups:
        raise reader.refuse("n_group", num_groups, f"because {num_experts} experts do not divide over it")
    if not 1 <= topk_groups <= num_groups:
        raise reader.refuse("topk_group", topk_groups, f"because n_group is {num_groups}")
    grouped = topk_groups < num_groups
    if grouped and top_k // topk_groups != 2:
        # Megatron-Core ranks groups by their best top_k / topk_groups scores, transformers by their best two.
        raise reader.refuse(
            "topk_group", topk_groups, f"because num_experts_per_tok = {top_k} must be two experts a group"
        )
    width = reader.size("moe_intermediate_size")
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        ffn_hidden_size=width,
        layers=tuple(layer >= dense for layer in range(reader.size("num_hidden_layers"))),
        score_function="sigmoid",
        scaling_factor=reader.number("routed_scaling_factor"),
        expert_bias=True,
        num_groups=num_groups if grouped else None,
        topk_groups=topk_groups if grouped else None,
        shared_ffn_hidden_size=width * reader.integer("n_shared_experts"),
    )


def _deepseek_v3_mla(reader: ConfigReader) -> MLAConfig:
    reader.only("rope_interleave", (True, None))
    num_heads = reader.size("num_attention_heads")
    kv_heads = reader.optional_size("num_key_value_heads")
    if kv_heads not in (None, num_heads):
        raise reader.refuse("num_key_value_heads", kv_heads, f"because all {num_heads} heads have keys of their own")
    if reader.number("rms_norm_eps") != 1e-6:
        # transformers normalizes the latents with 1e-6 whatever the configuration says; Megatron-Core has one number.
        raise reader.refuse(
            "rms_norm_eps", reader.value("rms_norm_eps"), "because the latents are normalized with 1e-06"
        )
    mla = MLAConfig(
        q_lora_rank=reader.optional_size("q_lora_rank"),
        kv_lora_rank=reader.size("kv_lora_rank"),
        qk_nope_head_dim=reader.size("qk_nope_head_dim"),
        qk_rope_head_dim=reader.size("qk_rope_head_dim"),
        v_head_dim=reader.size("v_head_dim"),
    )
    # transformers writes both, and takes the rotary embedding's width from the first.
    reader.only("head_dim", (mla.qk_rope_head_dim,))
    reader.only("qk_head_dim", (mla.qk_head_dim,))
    return mla


_QWEN_WINDOW = {
    "sliding_window": "a window is in force where use_sliding_window or layer_types say so, and those are checked",
    "max_window_layers": "counts the layers without a window, which are all",
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={"num_key_value_heads": None, "head_dim": None, "eos_token_id": 2},
        ignored={"is_llama_config": "marks SmolLM2's files"},
    ),
    "qwen2": Family(
        defaults={"head_dim": None},
        ignored=_QWEN_WINDOW | {"attention_bias": "query, key and value always have biases, the output never"},
        qkv_bias=True,
    ),
    "qwen3": Family(defaults={"head_dim": 128}, ignored=_QWEN_WINDOW, qk_norm=True),
    "qwen3_moe": Family(
        defaults={"head_dim": None, "decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False},
        ignored=_QWEN_WINDOW,
        qk_norm=True,
        moe=_qwen3_moe,
    ),
    "deepseek_v3": Family(
        defaults={"eos_token_id": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 1},
        ignored={
            "ep_size": "a layout of the servers that published the model",
            "seq_aux": "belongs to a loss: the run's configuration says what is trained on",
            "aux_loss_alpha": "belongs to a loss: the run's configuration says what is trained on",
        },
        rope_types=MLA_ROPE_TYPES,
        moe=_deepseek_v3_moe,
        mla=_deepseek_v3_mla,
    ),
    "mistral": Family(defaults={"head_dim": None, "eos_token_id": 2, "sliding_window": 4096}),
    "mixtral": Family(
        defaults={"head_dim": None, "eos_token_id": 2},
        fixed={"router_jitter_noise": (0.0, None)},
        rope_theta=1e6,
        moe=_mixtral_moe,
        names=TensorNames(moe="block_sparse_moe", expert_gate="w1", expert_up="w3", expert_down="w2"),
    ),
    "gemma": Family(
        defaults={"head_dim": 256, "eos_token_id": 1, "tie_word_embeddings": True},
        fixed={"hidden_activation": (None, "gelu_pytorch_tanh"), "use_bidirectional_attention": (None, False)},
        # The first files say gelu, and mean the approximation by tanh.
        activations={"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"},
        zero_centered_norms=True,
        scaled_embeddings=True,
    ),
}
"""By `model_type`."""
