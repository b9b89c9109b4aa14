"""Attention over shared prefixes against one dense mask in float64, its work, and its layout."""

from __future__ import annotations

import pytest
import torch

from drpo_megatron import platform
from drpo_megatron.models.shared_prefixes import SharedPrefixes

platform.activate()

from drpo_megatron.models import prefix_attention as module  # noqa: E402 - Megatron-Core needs the redirect first
from drpo_megatron.models.flex_attention import flex_prefix_attention, with_shared_prefixes  # noqa: E402
from drpo_megatron.models.packs import prefix_packed_seq_params  # noqa: E402

# A lone segment, two prefixes with their segments mixed, an empty one, lengths on both sides of the batches' bounds.
PREFIXES = SharedPrefixes(
    bounds=(0, 7, 12, 50, 53, 60, 100, 101, 101, 135, 136, 146),
    prefix_of=(-1, -1, 1, -1, 3, 1, 3, 3, 1, 3, -1),
)


def dense_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prefixes: SharedPrefixes) -> torch.Tensor:
    """Soft-max over every position that the definition lets a position see, one by one."""
    total, repeat = q.size(0), q.size(1) // k.size(1)
    segment_of = [s for s, length in enumerate(prefixes.lengths) for _ in range(length)]
    seen = torch.zeros(total, total, dtype=torch.bool)
    for t in range(total):
        for u in range(total):
            own = segment_of[u] == segment_of[t] and u <= t
            seen[t, u] = own or segment_of[u] == prefixes.prefix_of[segment_of[t]]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("tnd,und->ntu", q, k) * q.size(-1) ** -0.5
    return torch.einsum("ntu,und->tnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
def test_equals_a_dense_mask(heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, 8), (groups, 8), (groups, 8))
    total = PREFIXES.bounds[-1]
    leaves = [torch.randn(total, *s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]
    cotangent = torch.randn(total, heads * 8, dtype=torch.float64, generator=generator)
    expected = dense_reference(*leaves, PREFIXES)
    expected_gradients = torch.autograd.grad(expected, leaves, cotangent)
    pack = prefix_packed_seq_params(PREFIXES, PREFIXES.position_ids())
    for _ in range(2):  # the second layer takes the plan of the first
        actual = module.prefix_attention(*leaves, pack, None)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
        for ours, theirs in zip(torch.autograd.grad(actual, leaves, cotangent), expected_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 8), (6, 2, 5)])
def test_flex_attention_equals_it(heads: int, groups: int, width: int) -> None:
    """The forward: torch has no backward of FlexAttention without a GPU (tests/gpu has)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, 8), (groups, 8), (groups, width))
    query, key, value = (torch.randn(PREFIXES.bounds[-1], *s, dtype=torch.float64, generator=generator) for s in shapes)
    pack = prefix_packed_seq_params(PREFIXES, PREFIXES.position_ids())
    for scale in (None, 0.3):
        expected = module.prefix_attention(query, key, value, pack, scale)
        actual = flex_prefix_attention(query, key, value, pack, scale)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_transformer_engines_attention_hands_over_shared_prefixes() -> None:
    class Core(torch.nn.Module):
        def __init__(self, softmax_scale: float | None = None) -> None:
            super().__init__()

        def forward(self, query: torch.Tensor, *args: object, **kwargs: object) -> str:
            return "plain"

    core = with_shared_prefixes(Core)(softmax_scale=0.3)
    pack = prefix_packed_seq_params(PREFIXES, PREFIXES.position_ids())
    x = torch.randn(PREFIXES.bounds[-1], 2, 8)
    assert core(x, x, x, None, packed_seq_params=None) == "plain"
    expected = module.prefix_attention(x, x, x, pack, 0.3)
    torch.testing.assert_close(core(x, x, x, None, packed_seq_params=pack), expected)


def test_the_work_is_that_of_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query-key pairs of all calls: at most half more than Σ L·(P + L) where segments are long."""
    calls: list[tuple[int, int, int]] = []
    attend = module._attend

    def counted(query: torch.Tensor, key: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append((query.size(0), query.size(1), key.size(1)))
        return attend(query, key, *rest)

    monkeypatch.setattr(module, "_attend", counted)
    lengths = [200, *torch.randint(40, 400, (16,), generator=torch.Generator().manual_seed(1)).tolist()]
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    prefixes = SharedPrefixes(tuple(bounds), (-1, *[0] * 16))
    x = torch.randn(bounds[-1], 1, 4)
    module.prefix_attention(x, x, x, prefix_packed_seq_params(prefixes, prefixes.position_ids()), None)
    pairs = sum(batch * queries * keys for batch, queries, keys in calls)
    needed = sum(n * (p + n) for n, p in zip(prefixes.lengths, prefixes.prefix_lengths, strict=True))
    assert needed <= pairs < 1.5 * needed
    assert sum(batch for batch, _, _ in calls) == 17 and len(calls) < 17


def test_positions_and_ids_of_segments() -> None:
    prefixes = SharedPrefixes((0, 3, 5, 6, 8), (-1, 0, 0, -1))
    assert prefixes.position_ids().tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    segments, continued = prefixes.segment_ids()
    assert segments.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert continued.tolist() == [-1, -1, -1, 0, 0, 0, -1, -1]


def test_what_is_no_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="need one more bound"):
        SharedPrefixes((0, 3), (-1, 0))
    with pytest.raises(ValueError, match="must not fall"):
        SharedPrefixes((0, 3, 2), (-1, 0))
    with pytest.raises(ValueError, match="segment 1 continues segment 1"):
        SharedPrefixes((0, 3, 5), (-1, 1))
    with pytest.raises(ValueError, match="segment 2 continues segment 1"):
        SharedPrefixes((0, 3, 5, 6), (-1, 0, 1))
    with pytest.raises(ValueError, match="end at 8 and there are 5"):
        prefix_packed_seq_params(SharedPrefixes((0, 8), (-1,)), torch.arange(5))
    pack = prefix_packed_seq_params(SharedPrefixes((0, 2), (-1,)), torch.arange(2))
    with pytest.raises(ValueError, match="3 packed tokens"):
        module.prefix_attention(torch.ones(3, 1, 1), torch.ones(3, 1, 1), torch.ones(3, 1, 1), pack, None)
