"""Attention of SGLang's server on a machine without CUDA, for `platform.sglang_cpu`.

SGLang's torch attention takes one request after the other, a dozen small operations each in every layer. Here requests
of equal lengths, as the samples of a prompt are, go through the same operations together. What has a sliding window or
an encoder is left to SGLang.
"""

from __future__ import annotations

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

    Backend._run_sdpa_forward_extend = _extend(Backend._run_sdpa_forward_extend)
    Backend._run_sdpa_forward_decode = _decode(Backend._run_sdpa_forward_decode)


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


def _extend(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        self: Any,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if _is_special(encoder_lens, options):
            pools = (req_to_token, req_pool_indices, seq_lens, extend_prefix_lens, extend_seq_lens, encoder_lens)
            return original(self, query, output, k_cache, v_cache, *pools, **options)
        return attend(
            query,
            output,
            (k_cache, v_cache),
            req_to_token[req_pool_indices, : int(seq_lens.max())],
            extend_seq_lens.tolist(),
            seq_lens.tolist(),
            causal=options["causal"],
            scale=options["scaling"],
        )

    return run


def _decode(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        self: Any,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if _is_special(encoder_lens, options):
            pools = (req_to_token, req_pool_indices, seq_lens, encoder_lens)
            return original(self, query, output, k_cache, v_cache, *pools, **options)
        return attend(
            query,
            output,
            (k_cache, v_cache),
            req_to_token[req_pool_indices, : int(seq_lens.max())],
            [1] * len(seq_lens),
            seq_lens.tolist(),
            causal=False,
            scale=options["scaling"],
        )

    return run


def _is_special(encoder_lens: Tensor | None, options: dict[str, Any]) -> bool:
    return encoder_lens is not None or options["is_cross_attn"] or options["sliding_window_size"] is not None
