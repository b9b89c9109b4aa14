"""Local attention and rotary positions of packed sequences, against one dense mask and Megatron-Core's own loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from drpo_megatron import platform

platform.activate()

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402 - Megatron-Core needs the redirect first
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from drpo_megatron.models.attention import SDPACoreAttention  # noqa: E402
from drpo_megatron.models.packs import positioned_seq_params  # noqa: E402

# Alone, in runs of equal length, and one of a length that was there before.
LENGTHS = (3, 5, 5, 5, 1, 1, 8, 5)


def bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_equals_a_dense_mask(heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    q, k, v = (
        torch.randn(total, n, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (heads, groups, groups)
    )
    cotangent = torch.randn(total, heads * 8, dtype=torch.float64, generator=generator)
    sequence_T = torch.repeat_interleave(torch.tensor(LENGTHS))
    seen_TT = (sequence_T[:, None] == sequence_T) & torch.ones(total, total).tril().bool()
    repeated = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    key, value = repeated
    scores = torch.einsum("tnd,und->ntu", q, key) * 8**-0.5
    expected = torch.einsum("ntu,und->tnd", scores.masked_fill(~seen_TT, -torch.inf).softmax(-1), value).flatten(1)

    config = TransformerConfig(num_layers=1, hidden_size=heads * 8, num_attention_heads=heads)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(cp=None))  # type: ignore[arg-type]
    cu_seqlens = bounds(LENGTHS)
    pack = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    actual = attention(q, k, v, None, packed_seq_params=pack)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(x, (q, k, v), cotangent) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lengths", [LENGTHS, (7,), (4, 4)])
def test_rotary_rows_turn_as_the_table_does(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]) -> None:
    """Equal to the bit, and without the loop over sequences."""
    total, longest = sum(lengths), max(lengths)
    alone: object = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    # A row more, or the table of one sequence is as long as the pack, and Megatron-Core takes it for rows.
    table = torch.outer(torch.arange(longest + 1.0), torch.rand(4)).repeat(1, 2)[:, None, None]
    x = torch.randn(total, 2, 8)
    expected = rope_utils._apply_rotary_pos_emb_thd(x, bounds(lengths), table, cp_group=alone)
    pack = positioned_seq_params(bounds(lengths), longest, total)
    assert pack.rotary_positions_T is not None and pack.cu_seqlens_q.tolist() == bounds(lengths).tolist()
    turn, calls = rope_utils._apply_rotary_pos_emb_bshd, []
    monkeypatch.setattr(
        rope_utils, "_apply_rotary_pos_emb_bshd", lambda *a, **kw: calls.append(len(a[0])) or turn(*a, **kw)
    )
    rows = table[pack.rotary_positions_T]
    actual = rope_utils._apply_rotary_pos_emb_thd(x, pack.cu_seqlens_q_padded, rows, cp_group=alone)
    assert torch.equal(actual, expected)
    assert calls == [total]
