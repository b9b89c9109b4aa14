from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, type_check_only

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

@dataclass(kw_only=True)
class TransformerBlockSubmodules:
    layer_specs: list[ModuleSpec] = ...
    layer_norm: Any = None
    """Any callable that builds a norm."""

@type_check_only
class _Layers(torch.nn.ModuleList):
    """torch's list says of its modules no more than that they are modules."""

    def __iter__(self) -> Iterator[TransformerLayer]: ...
    def __getitem__(self, idx: int) -> TransformerLayer: ...  # type: ignore[override]  # slices are not asked for

class TransformerBlock(MegatronModule):
    pre_process: bool
    input_tensor: torch.Tensor | None
    layers: _Layers

def get_num_layers_to_build(config: TransformerConfig, vp_stage: int | None = None) -> int: ...
