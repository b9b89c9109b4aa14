"""Tiny random Hugging Face directories, one a family, made with transformers: the independent side of parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from drpo_megatron.models.recipes import write_char_tokenizer

# Neither a multiple of 2 nor of the rows a rank is padded to.
VOCAB_SIZE = 515

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough for attention to be far from uniform: small weights would hide mistakes in it.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}


_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
}


_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 24, "rms_norm_eps": 1e-6}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "tie_word_embeddings": False,
            "head_dim": 24,
            "rms_norm_eps": 1e-6,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0, 2],
        },
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "rope_parameters": _YARN_ROPE,
            "q_lora_rank": 28,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 1,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "num_mtp_layers": 1,
        },
    ),
}


def config(family: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a family, with `changes` over its values.

    llama: scaled rotary, untied. qwen2: biases, tied. qwen3: head norms, head_dim ≠ hidden / heads, untied.

    qwen3_moe: layers 0 and 2 are dense, the others have 8 experts. deepseek_v3: layer 0 is dense, the others have 16
    experts in 4 groups and two shared ones; latents for query and key-value, yarn, value heads narrower than key heads.
    """
    if family not in _FAMILIES:
        raise ValueError(f"no tiny model of family {family}")
    kind, values = _FAMILIES[family]
    return kind(**_COMMON | values | changes)


def write(
    family: str,
    out_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> PreTrainedModel:
    """Write a random model and a character tokenizer to `out_dir`; return the model, on the CPU, for reference results.

    `changes` are values of the configuration.

    Norm weights, biases and routers are random too: at their initial ones and zeros a wrong one would go unnoticed.
    The router's bias stays in float32, as in the files of published models.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, **changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
        elif name.endswith(".gate.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    router_biases = {name: b for name, b in model.named_buffers() if name.endswith(".e_score_correction_bias")}
    for bias in router_biases.values():
        torch.nn.init.normal_(bias, std=0.1)
    router_biases = {name: bias.clone() for name, bias in router_biases.items()}
    model.to(dtype)
    for name, bias in router_biases.items():
        model.get_buffer(name).data = bias
    write_char_tokenizer(out_dir)
    model.save_pretrained(out_dir, max_shard_size=max_shard_size)
    return model.eval()
