"""Gemma's norm, embedding and activation in bf16, where the order of rounding shows, against transformers' modules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaModel, GemmaRMSNorm

from drpo_megatron.models.builder import embedding_scale, gelu_tanh
from drpo_megatron.models.specs import RMSNorm
from tests.support import tiny_models


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centred_norm(dtype: torch.dtype) -> None:
    settings: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=False, layernorm_zero_centered_gamma=True)
    ours, theirs = RMSNorm(settings, 96, eps=1e-3), GemmaRMSNorm(96, eps=1e-3).to(dtype)
    assert torch.equal(ours.weight, theirs.weight)
    x_TH = 3 * _random(50, 96, dtype=dtype)
    with torch.no_grad():
        for module in (ours, theirs):
            module.weight.copy_(0.3 * _random(96, dtype=dtype, seed=1))
        actual, expected = ours(x_TH), theirs(x_TH)
    assert actual.dtype == dtype
    # One unit in the last place: the mean of squares is summed in another order.
    torch.testing.assert_close(actual, expected, rtol=2e-6 if dtype is torch.float32 else 2**-7, atol=0)
    if dtype is torch.bfloat16:
        assert (actual == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embedding(dtype: torch.dtype) -> None:
    model = GemmaModel(tiny_models.config("gemma", hidden_size=96, num_attention_heads=4)).to(dtype)
    tokens_1T = torch.arange(3, 50)[None]
    with torch.no_grad():
        expected = model.embed_tokens(tokens_1T)
        actual = model.embed_tokens.weight[tokens_1T] * embedding_scale(96, dtype)
    assert torch.equal(actual, expected)
    rounded = {torch.float32: 96**0.5, torch.bfloat16: 9.8125}[dtype]
    assert embedding_scale(96, dtype) == pytest.approx(rounded, rel=1e-7)


def test_gelu() -> None:
    x = torch.linspace(-6, 6, 1001)
    assert torch.equal(gelu_tanh(x), ACT2FN["gelu_pytorch_tanh"](x))
    assert (gelu_tanh(x) - torch.nn.functional.gelu(x)).abs().max() > 1e-4
