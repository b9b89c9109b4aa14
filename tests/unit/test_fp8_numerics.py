"""FP8 numbers against a reference without FP8 types: a table of each format's 256 codes, and numpy.

The reference follows Transformer Engine's kernels value by value, in float64 where they are exact and in numpy's
float32 where they round.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from drpo_megatron.fp8 import numerics
from drpo_megatron.fp8.numerics import E4M3, E5M2, Format, Quantized

FORMATS = [E4M3, E5M2]
FLOAT32_MAX = np.finfo(np.float32).max


def decode(code: int, fmt: Format) -> float:
    """The value of a code, from the definition of the formats (OFP8, revision 1.0)."""
    mantissa_bits, bias = (3, 7) if fmt is E4M3 else (2, 15)
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if fmt is E4M3 and code & 0x7F == 0x7F:
        return math.nan
    if fmt is E5M2 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


TABLES = {fmt.name: [decode(code, fmt) for code in range(256)] for fmt in FORMATS}


def nearest_codes(values: np.ndarray, fmt: Format) -> np.ndarray:
    """The codes of the nearest finite values, of two equally near ones the even code; None for NaN. Infinity is cut.

    values: float32, any shape. Distances to the two neighbours are exact in float64.
    """
    positive = np.array([v for v in TABLES[fmt.name][:128] if math.isfinite(v)])
    sizes = np.minimum(np.nan_to_num(np.abs(values.astype(np.float64)), posinf=positive[-1]), positive[-1])
    distances = np.abs(sizes[..., None] - positive)
    nearest = np.argmax(distances == distances.min(axis=-1, keepdims=True), axis=-1)
    above = np.minimum(nearest + 1, len(positive) - 1)
    tie = np.take_along_axis(distances, nearest[..., None], -1) == np.take_along_axis(distances, above[..., None], -1)
    codes = np.where(tie[..., 0] & (nearest % 2 == 1), above, nearest) + np.where(np.signbit(values), 0x80, 0)
    return np.where(np.isnan(values), None, codes.astype(object))


RECIPES = ["tensorwise", "1x128", "128x128", "1x128 float32", "128x128 float32", "mxfp8"]


def f32(value: float) -> np.float32:
    with np.errstate(over="ignore"):
        return np.float32(value)


def float_scale(amax: np.float32, fmt: Format) -> np.float32:
    if amax == 0 or np.isinf(amax):
        return f32(1)
    with np.errstate(over="ignore"):
        scale = f32(fmt.largest) / amax
    return min(scale, FLOAT32_MAX)


def power_scale(amax: np.float32, fmt: Format) -> np.float32:
    return f32(2.0 ** math.floor(math.log2(float_scale(amax, fmt))))


def mx_exponent(amax: np.float32, fmt: Format) -> int:
    """The smallest e from -127 to 127 with 2^e >= amax · (1 / largest)."""
    quotient = float(amax * f32(1 / fmt.largest))
    return next((e for e in range(-127, 128) if 2.0**e >= quotient), 127)


def reference(x: np.ndarray, fmt: Format, recipe: str) -> tuple[list[int | None], np.ndarray]:
    """(codes in row order, None for NaN; the dequantization scale of every value)."""
    rows, columns = {
        "tensorwise": x.shape,
        "1x128": (1, 128),
        "128x128": (128, 128),
        "1x128 float32": (1, 128),
        "128x128 float32": (128, 128),
        "mxfp8": (1, 32),
    }[recipe]
    codes = np.empty(x.shape, dtype=object)
    scales = np.empty(x.shape, dtype=np.float32)
    for r, c in itertools.product(range(0, x.shape[0], rows), range(0, x.shape[1], columns)):
        at = np.s_[r : r + rows, c : c + columns]
        finite = [abs(v) for v in x[at].flatten() if not np.isnan(v)]
        amax = max(finite, default=f32(0))
        if recipe == "mxfp8":
            exponent = mx_exponent(amax, fmt)
            scale, scales[at] = f32(2.0**-exponent), f32(2.0**exponent)
        else:
            scale = (power_scale if recipe in ("1x128", "128x128") else float_scale)(amax, fmt)
            scales[at] = f32(1) / scale
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = x[at] * scale
        codes[at] = nearest_codes(scaled, fmt)
    return list(codes.flatten()), scales


def quantize(x: torch.Tensor, fmt: Format, recipe: str) -> Quantized:
    match recipe:
        case "tensorwise":
            return numerics.tensorwise(x, fmt)
        case "mxfp8":
            return numerics.mxfp8(x, fmt)
        case _:
            block = (1 if recipe.startswith("1x128") else 128, 128)
            return numerics.blockwise(x, fmt, block, power_of_two="float32" not in recipe)


def codes_of(values: torch.Tensor) -> list[int | None]:
    codes, nan = values.view(torch.uint8).flatten().tolist(), values.float().isnan().flatten().tolist()
    return [None if is_nan else code for code, is_nan in zip(codes, nan, strict=True)]


def spread(quantized: Quantized) -> np.ndarray:
    rows, columns = quantized.block
    all_rows = np.repeat(quantized.scales.numpy(), rows, 0)[: quantized.values.shape[0]]
    return np.repeat(all_rows, columns, 1)[:, : quantized.values.shape[1]]


def every_exponent(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal values times 2^-30 to 2^20, each its own."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-30, 21, (rows, columns), generator=generator)
    return torch.randn(rows, columns, generator=generator) * 2.0**exponents


def cases() -> dict[str, torch.Tensor]:
    largest_subnormals = [2.0**-6 * 0.9999, 2.0**-9, 2.0**-10, 2.0**-10 * 1.0001, 2.0**-14, 2.0**-16, 2.0**-17]
    edges = [0.0, -0.0, 448.0, -448.0, 449.0, 464.0, 464.1, 57344.0, 57345.0, 61440.0, 65536.0, *largest_subnormals]
    outlier = every_exponent(2, 160, 1) * 2.0**-20
    outlier[1, 70] = -3e4
    special = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    special[0, 3], special[1, 40], special[2, 1], special[2, 2] = math.inf, math.nan, -math.inf, math.nan
    blocks = torch.randn(130, 140, generator=torch.Generator().manual_seed(3))
    blocks[:128, :128] = 0
    return {
        "edges": torch.tensor([edges]),
        "each edge alone": torch.tensor(edges)[:, None],
        "float32 subnormals": torch.tensor([[1e-45, -3e-40, 1e-38, 0.0, 7e-39]]),
        # Around 2^-127 and 2^-126, where exponents of E8M0 scales begin.
        "small scales": torch.tensor(
            [[448 * k * 2.0**-149] for k in (1, 0x3FFFFF, 0x400000, 0x400001, 0x800000, 0x800001)]
        ),
        "largest float32": torch.tensor([[FLOAT32_MAX, -1.0, 1e30]]),
        "infinity and NaN": special,
        "only NaN": torch.full((2, 33), math.nan),
        "zeros": torch.zeros(3, 130),
        "a block of zeros": blocks,
        "one outlier": outlier,
        "ragged": every_exponent(131, 137, 4),
        "one column": every_exponent(5, 1, 5),
        "bf16": every_exponent(4, 257, 6).bfloat16(),
    }


CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_bit_is_the_reference(fmt: Format, recipe: str, name: str) -> None:
    x = CASES[name]
    codes, scales = reference(x.float().numpy(), fmt, recipe)
    quantized = quantize(x, fmt, recipe)
    assert quantized.values.dtype is fmt.dtype and quantized.values.shape == x.shape
    assert codes_of(quantized.values) == codes
    np.testing.assert_array_equal(spread(quantized).view(np.int32), scales.view(np.int32))
    table = np.array([math.nan if c is None else TABLES[fmt.name][c] for c in codes], dtype=np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(quantized.dequantize().numpy(), table.reshape(x.shape) * scales)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_all_codes_and_what_lies_between_are_rounded_to_nearest_even(fmt: Format) -> None:
    values = sorted(v for v in TABLES[fmt.name] if math.isfinite(v))
    between = [a + (b - a) * share for a, b in itertools.pairwise(values) for share in (0.25, 0.5, 0.75)]
    x = torch.tensor([values + between])
    quantized = numerics.with_scale(x, fmt, torch.tensor(1.0))
    assert codes_of(quantized.values) == list(nearest_codes(x[0].numpy(), fmt))


def test_a_given_scale_multiplies_and_cuts() -> None:
    scale = torch.tensor(3.7)
    x = torch.tensor([[0.1, 121.0, 121.1, 200.0, -math.inf, math.nan]])
    quantized = numerics.with_scale(x, E4M3, scale)
    assert codes_of(quantized.values) == list(nearest_codes(x[0].numpy() * f32(3.7), E4M3))
    assert float(quantized.scales) == float(f32(1) / f32(3.7))


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_the_delayed_scale_and_its_history_follow_the_kernel(fmt: Format, algorithm: str) -> None:
    """The kernel's loop, in Python, over micro-batches with all kinds of largest values."""
    margin, length = 2, 3
    seen = [3.0, 0.0, 7.5, 1e-40, math.inf, 2.0, 0.25, 0.0, 0.5, 0.125]
    history, scale = [0.0] * length, f32(1)
    history_t, scale_t = torch.zeros(length), torch.tensor(1.0)
    for amax in seen:
        history[0] = amax
        history_t[0] = amax
        last, chosen = history[0], 0.0
        if last != 0:
            shifted = [history[i + 1] if i < length - 1 else last for i in range(length)]
            chosen = max(shifted)
            history = [0.0, *shifted[1:]]
        if algorithm == "most_recent":
            chosen = last
        if math.isfinite(chosen) and chosen > 0:
            with np.errstate(over="ignore"):
                scale = f32(fmt.largest * 2.0**-margin) / f32(chosen)
            scale = min(scale, FLOAT32_MAX)
        scale_t = numerics.delayed_scale(history_t, scale_t, fmt, margin, algorithm)  # type: ignore[arg-type]
        history_t = numerics.rolled(history_t)
        assert float(scale_t) == float(scale), amax
        assert history_t.tolist() == torch.tensor(history).tolist(), amax


def test_health_counts_what_was_cut_and_what_vanished() -> None:
    x = torch.tensor([[1000.0, -464.5, 464.0, 448.0, math.inf, math.nan, 1e-4, -1e-9, 0.0, 1.0]])
    quantized = numerics.with_scale(x, E4M3, torch.tensor(1.0))
    assert numerics.health(x, quantized) == (math.inf, 0.3, 0.2)
    whole = numerics.tensorwise(x[:, 6:], E4M3)
    assert numerics.health(x[:, 6:], whole) == (1.0, 0.0, 0.25)


def test_an_empty_tensor_is_quantized_to_an_empty_one() -> None:
    for recipe in RECIPES:
        quantized = quantize(torch.empty(0, 64), E4M3, recipe)
        assert quantized.dequantize().shape == (0, 64)
    assert numerics.amax(torch.empty(0)) == 0


def test_leading_dimensions_are_rows() -> None:
    x = every_exponent(6, 40, 7)
    flat, deep = numerics.tensorwise(x, E5M2), numerics.tensorwise(x.view(2, 3, 40), E5M2)
    assert torch.equal(flat.dequantize().view(2, 3, 40), deep.dequantize())


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="128"):
        numerics.blockwise(torch.zeros(2, 2), E4M3, (64, 128))
