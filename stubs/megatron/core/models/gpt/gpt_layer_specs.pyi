from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

def get_gpt_layer_local_submodules(
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    qk_layernorm: bool | None = False,
    multi_latent_attention: bool | None = False,
    fp8: str | None = None,
    normalization: str | None = None,
) -> TransformerLayerSubmodules: ...
def get_gpt_decoder_block_spec(
    config: TransformerConfig, use_transformer_engine: bool, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules: ...
