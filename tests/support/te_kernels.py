"""Stand-ins in torch for the CUDA kernels of Transformer Engine's optimizer; all above them is the real one."""

from __future__ import annotations

from typing import Any

import torch

Tensors = list[torch.Tensor]


def install() -> None:
    """In place of the extension's functions. Call it before Megatron-Core is imported."""
    from transformer_engine.pytorch import optimizers  # which puts the extension on the path

    import transformer_engine_torch as extension  # isort: skip

    for module in (extension, optimizers):
        module.multi_tensor_l2norm = _norm
        module.multi_tensor_scale = _scale
        module.multi_tensor_adam = _adam
        module.multi_tensor_adam_param_remainder = _adam_with_remainders


def main_weights(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """float32 of the bfloat16 weight and the 16 bits below it. The weight was rounded up where those are half or more,
    which makes `low`, an int16, negative.
    """
    upper = high.view(torch.int16).to(torch.int32) - (low < 0).to(torch.int32)
    return ((upper << 16) | (low.to(torch.int32) & 0xFFFF)).view(torch.float32)


def _norm(_: int, noop: torch.Tensor, lists: list[Tensors], per_parameter: bool) -> tuple[torch.Tensor, None]:
    assert not per_parameter
    return torch.stack([t.float().norm() for t in lists[0]]).norm()[None], None


def _scale(_: int, noop: torch.Tensor, lists: list[Tensors], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def _step(weight: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *settings: Any) -> torch.Tensor:
    """Moments in place, in their own dtype; the new weight, float32."""
    lr, beta1, beta2, eps, step, adamw, bias_correction, decay = settings
    assert adamw == 1 and bias_correction == 1
    new_m, new_v = beta1 * m.float() + (1 - beta1) * g, beta2 * v.float() + (1 - beta2) * g * g
    m.copy_(new_m)
    v.copy_(new_v)
    update = (new_m / (1 - beta1**step)) / ((new_v / (1 - beta2**step)).sqrt() + eps) + decay * weight
    return weight - lr * update


def _adam(_: int, noop: torch.Tensor, lists: list[Tensors], *settings: Any) -> None:
    for g, p, m, v, *main in zip(*lists, strict=True):
        updated = _step((main[0] if main else p).float(), g, m, v, *settings)
        for weight in (p, *main):
            weight.copy_(updated)


def _adam_with_remainders(_: int, noop: torch.Tensor, lists: list[Tensors], *settings: Any) -> None:
    for g, p, m, v, low in zip(*lists, strict=True):
        bits = _step(main_weights(p, low), g, m, v, *settings).view(torch.int32)
        low.copy_((bits << 16 >> 16).to(torch.int16))
        p.copy_(((bits >> 16) + (low < 0).to(torch.int32)).to(torch.int16).view(torch.bfloat16))
