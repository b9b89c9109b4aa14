"""The emulation of FP8 against Transformer Engine's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drpo_megatron.config.schema import Fp8Config
from drpo_megatron.fp8 import numerics
from drpo_megatron.fp8.emulation import Quantizer, linear
from drpo_megatron.fp8.numerics import E4M3, E5M2, Format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device with FP8 for Transformer Engine"),
]

TOKENS, INPUTS, OUTPUTS = 256, 512, 384


def recipes() -> dict[str, Any]:
    """Those that this device can run."""
    from transformer_engine.common import recipe
    from transformer_engine.pytorch import fp8

    made = {
        "delayed": recipe.DelayedScaling(),
        "tensorwise": recipe.Float8CurrentScaling(),
        "blockwise": recipe.Float8BlockScaling(),
        "mxfp8": recipe.MXFP8BlockScaling(),
    }
    if not fp8.check_fp8_block_scaling_support()[0]:
        del made["blockwise"]
    if not fp8.check_mxfp8_support()[0]:
        del made["mxfp8"]
    return made


def draw(rows: int, columns: int) -> torch.Tensor:
    exponents = torch.randint(-12, 8, (rows, columns), device="cuda")
    return (torch.randn(rows, columns, device="cuda") * 2.0**exponents).bfloat16()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_quantizers_are_equal_to_the_bit(fmt: Format) -> None:
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

    dtype = tex.DType.kFloat8E4M3 if fmt is E4M3 else tex.DType.kFloat8E5M2
    torch.manual_seed(0)
    x = draw(TOKENS, INPUTS)
    x[:128, :128], x[200, 300], x[7, :] = 0, 3e4, 0

    def equal(quantizer: Any, ours: numerics.Quantized) -> None:
        assert torch.equal(quantizer(x).dequantize(dtype=torch.float32), ours.dequantize())

    scale = torch.tensor([3.7], device="cuda")
    largest = torch.zeros(1, device="cuda")
    equal(Float8Quantizer(scale=scale, amax=largest, fp8_dtype=dtype), numerics.with_scale(x, fmt, scale[0]))
    assert largest[0] == numerics.amax(x)
    equal(Float8CurrentScalingQuantizer(dtype, device=x.device), numerics.tensorwise(x, fmt))
    if "blockwise" in recipes():
        for dim, block in ((1, (1, 128)), (2, (128, 128))):
            one = Float8BlockQuantizer(dtype, rowwise=True, columnwise=False, block_scaling_dim=dim)
            equal(one, numerics.blockwise(x, fmt, block))
    if "mxfp8" in recipes():
        equal(MXFP8Quantizer(dtype, rowwise=True, columnwise=False), numerics.mxfp8(x, fmt))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_layer_and_its_gradients_are_those_of_transformer_engine(recipe: str) -> None:
    """Over three micro-batches, by which delayed scales have moved. What is left is the order and the precision of the
    sums and the rounding to bf16.
    """
    import transformer_engine.pytorch as te

    if recipe not in recipes():
        pytest.skip(f"{recipe} does not run on this device")
    torch.manual_seed(0)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device="cuda")
    weight = layer.weight.detach().clone().requires_grad_()
    quantizer = Quantizer(Fp8Config(recipe=recipe, backend="emulate"), weight.device)  # type: ignore[arg-type]
    for _ in range(3):
        x, gradient = draw(TOKENS, INPUTS), draw(TOKENS, OUTPUTS) * 1e-3
        theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.weight.grad = weight.grad = None
        with te.fp8_autocast(enabled=True, fp8_recipe=recipes()[recipe]):
            y_theirs = layer(theirs)
        y_theirs.backward(gradient)
        y_ours = linear(ours, weight, quantizer)
        y_ours.backward(gradient)
        if recipe == "delayed":
            _move_scales(quantizer)
        for a, b in ((y_ours, y_theirs), (ours.grad, theirs.grad), (weight.grad, layer.weight.grad)):
            assert a is not None and b is not None
            assert float((a - b).float().norm() / b.float().norm()) < 5e-3


def _move_scales(quantizer: Quantizer) -> None:
    """As the model does after a micro-batch, for one layer."""
    for at, fmt in enumerate((E4M3, E4M3, E5M2)):
        history = quantizer.amax_history[:, at]
        quantizer.scales[at] = numerics.delayed_scale(history, quantizer.scales[at], fmt, 0, "max")
    quantizer.amax_history.copy_(numerics.rolled(quantizer.amax_history))
