"""FP8 numbers: how a tensor is scaled, rounded and restored under each recipe of Transformer Engine 2.20.

Formulas and special cases are those of its kernels with the recipes' defaults: `compute_scale_from_amax` for tensorwise
(any float32 scale) and blockwise (powers of two, rounded down, or any), `amax_and_scale_update` for delayed,
`float_to_e8m0` for mxfp8. A value is multiplied by its scale in float32 and rounded to the nearest FP8 number, ties to
even; what lies beyond the largest one, infinity included, becomes the largest; NaN stays NaN and never counts as a
largest value. `docs/fp8.md` has it on one page.

Pure functions of torch tensors, on any device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Side of the blocks of `blockwise`."""
MX_BLOCK = 32
"""Length of the blocks of `mxfp8`."""

AmaxAlgorithm = Literal["max", "most_recent"]

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Format:
    """An FP8 format.

    largest: its largest finite value. half_step: half the distance from there to the next smaller one.
    """

    name: str
    dtype: torch.dtype
    largest: float
    half_step: float


E4M3 = Format("e4m3", torch.float8_e4m3fn, largest=448.0, half_step=16.0)
E5M2 = Format("e5m2", torch.float8_e5m2, largest=57344.0, half_step=4096.0)


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor.

    values: FP8, the shape of the tensor. scales: float32 [⌈M / block[0]⌉, ⌈K / block[1]⌉], which a block's values are
    multiplied by to restore them; M × K is the tensor with all dimensions but the last in one. block: rows and columns
    that share a scale.
    """

    values: Tensor
    scales: Tensor
    block: tuple[int, int]

    def dequantize(self) -> Tensor:
        """The values as float32."""
        values_MK = _matrix(_restored(self.values))
        return (values_MK * _spread(self.scales, self.block, values_MK)).reshape(self.values.shape)


class Health(NamedTuple):
    """How well a format holds a tensor.

    amax: largest absolute value. saturated: share of values that were cut, by more than rounding. underflow: share of
    values that are not zero and became zero.
    """

    amax: float
    saturated: float
    underflow: float


def amax(x: Tensor) -> Tensor:
    """The largest absolute value, float32 scalar; 0 of an empty tensor. NaNs are passed over, infinity is not."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    return _magnitudes(x).amax()


def tensorwise(x: Tensor, fmt: Format) -> Quantized:
    """Current scaling: the tensor's largest value becomes the format's. Scales are any float32, Transformer Engine's
    default.

    The scale is 1 where the largest value is 0 or infinite.
    """
    return with_scale(x, fmt, _scale_of(amax(x), fmt))


def with_scale(x: Tensor, fmt: Format, scale: Tensor) -> Quantized:
    """`x` times `scale`, a float32 scalar as `delayed_scale` gives it, in `fmt`."""
    columns = x.shape[-1]
    block = (x.numel() // max(columns, 1), columns)
    return Quantized(_cast(x.float() * scale, fmt), scale.reciprocal().reshape(1, 1), block)


def delayed_scale(
    amax_history: Tensor, previous_scale: Tensor, fmt: Format, margin: int, algorithm: AmaxAlgorithm
) -> Tensor:
    """The scale of the next micro-batch: largest / (2^margin · amax), float32.

    amax_history: float32 [length, ...], the newest first. max: amax is the history's largest; most_recent: its first.
    The scale stays `previous_scale` where the newest is 0, because the tensor was not seen, and where amax is not
    finite.
    """
    newest = amax_history[0]
    chosen = amax_history.amax(dim=0) if algorithm == "max" else newest
    scale = _quotient(fmt.largest * 2.0**-margin, chosen)
    return torch.where((newest != 0) & chosen.isfinite() & (chosen > 0), scale, previous_scale)


def rolled(amax_history: Tensor) -> Tensor:
    """The history with its first place free (0) for the next micro-batch; the oldest value makes room. It stays as it
    is where the newest is 0. The places behind the first are a ring: the newest goes to the last.
    """
    moved = torch.roll(amax_history, -1, dims=0)
    moved[0] = 0
    return torch.where(amax_history[0] != 0, moved, amax_history)


def blockwise(x_MK: Tensor, fmt: Format, block: tuple[int, int], *, power_of_two: bool = True) -> Quantized:
    """One scale for each block of 1 × 128 or 128 × 128; blocks at the edge are smaller.

    power_of_two: Transformer Engine's default, the largest power that keeps the block in range; otherwise the block's
    largest value becomes the format's. 1 for blocks whose largest value is 0 or infinite. Raises ValueError for another
    block.
    """
    if block not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"the blocks are 1 × {BLOCK} or {BLOCK} × {BLOCK}, not {block[0]} × {block[1]}")
    scales = _scale_of(_block_amax(x_MK, block), fmt)
    if power_of_two:
        scales = _power_of_two(scales)
    return Quantized(_cast(x_MK.float() * _spread(scales, block, x_MK), fmt), scales.reciprocal(), block)


