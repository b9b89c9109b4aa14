from typing import Literal

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

class GPTModel(MegatronModule):
    pre_process: bool
    post_process: bool
    share_embeddings_and_output_weights: bool
    vp_stage: int | None
    # Where there is a first stage, a last one, and rotary embeddings of the model's own.
    embedding: LanguageModelEmbedding
    output_layer: ColumnParallelLinear
    rotary_pos_emb: RotaryEmbedding
    decoder: TransformerBlock

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: ModuleSpec | TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        *,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: Literal["learned_absolute", "rope", "mrope", "yarn", "none"] = "learned_absolute",
        rotary_base: float = 10000,
        vp_stage: int | None = None,
    ) -> None: ...
    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor: ...
    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter: ...
