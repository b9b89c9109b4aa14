"""The local core attention: `scaled_dot_product_attention` of torch, over a batch or over packed sequences."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from drpo_megatron.models.context_attention import context_attention
from drpo_megatron.models.packs import PrefixPackedSeqParams
from drpo_megatron.models.prefix_attention import prefix_attention


class SDPACoreAttention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`, over a batch or over packed sequences, with grouped queries.

    Packed sequences are attended one by one, neighbours of equal length together: the work is Σ length², and no [T, T]
    mask exists. Context parallelism splits packed sequences only (`context_attention`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(f"the local core attention is causal only, the spec asks for {attn_mask_type}")
        self.softmax_scale = softmax_scale
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None

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
        """query [s, b, n, d] with key and value [s, b, g, d] → [s, b, n·d]; packed: [T, n, d], [T, g, d] → [T, n·d].

        Under context parallelism the packed tensors are this rank's T/cp tokens, cu_seqlens the whole pack's.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("the local core attention is causal: pass neither attention_mask nor attention_bias")
        if packed_seq_params is None:
            if self.context_group is not None:
                raise ValueError("the local core attention splits packed sequences only: pass packed_seq_params")
            context = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return context.permute(2, 0, 1, 3).flatten(2)
        if isinstance(packed_seq_params, PrefixPackedSeqParams):
            return prefix_attention(query, key, value, packed_seq_params, self.softmax_scale)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        if self.context_group is not None:
            return context_attention(
                query, key, value, bounds, group=self.context_group, softmax_scale=self.softmax_scale
            )
        if bounds[-1] != query.size(0):
            raise ValueError(f"cu_seqlens ends at {bounds[-1]} and there are {query.size(0)} packed tokens")
        lengths = (end - start for start, end in itertools.pairwise(bounds))
        runs = [(len(list(equal)), length) for length, equal in itertools.groupby(lengths)]
        tokens = [count * length for count, length in runs]
        pieces = [
            self._attend(*(x.unflatten(0, run).transpose(1, 2) for x in parts)).transpose(1, 2).flatten(0, 1)
            for run, *parts in zip(runs, *(x.split(tokens) for x in (query, key, value)), strict=True)
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
