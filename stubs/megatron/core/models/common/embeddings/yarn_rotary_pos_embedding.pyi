import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

class YarnRotaryEmbedding(RotaryEmbedding):
    # Its annotation names the table alone; the concentration factor comes with it.
    def forward(  # type: ignore[override]
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False
    ) -> tuple[torch.Tensor, float]: ...
