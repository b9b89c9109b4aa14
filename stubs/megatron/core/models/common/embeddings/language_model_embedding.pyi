import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule

class LanguageModelEmbedding(MegatronModule):
    word_embeddings: VocabParallelEmbedding

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, tokentype_ids: torch.Tensor | None = None
    ) -> torch.Tensor: ...
