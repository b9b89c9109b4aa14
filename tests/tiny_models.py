"""Tiny random Hugging Face directories, one a family, made with transformers: the independent side of parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

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


def config(family: str) -> LlamaConfig | Qwen2Config | Qwen3Config:
    """llama: scaled rotary, untied. qwen2: biases, tied. qwen3: head norms, head_dim ≠ hidden / heads, untied."""
    if family == "llama":
        return LlamaConfig(**_COMMON, tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE, rms_norm_eps=1e-5)
    if family == "qwen2":
        return Qwen2Config(**_COMMON, tie_word_embeddings=True, rms_norm_eps=1e-6)
    if family == "qwen3":
        return Qwen3Config(**_COMMON, tie_word_embeddings=False, head_dim=24, rms_norm_eps=1e-6)
    raise ValueError(f"no tiny model of family {family}")


def write(
    family: str, out_dir: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, max_shard_size: str = "5GB"
) -> PreTrainedModel:
    """Write a random model and a character tokenizer to `out_dir`; return the model, on the CPU, for reference results.

    Norm weights and biases are random too: at their initial ones and zeros a wrong one would go unnoticed.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.to(dtype)
    write_char_tokenizer(out_dir)
    model.save_pretrained(out_dir, max_shard_size=max_shard_size)
    return model.eval()
