"""Packs on their way through Megatron-Core, and rotary embeddings that take the positions of their tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams

from drpo_megatron.models.routing import MicroBatchRouting, RoutedSeqParams
from drpo_megatron.models.shared_prefixes import SharedPrefixes


@dataclass
class PositionedSeqParams(RoutedSeqParams):
    """A pack whose rotary embedding gets a row of angles a packed token, rather than a table by position.

    rotary_positions_T: int64 [T]. max_positions: more than the largest of them.

    With such rows Megatron-Core's unfused rotary embedding turns all tokens at once, and with a table one sequence
    after the other. It takes them in their order when its bounds call the whole pack one sequence.
    """

    rotary_positions_T: torch.Tensor | None = None
    max_positions: int = 0


def positioned_seq_params(
    cu_seqlens: torch.Tensor, max_seqlen: int, num_tokens: int, routing: MicroBatchRouting | None = None
) -> PositionedSeqParams:
    """A pack of ordinary sequences for the local core attention, which reads cu_seqlens_q; Megatron-Core's rotary
    embedding reads the padded bounds.
    """
    starts_S, lengths_S = cu_seqlens[:-1], cu_seqlens.diff()
    starts_T = starts_S.repeat_interleave(lengths_S, output_size=num_tokens)
    whole = torch.tensor([0, num_tokens], dtype=torch.int32, device=cu_seqlens.device)
    return PositionedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=whole,
        cu_seqlens_kv_padded=whole,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        routing=routing,
        rotary_positions_T=torch.arange(num_tokens, device=cu_seqlens.device) - starts_T,
        max_positions=max_seqlen,
    )


@dataclass
class PrefixPackedSeqParams(PositionedSeqParams):
    """A pack with shared prefixes, as it travels through Megatron-Core to the rotary embedding and the core attention.

    prefixes: the segments, which core attentions read: the cu_seqlens call the whole pack one sequence.
    """

    prefixes: SharedPrefixes | None = None

    def segments_of(self, num_tokens: int) -> SharedPrefixes:
        """The segments, which must hold `num_tokens` positions: ValueError otherwise."""
        if self.prefixes is None or self.prefixes.bounds[-1] != num_tokens:
            raise ValueError(f"there are {num_tokens} packed tokens for the segments {self.prefixes}")
        return self.prefixes

    @functools.cached_property
    def plans(self) -> dict[str, Any]:
        """What a core attention derives from `prefixes`, by its own name: made once, used by all layers."""
        return {}


def prefix_packed_seq_params(
    prefixes: SharedPrefixes, position_ids_T: torch.Tensor, routing: MicroBatchRouting | None = None
) -> PrefixPackedSeqParams:
    """Raises ValueError when there are not as many positions as the segments hold."""
    total = prefixes.bounds[-1]
    if total != len(position_ids_T):
        raise ValueError(f"the segments end at {total} and there are {len(position_ids_T)} packed tokens")
    cu_seqlens = torch.tensor([0, total], dtype=torch.int32, device=position_ids_T.device)
    return PrefixPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=total,
        max_seqlen_kv=total,
        routing=routing,
        prefixes=prefixes,
        rotary_positions_T=position_ids_T,
        max_positions=max(map(sum, zip(prefixes.prefix_lengths, prefixes.lengths, strict=True))),
    )


class _ByPosition:
    """Rotary frequencies with one row a packed token for packs that know their positions, Megatron-Core's otherwise.

    What `get_rotary_seq_len` returns is what Megatron-Core hands to the module's forward: here, the pack.
    """

    def get_rotary_seq_len(
        self,
        inference_context: Any,
        transformer: Any,
        transformer_input: Any,
        transformer_config: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> int | PositionedSeqParams:
        if isinstance(packed_seq_params, PositionedSeqParams):
            return packed_seq_params
        of_parent: Any = super()
        length: int = of_parent.get_rotary_seq_len(
            inference_context, transformer, transformer_input, transformer_config, packed_seq_params, **kwargs
        )
        return length

    def forward(self, max_seq_len: int | PositionedSeqParams, *args: Any, **kwargs: Any) -> Any:
        of_parent: Any = super()
        if not isinstance(max_seq_len, PositionedSeqParams):
            return of_parent.forward(max_seq_len, *args, **kwargs)
        table = of_parent.forward(max_seq_len.max_positions, *args, **kwargs)
        rows_T = max_seq_len.rotary_positions_T
        # yarn returns its concentration factor too
        return (table[0][rows_T], *table[1:]) if isinstance(table, tuple) else table[rows_T]


class PositionRotaryEmbedding(_ByPosition, RotaryEmbedding):  # type: ignore[misc]  # a length may be a pack here
    pass


class PositionYarnRotaryEmbedding(_ByPosition, YarnRotaryEmbedding):  # type: ignore[misc]  # as above
    pass


_WITH_POSITIONS = {RotaryEmbedding: PositionRotaryEmbedding, YarnRotaryEmbedding: PositionYarnRotaryEmbedding}


def rotate_by_position(model: torch.nn.Module) -> None:
    """Let every rotary embedding in `model`, the model's own and those of latent attention layers, take packs that know
    their positions. Raises TypeError for a kind of embedding that this module does not know.
    """
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            if type(module) not in _WITH_POSITIONS:
                raise TypeError(f"{type(module).__name__} has no form with positions: add one to {__name__}")
            # Only these two methods differ: frequencies and caches stay as they were made.
            module.__class__ = _WITH_POSITIONS[type(module)]
