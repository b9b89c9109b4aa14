"""The core attention of context-parallel ranks equals attention over whole sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.launch import run_ranks
from tests.support.pool import LIMIT_S

pytestmark = pytest.mark.distributed

BOUNDS = [0, 16, 16, 24, 40]  # one sequence is empty
HEADS, GROUPS, KEY_DIM, VALUE_DIM = 6, 2, 8, 5


def attention_tensors() -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, float64, of the whole pack."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, KEY_DIM), (GROUPS, KEY_DIM), (GROUPS, VALUE_DIM), (HEADS * VALUE_DIM,))
    return [torch.randn(BOUNDS[-1], *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attention_on_ranks() -> tuple[np.ndarray, list[np.ndarray]]:
    """Where this rank's tokens are in the pack; the output and the gradients of query, key and value there."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from drpo_megatron.models.context_attention import context_attention, context_positions
    from drpo_megatron.platform import distributed
    from drpo_megatron.platform.layout import ParallelLayout

    distributed.initialize(ParallelLayout(context=4), timeout_s=LIMIT_S)
    mine = context_positions(BOUNDS, dist.get_rank(), 4)
    query, key, value, gradient = (t[mine] for t in attention_tensors())
    leaves = [t.requires_grad_() for t in (query, key, value)]
    group = parallel_state.get_context_parallel_group()
    output = context_attention(*leaves, BOUNDS, group=group, softmax_scale=0.3)
    output.backward(gradient)
    with pytest.raises(ValueError, match="cu_seqlens ends at 24, and 4 context-parallel ranks hold 10 tokens each"):
        context_attention(*leaves, BOUNDS[:-1], group=group, softmax_scale=0.3)
    distributed.shutdown()
    return mine.numpy(), [t.detach().numpy() for t in (output, *(leaf.grad for leaf in leaves))]


def test_core_attention_equals_attention_over_whole_sequences() -> None:
    """Grouped queries, values narrower than keys; forward and all three gradients to float64's rounding."""
    query, key, value, gradient = attention_tensors()
    leaves = [t.requires_grad_() for t in (query, key, value)]
    pieces = []
    for start, end in ((0, 16), (16, 24), (24, 40)):
        q, k, v = (t[start:end].transpose(0, 1) for t in leaves)
        k, v = (t.repeat_interleave(HEADS // GROUPS, dim=0) for t in (k, v))
        pieces.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(0, 1))
    output = torch.cat(pieces).flatten(1)
    output.backward(gradient)
    expected = [t.detach().numpy() for t in (output, *(leaf.grad for leaf in leaves))]
    ranks = run_ranks(4, attention_on_ranks)
    assert sorted(np.concatenate([mine for mine, _ in ranks]).tolist()) == list(range(BOUNDS[-1]))
    for mine, actual in ranks:
        for ours, whole in zip(actual, expected, strict=True):
            np.testing.assert_allclose(ours, whole[mine], rtol=0, atol=1e-12)
