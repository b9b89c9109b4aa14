"""The fused loss on a GPU: Triton kernels, tuned, and cuBLAS products against unsharded autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drpo_megatron.algorithms import make_loss
from drpo_megatron.vocab_parallel import fused_logprobs, fused_policy_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device"),
]

T, H, PADDED, VOCAB, TEMPERATURE, ENTROPY_COEFFICIENT = 300, 256, 8192, 8111, 0.7, 0.1
FLOAT32 = 1e-5


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def whole_logits(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """log p and entropy [T] by torch's own operations: the product in the dtype it is given, and no less than float32
    from there on.
    """
    logits_TV = hidden_TH @ weight_VH[:VOCAB].T
    logits_TV = (logits_TV.float() if logits_TV.dtype is torch.bfloat16 else logits_TV) / TEMPERATURE
    log_p_TV = torch.log_softmax(logits_TV, -1)
    return log_p_TV.gather(1, targets_T[:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loss_on_a_gpu(dtype: torch.dtype) -> None:
    """Both modes, several chunks (the first one is tuned on, in place), with and without an entropy bonus. A row has
    logits far above those before them, twice; one mode adds to a main_grad that is not zero.

    How far bf16 is off says bf16's own way over whole logits: with that row, 2 % of a gradient.
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

    leaves64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    plain = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = whole_logits(leaves64[0][mask], leaves64[1], targets[mask])
    plain_logp, plain_entropy = whole_logits(plain[0][mask], plain[1], targets[mask])
    logmu = torch.zeros(T, device="cuda").masked_scatter(mask, logp.detach().float() + 0.1)
    budget = 64 * PADDED * dtype.itemsize

    def agrees(actual: Tensor, exact: Tensor, by_plain: Tensor) -> bool:
        bound = FLOAT32 if dtype is torch.float32 else 1.1 * relative(by_plain, exact)
        return relative(actual.detach(), exact.detach()) < bound

    for entropy_coefficient in (0.0, ENTROPY_COEFFICIENT):

        def loss(logp: Tensor, entropy: Tensor, coefficient: float = entropy_coefficient) -> Tensor:
            return -(advantages[mask] * (logp - logmu[mask]).exp() + coefficient * entropy).sum() / T

        exact = torch.autograd.grad(
            loss(logp, entropy), (*leaves64, logp, entropy), retain_graph=True, allow_unused=True
        )
        by_plain = torch.autograd.grad(loss(plain_logp, plain_entropy), plain, retain_graph=True)
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        before = float(exact[1].abs().mean())
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
        assert agrees(result.logp_N, logp, plain_logp.detach())
        assert agrees(result.entropy_N, entropy, plain_entropy.detach())
        assert agrees(leaves[0].grad, exact[0], by_plain[0])
        assert agrees(leaves[1].main_grad - before, exact[1], by_plain[1])

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
        upstream = [torch.zeros_like(o) if e is None else e.float() for o, e in zip(outputs, exact[2:], strict=True)]
        torch.autograd.backward(outputs, upstream)
        assert agrees(leaves[0].grad, exact[0], by_plain[0])
        assert agrees(leaves[1].grad, exact[1], by_plain[1])
