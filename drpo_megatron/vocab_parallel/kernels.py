"""A chunk's logits and their statistics, and their gradient, as one interface: Triton for CUDA tensors, torch for all
others and float64.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from drpo_megatron.vocab_parallel import torch_kernels


class Kernels(Protocol):
    """See `torch_kernels`."""

    def project(
        self,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        targets_C: Tensor,
        temperature: float,
        logits_CV: Tensor,
        *,
        exponentiate: bool,
    ) -> Tensor: ...

    def merge(self, gathered_RC4: Tensor, logp_C: Tensor, entropy_C: Tensor, log_normalizer_C: Tensor) -> None: ...

    def scale_rows(self, matrix_CH: Tensor, factor_C: Tensor, out_CH: Tensor) -> Tensor: ...

    def gradient_(
        self,
        logits_CV: Tensor,
        targets_C: Tensor,
        *,
        maximum_C: Tensor | None,
        logp_C: Tensor,
        log_normalizer_C: Tensor,
        entropy_C: Tensor,
        grad_logp_C: Tensor,
        grad_entropy_C: Tensor | None,
        temperature: float,
    ) -> Tensor: ...


def kernels_for(tensor: Tensor) -> Kernels:
    """The kernels of the tensor's device."""
    if tensor.is_cuda and tensor.dtype != torch.float64:
        from drpo_megatron.vocab_parallel import triton_kernels

        return cast(Kernels, triton_kernels)
    return cast(Kernels, torch_kernels)
