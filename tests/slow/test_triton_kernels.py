"""The Triton kernels under Triton's interpreter against the closed forms in float64.

The interpreter must be chosen before triton is imported, so the checks run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHECKS = """
import itertools
import torch
from drpo_megatron.vocab_parallel import torch_kernels, triton_kernels
from drpo_megatron.vocab_parallel.logprob import merge_statistics

g = torch.Generator().manual_seed(0)
checked = 0
for dtype, columns, temperature in itertools.product((torch.float32, torch.bfloat16), (1, 255, 256, 700), (1.0, 0.7)):
    logits = (5 * torch.randn(6, columns, generator=g)).to(dtype)
    logits[1] = 1e4 * torch.linspace(-1, 1, columns).to(dtype)
    logits[2] = -1e4
    logits[3, -1] = 60.0  # far above the first block: what is stored by then moves
    targets = torch.tensor([0, columns - 1, columns // 2, -1, columns, columns + 500])  # three of other ranks
    owned = targets[:3]

    exact = logits.double() / temperature
    kept = logits.clone()
    stats = triton_kernels.statistics_(kept, targets, temperature, exponentiate=False)
    assert torch.equal(kept, logits)
    same, projected = torch.eye(columns, dtype=dtype), torch.empty_like(logits)
    assert torch.equal(triton_kernels.project(logits, same, targets, temperature, projected, exponentiate=True), stats)
    above = exact - stats[:, :1].double()
    assert float(above.max()) <= torch_kernels.HEADROOM + 1e-2
    rounding = 1.6e-2 if dtype == torch.bfloat16 else 2e-3
    torch.testing.assert_close(projected.double(), above.exp(), rtol=rounding, atol=1e-30)
    scratch = torch.empty_like(logits)
    expected = torch_kernels.project(logits, same, targets, temperature, scratch, exponentiate=False)
    torch.testing.assert_close(stats[:, 3], expected[:, 3], rtol=1e-6, atol=0)
    for ours, theirs in zip(merge_statistics(stats[None])[1:], merge_statistics(expected[None])[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(exact.abs().max()))
    assert (stats[3:, 3] == -torch.inf).all()

    # Of this rank and of others, one of which holds nothing.
    nothing = torch.tensor([torch.finfo(torch.float32).min, 0.0, 0.0, -torch.inf]).expand_as(stats)
    other = stats.clone()
    other[:, 0] += 3.0
    for gathered in (stats[None], torch.stack([nothing, other, stats])):
        merged = torch.empty(3, 6)
        triton_kernels.merge(gathered, *merged)
        for ours, theirs in zip(merged, merge_statistics(gathered), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5, equal_nan=True)
    _, entropy, log_normalizer = merge_statistics(stats[None])
    log_p = torch.log_softmax(exact, -1)
    logp = torch.zeros(6)
    logp[:3] = log_p[:3].gather(1, owned[:, None])[:, 0].float()
    torch.testing.assert_close(log_normalizer.double(), exact.logsumexp(-1), rtol=1e-6, atol=1e-5)
    c, e = torch.randn(2, 6, generator=g)
    onehot = torch.zeros(6, columns, dtype=torch.float64)
    onehot[:3].scatter_(1, owned[:, None], 1.0)
    p, H = log_p.exp(), -(log_p.exp() * log_p).sum(-1, keepdim=True)
    for grad_entropy in (None, e):
        expected = c.double()[:, None] * (onehot - p)
        if grad_entropy is not None:
            expected = expected - grad_entropy.double()[:, None] * p * (log_p + H)
        expected = expected / temperature
        for kernels, maximum in itertools.product((triton_kernels, torch_kernels), (None, stats[:, 0])):
            operand = (logits if maximum is None else projected).clone()
            factor = kernels.gradient_(
                operand, targets, maximum_C=maximum, logp_C=logp, log_normalizer_C=log_normalizer, entropy_C=entropy,
                grad_logp_C=c, grad_entropy_C=grad_entropy, temperature=temperature,
            )
            actual = operand.double() * factor.double()[:, None]
            tolerance = 1e-2 if dtype == torch.bfloat16 else 5e-3  # exp of a number of 1e4 in float32
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
            if dtype == torch.float32:
                torch.testing.assert_close(actual[[0, 3, 4, 5]], expected[[0, 3, 4, 5]], rtol=1e-4, atol=1e-5)
            checked += 1
    # Another rank's maximum is far above: this shard's probabilities are as good as zero.
    operands, factors = (projected.clone(), projected.clone()), []
    for kernels, operand in zip((triton_kernels, torch_kernels), operands, strict=True):
        factors.append(kernels.gradient_(
            operand, targets, maximum_C=stats[:, 0], logp_C=logp - 100, log_normalizer_C=log_normalizer + 100,
            entropy_C=entropy, grad_logp_C=c, grad_entropy_C=None, temperature=temperature,
        ))
    torch.testing.assert_close(*factors, rtol=1e-5, atol=0)
    torch.testing.assert_close(*operands, rtol=1e-2, atol=0)
    rows, factor = torch.randn(6, 1500, generator=g).to(dtype), torch.randn(6, generator=g)
    scaled = [kernels.scale_rows(rows, factor, torch.empty_like(rows)) for kernels in (triton_kernels, torch_kernels)]
    # The interpreter truncates.
    torch.testing.assert_close(*scaled, rtol=8e-3 if dtype == torch.bfloat16 else 0, atol=0)
none = torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(2, dtype=torch.int64), 1.0, torch.zeros(2, 0)
empty, expected = (kernels.project(*none, exponentiate=True) for kernels in (triton_kernels, torch_kernels))
torch.testing.assert_close(empty, expected)
print("checked", checked)
"""


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split() == ["checked", "128"]
