"""Multi-latent attention as Megatron-Core's configuration has it, from that of a Hugging Face model."""

from __future__ import annotations

from typing import Any

from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.models.hf_sections import MLAConfig, RopeConfig


def has_rope_kernel(mla: MLAConfig, rope: RopeConfig) -> bool:
    """Whether Megatron-Core has a kernel for this latent attention: with yarn, and powers of two (a Triton kernel)."""
    sizes = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim)
    return rope.type == "yarn" and all(size & (size - 1) == 0 for size in sizes)


def mla_arguments(hf: HFModelConfig) -> dict[str, Any]:
    """The fields of Megatron-Core's MLATransformerConfig; none for a model without latents."""
    mla, rope = hf.mla, hf.rope
    if mla is None:
        return {}
    return {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "yarn" if rope.type == "yarn" else "rope",
        "rotary_base": rope.theta,
        "rotary_scaling_factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings or hf.max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
