"""Layer specs: which module stands at which place of a Megatron-Core transformer block.

`local` runs anywhere torch runs. `transformer_engine` takes Megatron-Core's Transformer Engine spec.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_submodules,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer

from drpo_megatron.models.attention import SDPACoreAttention

SpecBackend = Literal["local", "transformer_engine"]


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 by torch.

    Megatron-Core's torch norm refuses sequence parallelism; here the weight is marked as a parameter whose gradient is
    partial on each rank, so that `finalize_model_grads` sums it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


def block_spec(
    config: TransformerConfig, spec_backend: SpecBackend, *, qk_norm: bool, vp_stage: int | None
) -> TransformerBlockSubmodules | ModuleSpec:
    """The spec of this pipeline stage's (virtual stage's) block of layers.

    `transformer_engine`: Megatron-Core's spec as it is, with norms fused into the linear layers. Not run: no GPU.
    """
    if spec_backend == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    layer = get_gpt_layer_local_submodules(qk_layernorm=qk_norm, normalization="RMSNorm")
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm
    )