def mxfp8(x_MK: Tensor, fmt: Format) -> Quantized:
    """One scale for each block of 1 × 32, E8M0: the power of two at or above amax / largest, from 2^-127 to 2^127.

    The quotient is the float32 product with 1 / largest. A block of zeros has 2^-127, one with an infinity 2^127.
    """
    block = (1, MX_BLOCK)
    exponents = _e8m0(_block_amax(x_MK, block) * torch.tensor(1 / fmt.largest, dtype=torch.float32))
    # 2^-127 is a subnormal float32, so it is not made by shifting; 254 - 254 is its exponent too.
    scaled = _cast(x_MK.float() * _spread(_power(254 - exponents), block, x_MK), fmt)
    return Quantized(scaled, _power(exponents), block)


def health(x: Tensor, quantized: Quantized) -> Health:
    """What quantization did to `x`. Waits for the device."""
    fmt = E4M3 if quantized.values.dtype == E4M3.dtype else E5M2
    x_MK = _matrix(x.float())
    limit = (fmt.largest + fmt.half_step) * _spread(quantized.scales, quantized.block, x_MK)
    count = max(x.numel(), 1)
    saturated = int((x_MK.abs() > limit).sum())
    underflow = int(((x != 0) & (quantized.values.float() == 0)).sum())
    return Health(float(amax(x)), saturated / count, underflow / count)


def _restored(values: Tensor) -> Tensor:
    """FP8 as float32. On a CPU torch computes each number, which takes four times as long as to look it up."""
    if values.device.type != "cpu":
        return values.float()
    flat = values.contiguous().view(torch.uint8).view(-1)
    return _numbers(values.dtype).index_select(0, flat.int()).view(values.shape)


@functools.cache
def _numbers(dtype: torch.dtype) -> Tensor:
    """All FP8 numbers by their bits, float32 [256]."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _magnitudes(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.float().abs(), nan=0.0, posinf=torch.inf)


def _quotient(value: float, amax: Tensor) -> Tensor:
    """value / amax, the largest float32 where that overflows."""
    # torch computes `value / amax` as value · (1 / amax), which is rounded twice.
    return torch.div(torch.full_like(amax, value), amax).clamp(max=_LARGEST_FLOAT32)


def _scale_of(amax: Tensor, fmt: Format) -> Tensor:
    """largest / amax; 1 where amax is 0 or infinite."""
    scale = _quotient(fmt.largest, amax)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def _power_of_two(scale: Tensor) -> Tensor:
    """Rounded down: the mantissa's bits are dropped."""
    return (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)


def _e8m0(quotient: Tensor) -> Tensor:
    """Biased exponents, int32 from 0 to 254, of the powers of two at or above `quotient`."""
    bits = quotient.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # With exponent 0 the value is subnormal, and 2^-127 is 0x400000.
    up = (mantissa > 0) & ((exponent > 0) | (mantissa > 0x400000))
    return (exponent + up).clamp(max=254)


def _power(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) as float32, exactly."""
    return torch.where(exponent == 0, 0x400000, exponent << 23).to(torch.int32).view(torch.float32)


def _cast(scaled: Tensor, fmt: Format) -> Tensor:
    # torch's cast to e4m3 gives NaN and its cast to e5m2 infinity where Transformer Engine's saturates.
    return scaled.clamp(-fmt.largest, fmt.largest).to(fmt.dtype)


def _block_amax(x_MK: Tensor, block: tuple[int, int]) -> Tensor:
    """[⌈M / block[0]⌉, ⌈K / block[1]⌉]."""
    rows, columns = x_MK.shape
    up, across = -(-rows // block[0]), -(-columns // block[1])
    padded = F.pad(_magnitudes(x_MK), (0, across * block[1] - columns, 0, up * block[0] - rows))
    return padded.view(up, block[0], across, block[1]).amax(dim=(1, 3))


def _spread(scales: Tensor, block: tuple[int, int], like_MK: Tensor) -> Tensor:
    """Scales of blocks in a shape that broadcasts over [M, K]."""
    rows, columns = like_MK.shape
    if block[0] > 1 and scales.shape[0] > 1:
        scales = scales.repeat_interleave(block[0], 0)[:rows]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(block[1], 1)[:, :columns]
    return scales
