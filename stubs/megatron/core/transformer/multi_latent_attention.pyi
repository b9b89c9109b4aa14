from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import MLATransformerConfig

class MLASelfAttention(MegatronModule):
    config: MLATransformerConfig
    linear_kv_up_proj: ColumnParallelLinear
    # Of a class that the spec names.
    linear_q_down_proj: Any
    linear_kv_down_proj: Any

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType = ...,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None: ...
    def _resolve_qk_norm_config(self, submodules: Any) -> Any: ...
