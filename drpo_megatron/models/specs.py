"""Layer specs: which module stands at which place of a Megatron-Core transformer block.

`local` runs anywhere torch runs. `transformer_engine` takes Megatron-Core's Transformer Engine spec.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_submodules
from megatron.core.transformer import MLATransformerConfig, ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from drpo_megatron.models.attention import SDPACoreAttention
from drpo_megatron.models.flex_attention import with_shared_prefixes
from drpo_megatron.models.mla_attention import LocalMLASelfAttention, PlainQueryMLASelfAttention
from drpo_megatron.models.routing import use_rollout_router

SpecBackend = Literal["local", "transformer_engine"]


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 by torch.

    Megatron-Core's torch norm refuses sequence parallelism; here the weight is marked as a parameter whose gradient is
    partial on each rank, so that `finalize_model_grads` sums it over the tensor-parallel group. With zero-centred
    gamma it scales by 1 + weight, a sum that is float32 too.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(initial(hidden_size, dtype=config.params_dtype))
        # Megatron-Core marks parameters so.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.zero_centered:
            return F.rms_norm(x.float(), (x.size(-1),), 1 + self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


def block_spec(
    config: TransformerConfig, spec_backend: SpecBackend, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's (virtual stage's) layers, dense ones and mixtures of experts, whose routers are
    ours with both backends.

    `transformer_engine`: Megatron-Core's spec, with norms fused into the linear layers and the experts of a layer in
    one grouped matrix product; its core attention takes shared prefixes too.
    """
    if spec_backend == "transformer_engine":
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        for layer in block.layer_specs:
            use_rollout_router(layer.submodules)
            attention = layer.submodules.self_attention.submodules
            if config.multi_latent_attention and _query_latent(config) is None:
                layer.submodules.self_attention.module = PlainQueryMLASelfAttention
            attention.core_attention = with_shared_prefixes(attention.core_attention)
        return block
    dense, moe = _local_layer(config, None), _local_layer(config, config.num_moe_experts)
    is_moe = config.moe_layer_freq if isinstance(config.moe_layer_freq, list) else [0] * config.num_layers
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [moe if is_moe[layer] else dense for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _query_latent(config: TransformerConfig) -> int | None:
    """Of multi-latent attention: the width of the queries' latent; None where they have none."""
    return cast(MLATransformerConfig, config).q_lora_rank


def _local_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_local_submodules(
        num_experts=num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    use_rollout_router(layer)
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.multi_latent_attention:
        layer.self_attention.module = LocalMLASelfAttention
        attention.kv_layernorm = RMSNorm
        attention.q_layernorm = IdentityOp if _query_latent(config) is None else RMSNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return ModuleSpec(module=TransformerLayer, submodules=layer)
