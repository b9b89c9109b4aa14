"""The fused loss on a GPU: Triton kernels, tuned, and cuBLAS products against unsharded autograd in float64."""

from __future__ import annotations

import pytest
import torch

from drpo_megatron.algorithms import make_loss
from drpo_megatron.vocab_parallel import fused_logprobs, fused_policy_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device"),
]

T, H, PADDED, VOCAB, TEMPERATURE, ENTROPY_COEFFICIENT = 300, 256, 8192, 8111, 0.7, 0.1


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fused_loss_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    """Both modes, several chunks (the first one is tuned on, in place), with and without an entropy bonus. A row has
    logits far above those before them, twice; one mode adds to a main_grad that is not zero.
    """
    g = torch.Generator(device="cuda").manual_seed(0)
    hidden = (0.3 * torch.randn(T, H, device="cuda", generator=g)).to(dtype)
    weight = (0.3 * torch.randn(PADDED, H, device="cuda", generator=g)).to(dtype)
    direction = hidden[7] / hidden[7].norm() ** 2
    weight[5000], weight[8100] = 40 * direction, 90 * direction
    targets = torch.randint(0, VOCAB, (T,), device="cuda", generator=g)
    mask = torch.rand(T, device="cuda", generator=g) > 0.3
    mask[7] = True
    advantages = torch.cos(2.0 * torch.arange(T, device="cuda"))
    weights = torch.full((T,), 1 / T, device="cuda")

    hidden64, weight64 = (t.double().clone().requires_grad_() for t in (hidden, weight))
    log_p = torch.log_softmax(hidden64[mask] @ weight64[:VOCAB].T / TEMPERATURE, -1)
    logp = log_p.gather(1, targets[mask, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    logmu = torch.zeros(T, device="cuda").masked_scatter(mask, logp.detach().float() + 0.1)
    budget = 64 * PADDED * dtype.itemsize
    for entropy_coefficient in (0.0, ENTROPY_COEFFICIENT):
        ratio = (logp - logmu[mask]).exp()
        loss = -(advantages[mask] * ratio + entropy_coefficient * entropy).sum() / T
        expected = torch.autograd.grad(loss, (hidden64, weight64, logp, entropy), retain_graph=True, allow_unused=True)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        before = float(expected[1].abs().mean())
        leaves[1].main_grad = torch.full((PADDED, H), before, device="cuda")
        result = fused_policy_loss(
            *leaves,
            targets,
            loss_function=make_loss("pg", {}),
            logmu_T=logmu,
            advantages_T=advantages,
            weights_T=weights,
            mask_T=mask,
            group=None,
            vocab_size=VOCAB,
            temperature=TEMPERATURE,
            entropy_coefficient=entropy_coefficient,
            memory_budget=budget,
        )
        result.loss.backward()
        assert relative(result.logp_N, logp.detach()) < tolerance
        assert relative(result.entropy_N, entropy.detach()) < tolerance
        assert relative(leaves[0].grad, expected[0]) < tolerance
        assert relative(leaves[1].main_grad - before, expected[1]) < tolerance

        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        outputs = fused_logprobs(
            *leaves,
            targets,
            mask_T=mask,
            group=None,
            vocab_size=VOCAB,
            temperature=TEMPERATURE,
            memory_budget=budget,
        )
        upstream = [torch.zeros_like(o) if e is None else e.float() for o, e in zip(outputs, expected[2:], strict=True)]
        torch.autograd.backward(outputs, upstream)
        assert relative(leaves[0].grad, expected[0]) < tolerance
        assert relative(leaves[1].grad, expected[1]) < tolerance
