"""The emulated linear layer against its three products written out from `fp8.numerics`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from drpo_megatron import platform

platform.activate()

from megatron.core.tensor_parallel import random as checkpointing  # noqa: E402

from drpo_megatron.config.schema import Fp8Config  # noqa: E402
from drpo_megatron.fp8 import numerics  # noqa: E402
from drpo_megatron.fp8.emulation import Quantizer, linear  # noqa: E402
from drpo_megatron.fp8.numerics import E4M3, E5M2, Format  # noqa: E402

RECIPES = ["delayed", "tensorwise", "blockwise", "blockwise float32", "mxfp8"]
# Neither tokens nor features are a multiple of a block.
TOKENS, INPUTS, OUTPUTS = 150, 200, 140


def quantizer(recipe: str, **settings: object) -> Quantizer:
    if recipe == "blockwise float32":
        recipe, settings = "blockwise", settings | {"block_scales": "float32"}
    fp8 = Fp8Config.model_validate({"recipe": recipe, "backend": "emulate", **settings})
    return Quantizer(fp8, torch.device("cpu"))


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight, gradient of the output; rows and columns of very different size."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int, size: float) -> Tensor:
        of_rows = 2.0 ** torch.randint(-6, 6, (rows, 1), generator=generator)
        of_columns = 2.0 ** torch.randint(-6, 6, (1, columns), generator=generator)
        return (torch.randn(rows, columns, generator=generator) * of_rows * of_columns * size).to(dtype)

    return draw(TOKENS, INPUTS, 1.0), draw(OUTPUTS, INPUTS, 0.02), draw(TOKENS, OUTPUTS, 1e-3)


def reference(recipe: str, fmt: Format) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(along the columns, along the rows): dequantized [M, K] of a tensor [M, K] and whether it is a weight."""

    def columns(x: Tensor, is_weight: bool = False) -> Tensor:
        match recipe:
            case "delayed":
                return numerics.with_scale(x, fmt, torch.tensor(1.0)).dequantize()
            case "tensorwise":
                return numerics.tensorwise(x, fmt).dequantize()
            case "blockwise" | "blockwise float32":
                block = (128, 128) if is_weight else (1, 128)
                return numerics.blockwise(x, fmt, block, power_of_two=recipe == "blockwise").dequantize()
        return numerics.mxfp8(x, fmt).dequantize()

    return columns, lambda x, is_weight=False: columns(x.t().contiguous(), is_weight).t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fmt", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_three_products_have_the_operands_of_transformer_engine(recipe: str, fmt: str, dtype: torch.dtype) -> None:
    x, weight, gradient = tensors(dtype)
    x.requires_grad_()
    weight.requires_grad_()
    y = linear(x.view(3, 50, INPUTS), weight, quantizer(recipe, format=fmt))
    y.backward(gradient.view(3, 50, OUTPUTS))

    columns, rows = reference(recipe, E4M3)
    g_columns, g_rows = reference(recipe, E5M2 if fmt == "hybrid" else E4M3)
    x, weight = x.detach(), weight.detach()
    expected = (columns(x) @ columns(weight, True).t()).to(dtype)
    assert y.dtype is dtype and torch.equal(y.detach().view(TOKENS, OUTPUTS), expected)
    (x_grad, w_grad), like = _leaf_gradients(recipe, fmt, dtype), dtype
    assert torch.equal(x_grad, (g_columns(gradient) @ rows(weight, True)).to(like))
    assert torch.equal(w_grad, (g_rows(gradient).t() @ rows(x)).to(like))
    # They are not those of unquantized operands.
    assert not torch.equal(w_grad, (gradient.float().t() @ x.float()).to(like))


