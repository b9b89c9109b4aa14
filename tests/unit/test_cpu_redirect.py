"""What the CPU redirect puts in place of a CUDA extension."""

from __future__ import annotations

import pytest
import torch

from drpo_megatron.platform.cpu import _AccumulatingProducts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weights_gradient_is_added_where_it_ends(dtype: torch.dtype) -> None:
    """As apex's extension: to a float32 sum, whatever the layer's dtype."""
    grad_TO, input_TI = torch.randn(7, 5).to(dtype), torch.randn(7, 3).to(dtype)
    before_OI = torch.randn(5, 3)
    main_grad_OI = before_OI.clone()
    _AccumulatingProducts.wgrad_gemm_accum_fp32(input_TI, grad_TO, main_grad_OI)
    expected_OI = before_OI.double() + grad_TO.double().t() @ input_TI.double()
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(main_grad_OI.double(), expected_OI, atol=tolerance, rtol=tolerance)
