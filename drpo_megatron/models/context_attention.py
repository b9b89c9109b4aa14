"""Causal attention over packed sequences that are split over context-parallel ranks.

Every sequence is cut into 2·CP equal chunks, and rank r holds chunks r and 2·CP − 1 − r, in this order: what attention
costs is then the same on every rank. Each rank gathers the keys and values of all ranks and attends with its own
queries.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch.distributed import ProcessGroup


def context_positions(bounds: list[int], rank: int, size: int) -> torch.Tensor:
    """Where rank `rank` of `size` has its tokens in the pack: int64 [T / size], in the order in which it holds them.

    bounds: cu_seqlens of the pack, from 0 to T. Raises ValueError for a sequence whose length is not a multiple of
    2·size.
    """
    pieces = []
    for start, end in itertools.pairwise(bounds):
        chunk, left = divmod(end - start, 2 * size)
        if left:
            raise ValueError(
                f"a sequence of {end - start} packed tokens does not divide into 2 · {size} chunks for "
                f"{size} context-parallel ranks: pad every sequence to a multiple of {2 * size}"
            )
        for index in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(pieces)


def context_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    *,
    group: ProcessGroup,
    softmax_scale: float | None,
) -> torch.Tensor:
    """Attention of this rank's queries over the whole sequences: [T/cp, n, d], [T/cp, g, d], [T/cp, g, e] →
    [T/cp, n·e].

    bounds: cu_seqlens of the pack, from 0 to T. n is a multiple of g. Collective over `group`, in the backward too: the
    gradients of keys and values are summed over the ranks whose queries saw them (reduce-scatter). The largest mask is
    that of one chunk's queries over its sequence. All T keys and values are kept for the backward, unless the core
    attention is recomputed. Raises ValueError when the bounds do not belong to the tokens.
    """
    rank, size = group.rank(), group.size()
    if bounds[-1] != size * query.size(0):
        raise ValueError(
            f"cu_seqlens ends at {bounds[-1]}, and {size} context-parallel ranks hold {query.size(0)} tokens each: "
            "cu_seqlens bounds the whole pack"
        )
    key_dim = key.size(-1)
    # One collective for both. Under the order of the ranks the pack is a permutation of itself.
    gathered = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
    order = torch.cat([context_positions(bounds, r, size) for r in range(size)]).argsort().to(query.device)
    keys, values = gathered.index_select(0, order).split([key_dim, value.size(-1)], dim=-1)
    pieces, taken = [], 0
    for start, end in itertools.pairwise(bounds):
        chunk = (end - start) // (2 * size)
        for index in (rank, 2 * size - 1 - rank) if chunk else ():
            seen = slice(start, start + (index + 1) * chunk)
            queries = query[taken : taken + chunk]
            pieces.append(_attend_to_the_end(queries, keys[seen], values[seen], softmax_scale))
            taken += chunk
    return torch.cat(pieces).flatten(1)


def _attend_to_the_end(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax_scale: float | None
) -> torch.Tensor:
    """Causal attention where the last query is at the last key: [L, n, d], [S, g, d], [S, g, e] → [L, n, e]."""
    mask_LS = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).tril(len(key) - len(query))
    context = F.scaled_dot_product_attention(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        attn_mask=mask_LS,
        scale=softmax_scale,
        enable_gqa=query.size(1) != key.size(1),
    )
    return context.transpose(0, 1)
