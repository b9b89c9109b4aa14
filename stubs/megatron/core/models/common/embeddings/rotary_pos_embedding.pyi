from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

class RotaryEmbedding(torch.nn.Module):
    inv_freq: torch.Tensor

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False) -> torch.Tensor: ...
    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: torch.nn.Module,
        transformer_input: torch.Tensor,
        transformer_config: TransformerConfig,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> int: ...
