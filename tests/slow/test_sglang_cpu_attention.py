"""Attention of the CPU's rollout server over requests of equal lengths at once, against each request by itself."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from drpo_megatron.platform import sglang_cpu_attention
from drpo_megatron.platform.sglang_cpu_attention import attend

# (old tokens, new tokens) of each request: of equal shape, of equal sums, alone.
REQUESTS = [(0, 4), (3, 1), (0, 4), (2, 2), (0, 4), (3, 1), (5, 7)]


@pytest.mark.parametrize("most_scores", [2**24, 150])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("decode", [False, True])
def test_equals_each_request_by_itself(
    monkeypatch: pytest.MonkeyPatch, decode: bool, heads: int, groups: int, most_scores: int
) -> None:
    monkeypatch.setattr(sglang_cpu_attention, "MOST_SCORES", most_scores)
    requests = [(old + new - 1, 1) for old, new in REQUESTS] if decode else REQUESTS
    generator = torch.Generator().manual_seed(0)
    lengths = [old + new for old, new in requests]
    slots = torch.randperm(80, generator=generator, dtype=torch.int32)
    slots_SL = torch.zeros(len(requests), 20, dtype=torch.int32)
    for request, (length, own) in enumerate(zip(lengths, slots.split([*lengths, 80 - sum(lengths)])[:-1], strict=True)):
        slots_SL[request, :length] = own
    keys, values = (torch.randn(80, groups, d, dtype=torch.float64, generator=generator) for d in (8, 5))
    query = torch.randn(sum(new for _, new in requests), heads, 8, dtype=torch.float64, generator=generator)
    expected, first = [], 0
    for (old, new), row_L in zip(requests, slots_SL, strict=True):
        key, value = (x[row_L[: old + new]].repeat_interleave(heads // groups, 1) for x in (keys, values))
        scores = torch.einsum("tnd,und->ntu", query[first : first + new], key) * 0.3
        seen = torch.arange(old + new) <= torch.arange(old, old + new)[:, None]
        expected.append(torch.einsum("ntu,und->tnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value))
        first += new
    actual = attend(
        query,
        query.new_full((len(query), heads, 5), torch.nan),
        (keys, values),
        slots_SL,
        [new for _, new in requests],
        lengths,
        causal=not decode,
        scale=0.3,
    )
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("special", [{}, {"is_cross_attn": True, "encoder_lens": torch.tensor([2, 3, 2])}])
@pytest.mark.parametrize("loop", ["extend", "decode"])
def test_equals_the_loop_of_sglang(
    monkeypatch: pytest.MonkeyPatch, loop: str, special: dict[str, bool | torch.Tensor]
) -> None:
    name = f"_run_sdpa_forward_{loop}"
    theirs = getattr(TorchNativeAttnBackend, name)
    for each in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        monkeypatch.setattr(TorchNativeAttnBackend, each, getattr(TorchNativeAttnBackend, each))
    sglang_cpu_attention.install()
    ours = getattr(TorchNativeAttnBackend, name)
    assert ours is not theirs
    together = Mock(wraps=attend)
    monkeypatch.setattr(sglang_cpu_attention, "attend", together)

    generator = torch.Generator().manual_seed(0)
    new, lengths = (torch.tensor([1, 1, 1]) if loop == "decode" else torch.tensor([2, 4, 2])), torch.tensor([5, 7, 5])
    query = torch.randn(int(new.sum()), 4, 8, generator=generator)
    caches = [torch.randn(40, 2, 8, generator=generator) for _ in range(2)]
    rows = torch.randperm(40, generator=generator)[:30].view(3, 10)
    of_loop = (lengths - new, new) if loop == "extend" else ()
    causal = loop == "extend" and not special
    encoder_lens = special.get("encoder_lens")
    options = {"scaling": 0.3, "enable_gqa": True, "causal": causal, "is_cross_attn": bool(special)}
    results = [
        run(
            None,
            query,
            torch.zeros_like(query),
            *caches,
            rows,
            torch.tensor([2, 0, 1]),
            lengths,
            *of_loop,
            encoder_lens,
            **options,
        )
        for run in (theirs, ours)
    ]
    torch.testing.assert_close(*results)
    assert together.called is not bool(special)
