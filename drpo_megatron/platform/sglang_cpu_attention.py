"""Attention of SGLang's server on a machine without CUDA, for `platform.sglang_cpu`.

SGLang's torch attention takes one request after the other, a dozen small operations each in every layer. Here requests
of equal lengths, as the samples of a prompt are, go through the same operations together. What has a sliding window or
an encoder is left to SGLang.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_SCORES = 2**24
"""Attention scores of requests that go together: 64 MiB, should torch's kernel hold them."""


def install() -> None:
    """Replace the loops over requests in SGLang's torch attention. Imports SGLang."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode"):
        setattr(Backend, name, _by_lengths(getattr(Backend, name)))


def attend(
    query_THd: Tensor,
    output_THd: Tensor,
    caches: tuple[Tensor, Tensor],
    slots_SL: Tensor,
    new_lengths: Sequence[int],
    lengths: Sequence[int],
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of S requests whose new tokens follow one another in `query_THd`, into `output_THd`, which is returned.

    caches: keys and values by slot, [slots, heads, d]. slots_SL: of each request's tokens, the new ones last. lengths:
    its tokens with the new ones. Fewer heads of keys than of queries: each serves a group of them.
    """
    starts_S = torch.tensor([0, *new_lengths]).cumsum(0)[:-1]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for request, shape in enumerate(zip(new_lengths, lengths, strict=True)):
        groups[shape].append(request)
    heads = query_THd.shape[1]
    for (new, length), requests in groups.items():
        scores = heads * length * (length if causal else 1)
        for some in torch.tensor(requests).split(max(1, MOST_SCORES // scores)):
            rows_NQ = starts_S[some][:, None] + torch.arange(new)
            slots_NL = slots_SL[some, :length]
            key, value = (cache[slots_NL].to(query_THd.dtype).transpose(1, 2) for cache in caches)
            query_NLHd = query_THd[rows_NQ]
            if causal:
                # torch's causal mask is for as many queries as keys: the old tokens' results are dropped.
                query_NLHd = F.pad(query_NLHd, (0, 0, 0, 0, length - new, 0))
            result = F.scaled_dot_product_attention(
                query_NLHd.transpose(1, 2),
                key,
                value,
                scale=scale,
                is_causal=causal,
                enable_gqa=key.shape[1] != heads,
            )
            output_THd[rows_NQ] = result.transpose(1, 2)[:, -new:]
    return output_THd


def _by_lengths(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Instead of one of SGLang's two loops: `extend` says how many tokens of each request are new, `decode` has one."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run(*values: Any, **named: Any) -> Tensor:
        call = signature.bind(*values, **named)
        call.apply_defaults()
        given = call.arguments
        special = given["encoder_lens"] is not None or given["is_cross_attn"]
        if special or given["sliding_window_size"] is not None:
            return original(*values, **named)
        lengths = given["seq_lens"].tolist()
        return attend(
            given["query"],
            given["output"],
            (given["k_cache"], given["v_cache"]),
            given["req_to_token"][given["req_pool_indices"], : max(lengths)],
            given["extend_seq_lens"].tolist() if "extend_seq_lens" in given else [1] * len(lengths),
            lengths,
            causal=given["causal"],
            scale=given["scaling"],
        )

    return run
