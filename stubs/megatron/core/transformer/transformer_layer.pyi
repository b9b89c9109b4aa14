from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

@dataclass(kw_only=True)
class TransformerLayerSubmodules:
    """What builds each part: a ModuleSpec, a class or another callable."""

    input_layernorm: Any = ...
    self_attention: Any = ...
    pre_mlp_layernorm: Any = ...
    mlp: Any = ...

class TransformerLayer(MegatronModule):
    layer_number: int

def get_transformer_layer_offset(config: TransformerConfig, vp_stage: int | None = None) -> int: ...
