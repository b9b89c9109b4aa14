from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

@dataclass(kw_only=True)
class TransformerConfig:
    num_layers: int = 0
    hidden_size: int = 0
    ffn_hidden_size: int | None = None
    num_attention_heads: int = 0
    num_query_groups: int | None = None
    kv_channels: int | None = None
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    normalization: str = "LayerNorm"
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    add_bias_linear: bool = True
    gated_linear_unit: bool = False
    activation_func: Callable[[torch.Tensor], torch.Tensor] = ...
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    multi_latent_attention: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    transformer_impl: str = "transformer_engine"
    deterministic_mode: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    # Where it is not given, a list is made of it.
    recompute_modules: list[str] = ...
    calculate_per_token_loss: bool = False
    bias_activation_fusion: bool = False
    bias_dropout_fusion: bool = False
    apply_rope_fusion: bool = False
    masked_softmax_fusion: bool = False
    persist_layer_norm: bool = False
    num_moe_experts: int | None = None
    moe_layer_freq: int | list[int] = 1
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_router_topk: int = 2
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_bias_update_rate: float = 1e-3
    moe_router_load_balancing_type: str | list[str] = "aux_loss"
    moe_aux_loss_coeff: float | list[float] = 0.0
    moe_z_loss_coeff: float | None = None
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "allgather"
    moe_grouped_gemm: bool = False
    moe_permute_fusion: bool = False
    fp8: str | None = None
    fp8_recipe: str | None = "delayed"
    fp8_param: bool = False
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1
    fp8_amax_compute_algo: str = "most_recent"
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1
    # These are of its base, ModelParallelConfig.
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    perform_initialization: bool = True
    params_dtype: torch.dtype = ...
    pipeline_dtype: torch.dtype | None = None
    bf16: bool = False
    gradient_accumulation_fusion: bool = False
    overlap_p2p_comm: bool = False
    batch_p2p_comm: bool = True
    variable_seq_lengths: bool = False
    finalize_model_grads_func: Callable[..., None] | None = None
    grad_scale_func: Callable[[torch.Tensor], torch.Tensor] | None = None
    # With several chunks it is one for each of them.
    no_sync_func: (
        Callable[[], AbstractContextManager[None]] | list[Callable[[], AbstractContextManager[None]]] | None
    ) = None

@dataclass(kw_only=True)
class MLATransformerConfig(TransformerConfig):
    q_lora_rank: int | None = 512
    kv_lora_rank: int = 512
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128
    rope_type: str = "yarn"
    rotary_base: float = 10000
    rotary_scaling_factor: float = 40
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
