"""Attention over a pack with shared prefixes by FlexAttention of torch: one kernel, for GPUs.

Blocks of the [T, T] square in which no position sees another are skipped. Compiled on a GPU; elsewhere torch computes
the forward in plain operations, which is how its numbers are tested there, and has no backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from drpo_megatron.models.packs import PrefixPackedSeqParams
from drpo_megatron.models.shared_prefixes import SharedPrefixes


def flex_prefix_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: PrefixPackedSeqParams,
    softmax_scale: float | None,
) -> torch.Tensor:
    """As `prefix_attention.prefix_attention`: [T, n, d], [T, g, d], [T, g, e] → [T, n·e].

    Raises ValueError when the pack's segments do not hold T positions.
    """
    prefixes = pack.segments_of(query.size(0))
    mask = pack.plans.get(__name__) or pack.plans.setdefault(__name__, block_mask(prefixes, query.device))
    context_1nTe: torch.Tensor = _on(query.device, flex_attention)(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),
        block_mask=mask,
        scale=softmax_scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return context_1nTe[0].transpose(0, 1).flatten(1)


def block_mask(prefixes: SharedPrefixes, device: torch.device) -> BlockMask:
    """A position sees its own segment up to itself, and all of the segment it continues."""
    segment_T, prefix_T = (x.to(device) for x in prefixes.segment_ids())

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (segment_T[query] == segment_T[key]) & (query >= key)
        return own | (prefix_T[query] == segment_T[key])

    total = prefixes.bounds[-1]
    mask: BlockMask = _on(device, create_block_mask)(sees, None, None, total, total, device=device)
    return mask


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on a GPU: there the mask is never a [T, T] tensor, and attention is one kernel."""
    return _compiled(function) if device.type == "cuda" else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Packs differ in length from one update to the next.
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


@functools.cache
def with_shared_prefixes(core_attention: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Transformer Engine's core attention, which takes packs with shared prefixes too."""

    class FlexCoreAttention(core_attention):  # type: ignore[misc, valid-type]  # known when it runs
        def __init__(self, *args: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
            super().__init__(*args, softmax_scale=softmax_scale, **kwargs)
            self.flex_scale = softmax_scale

        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            pack = kwargs.get("packed_seq_params")
            if isinstance(pack, PrefixPackedSeqParams):
                return flex_prefix_attention(query, key, value, pack, self.flex_scale)
            return super().forward(query, key, value, *args, **kwargs)

    return FlexCoreAttention