def _leaf_gradients(recipe: str, fmt: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, weight, gradient = tensors(dtype)
    x.requires_grad_()
    weight.requires_grad_()
    linear(x, weight, quantizer(recipe, format=fmt)).backward(gradient)
    assert x.grad is not None and weight.grad is not None
    return x.grad, weight.grad


def test_the_bias_is_not_quantized() -> None:
    x, weight, _ = tensors()
    bias = torch.randn(OUTPUTS)
    plain = linear(x, weight, quantizer("tensorwise"))
    assert torch.equal(linear(x, weight, quantizer("tensorwise"), bias), plain + bias)


def test_an_expert_without_tokens() -> None:
    for recipe in RECIPES:
        x, weight = torch.empty(0, INPUTS, requires_grad=True), torch.randn(OUTPUTS, INPUTS, requires_grad=True)
        linear(x, weight, quantizer(recipe)).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert weight.grad is not None and not weight.grad.any()


def test_largest_values_are_recorded_in_training_only() -> None:
    x, weight, gradient = tensors()
    weight.requires_grad_()
    used = quantizer("delayed", amax_history=4)
    with torch.no_grad():
        linear(x, weight, used)
    assert not used.amax_history.any()
    linear(x, weight, used).backward(gradient)
    largest = [float(t.abs().max()) for t in (x, weight.detach(), gradient)]
    assert used.amax_history[0].tolist() == largest and not used.amax_history[1:].any()


@pytest.fixture
def mark() -> Iterator[Callable[[bool], None]]:
    """Say that Megatron computes activations to forget, or computes them again."""

    def change(on: bool) -> None:
        (checkpointing._set_checkpointing if on else checkpointing._unset_checkpointing)()

    yield change
    change(False)


def test_a_recomputed_forward_has_its_own_scales_and_is_not_recorded(mark: Callable[[bool], None]) -> None:
    x, weight, _ = tensors()
    used = quantizer("delayed", amax_history=4)
    mark(True)
    firsts = []
    for scale in (8.0, 0.5):  # two micro-batches go forward before the first goes back
        used.scales.fill_(scale)
        with torch.no_grad():
            firsts.append(linear(x, weight, used))
    used.trains = False
    with torch.no_grad():
        linear(x, weight, used)  # an evaluation in between is never computed again
    used.trains = True
    used.scales.fill_(1.0)
    used.amax_history.zero_()
    again = [linear(x, weight, used) for _ in firsts]
    assert not torch.equal(*firsts)
    assert all(torch.equal(a, b) for a, b in zip(firsts, again, strict=True))
    assert not used.amax_history.any()


def test_the_observer_sees_every_operand_once() -> None:
    x, weight, gradient = tensors()
    weight.requires_grad_()
    used = quantizer("mxfp8")
    seen = []
    used.observer = lambda role, tensor, quantized: seen.append((role, tensor, quantized.dequantize()))
    linear(x, weight, used).backward(gradient)
    assert [role for role, _, _ in seen] == ["input", "weight", "gradient"]
    for (_, tensor, restored), expected in zip(seen, (x, weight, gradient), strict=True):
        assert torch.equal(tensor, expected) and torch.equal(restored, numerics.mxfp8(expected, E4M3).dequantize())


@pytest.mark.parametrize("length", [2, 4, 6])
def test_delayed_scales_go_through_a_checkpoint(length: int) -> None:
    used = quantizer("delayed", amax_history=4)
    used.scales.copy_(torch.tensor([1.0, 2.0, 3.0]))
    used.amax_history.copy_(torch.arange(12.0).view(4, 3))
    used.amax_history[0] = 0
    state = used.state()
    used.scales.fill_(7.0)  # the copy does not change with the run
    loaded = quantizer("delayed", amax_history=length)
    loaded.load_state(state)
    assert loaded.scales.tolist() == [1.0, 2.0, 3.0]
    newest_last = [[0.0] * 3] * 3 + [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]
    assert loaded.amax_history.tolist() == [[0.0] * 3, *newest_last[-(length - 1) :]]
    loaded.load_state(None)
    assert loaded.scales.tolist() == [1.0, 2.0, 3.0]
    assert quantizer("blockwise").state() is None
