"""The local core attention: `scaled_dot_product_attention` of torch, over a batch or over packed sequences."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule


class SDPACoreAttention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`, over a batch or over packed sequences, with grouped queries.

    Packed sequences are attended one by one: the work is Σ length², and no [T, T] mask exists. Raises ValueError under
    context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError(
                f"the local core attention does not split the context: set parallel.context to 1 (it is "
                f"{config.context_parallel_size}) or run on a GPU with Transformer Engine"
            )
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"the local core attention is causal only, the spec asks for {attn_mask_type}")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [s, b, n, d] with key and value [s, b, g, d] → [s, b, n·d]; packed: [T, n, d], [T, g, d] → [T, n·d]."""
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("the local core attention is causal: pass neither attention_mask nor attention_bias")
        if packed_seq_params is None:
            context = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return context.permute(2, 0, 1, 3).flatten(2)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        if bounds[-1] != query.size(0):
            raise ValueError(f"cu_seqlens ends at {bounds[-1]} and there are {query.size(0)} packed tokens")
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        pieces = [
            self._attend(*(x.transpose(0, 1) for x in segment)).transpose(0, 1)
            for segment in zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        ]
        return torch.cat(pieces).flatten(1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[..., heads, s, d] → the same shape as query."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.size(-3) != key.size(-3),
        )
