"""Attention over a pack with shared prefixes, by `scaled_dot_product_attention` of torch.

A prefix attends causally to itself. The segments that continue it attend to its keys and to their own, a batch of them
at a time: the work is Σ L·(P + L), and no [T, T] mask exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from drpo_megatron.models.packs import PrefixPackedSeqParams
from drpo_megatron.models.shared_prefixes import SharedPrefixes

# Segments in a batch are padded to the longest of them. Below this length a call costs more than its padding.
_SHORT = 32


@dataclass(frozen=True)
class _Batch:
    """Segments of one prefix that are attended in one call. segments: their indices, the longest first."""

    prefix: int
    segments: tuple[int, ...]
    length: int


def _batches(prefixes: SharedPrefixes) -> list[_Batch]:
    """Each segment once; a prefix before the segments that continue it.

    Segments longer than `_SHORT` share a batch with others of more than three quarters of the longest's length, so
    that padding costs less than half as much again, even where it is quadratic in the length.
    """
    lengths = prefixes.lengths
    batches = [_Batch(-1, (s,), lengths[s]) for s, prefix in enumerate(prefixes.prefix_of) if prefix < 0 and lengths[s]]
    members: dict[int, list[int]] = {}
    for segment, prefix in enumerate(prefixes.prefix_of):
        if prefix >= 0 and lengths[segment]:
            members.setdefault(prefix, []).append(segment)
    for prefix, segments in members.items():
        rest = sorted(segments, key=lambda s: -lengths[s])
        while rest:
            longest = lengths[rest[0]]
            together = [s for s in rest if longest <= _SHORT or 4 * lengths[s] > 3 * longest]
            batches.append(_Batch(prefix, tuple(together), longest))
            rest = rest[len(together) :]
    return batches


@dataclass(frozen=True)
class _Plan:
    """rows_R: packed position of each batch's rows, one batch behind the other (padding repeats a segment's first
    position); outputs_T: the row that holds a packed position's output. Both None where rows are the pack itself.
    """

    batches: list[_Batch]
    rows_R: torch.Tensor | None
    outputs_T: torch.Tensor | None

    @classmethod
    def of(cls, prefixes: SharedPrefixes, device: torch.device) -> _Plan:
        batches = _batches(prefixes)
        rows: list[int] = []
        outputs = [0] * prefixes.bounds[-1]
        for batch in batches:
            for segment in batch.segments:
                start, end = prefixes.bounds[segment : segment + 2]
                outputs[start:end] = range(len(rows), len(rows) + end - start)
                rows += [*range(start, end), *[start] * (batch.length - end + start)]
        if rows == list(range(len(outputs))):
            return cls(batches, None, None)
        return cls(batches, torch.tensor(rows, device=device), torch.tensor(outputs, device=device))


def prefix_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pack: PrefixPackedSeqParams,
    softmax_scale: float | None,
) -> torch.Tensor:
    """[T, n, d], [T, g, d], [T, g, e] → [T, n·e], in query's dtype; n is a multiple of g.

    Raises ValueError when the pack's segments do not hold T positions.
    """
    prefixes = pack.segments_of(query.size(0))
    plan = pack.plans.get(__name__) or pack.plans.setdefault(__name__, _Plan.of(prefixes, query.device))
    sizes = [len(batch.segments) * batch.length for batch in plan.batches]
    if plan.rows_R is not None:
        query, key, value = (x.index_select(0, plan.rows_R) for x in (query, key, value))
    # Split and not sliced: its backward joins the gradients, that of a slice is as large as the pack.
    pieces, of_prefix = [], {}
    for batch, *own in zip(plan.batches, *(x.split(sizes) for x in (query, key, value)), strict=True):
        count = len(batch.segments)
        queries, keys, values = (x.view(count, batch.length, *x.shape[1:]) for x in own)
        if batch.prefix < 0:
            of_prefix[batch.segments[0]] = keys, values
            context = _attend(queries, keys, values, None, softmax_scale)
        else:
            shared = of_prefix[batch.prefix]
            # Expanded, so that the shared prefix's gradient is one sum over the batch.
            keys, values = (
                torch.cat([s.expand(count, -1, -1, -1), o], dim=1) for s, o in zip(shared, (keys, values), strict=True)
            )
            mask_LS = torch.ones(batch.length, keys.size(1), dtype=torch.bool, device=keys.device)
            context = _attend(queries, keys, values, mask_LS.tril(keys.size(1) - batch.length), softmax_scale)
        pieces.append(context.flatten(0, 1))
    rows = torch.cat(pieces)
    return (rows if plan.outputs_T is None else rows.index_select(0, plan.outputs_T)).flatten(1)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """[B, L, n, d], [B, S, g, d], [B, S, g, e] → [B, L, n, e]; causal without a mask."""
    context = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return context.transpose(1, 2)
