"""The delta codec: any bit patterns come back, and sizes are what the number of changes calls for."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from drpo_megatron.sync import delta_codec
from drpo_megatron.sync.delta_codec import DamagedDelta, Encoded, coding_seconds, decode, encode

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64]


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def round_trip(base: np.ndarray, new: np.ndarray, item_bytes: int, worth: float = float("inf")) -> Encoded:
    """Compared with the bytes themselves, and nothing but `base` and the encoded bytes takes part."""
    kept, expected = base.copy(), new.tobytes()
    encoded = encode(base, new, item_bytes, worth)
    np.testing.assert_array_equal(base, kept)
    sent = b"".join(encoded.parts)
    assert len(sent) == encoded.nbytes
    decode(sent, kept, item_bytes)
    assert kept.tobytes() == expected
    return encoded


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("worth", [0.0, 0.3, float("inf")])
def test_random_bits_of_any_size(dtype: torch.dtype, worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bit patterns occur; sizes lie around those of words and blocks; changes are none, few, many and all."""
    monkeypatch.setattr(delta_codec, "BLOCK_BYTES", 64)
    random = np.random.default_rng(dtype.itemsize)
    for elements in (1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 64, 65, 127, 129, 500):
        for share in (0.0, 0.01, 0.1, 0.5, 1.0):
            base = random.integers(0, 256, elements * dtype.itemsize, dtype=np.uint8)
            new = base.copy()
            changed = random.random(elements) < share
            new.reshape(elements, -1)[changed] = random.integers(0, 256, (int(changed.sum()), dtype.itemsize))
            round_trip(base, new, dtype.itemsize, worth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str)
def test_values_that_compare_strangely(dtype: torch.dtype) -> None:
    """NaNs with payloads, both zeros, infinities and the smallest numbers, each turned into each."""
    bits = 8 * dtype.itemsize
    integer = {8: torch.uint8, 16: torch.int16, 32: torch.int32}[bits]
    infinity = torch.tensor(float("inf"), dtype=dtype).view(integer).item()
    sign = -(1 << (bits - 1)) if bits > 8 else 1 << 7
    patterns = [0, 1, 2, infinity, infinity + 1, infinity + 3]
    values = torch.tensor([p + s for p in patterns for s in (0, sign)], dtype=integer).view(dtype)
    assert int(values.isnan().sum()) == 4 and int((values == 0).sum()) == 2
    base, new = values.repeat_interleave(len(values)), values.repeat(len(values))
    round_trip(as_bytes(base), as_bytes(new), dtype.itemsize)


def test_blocks_of_the_true_size() -> None:
    random = np.random.default_rng(0)
    elements = (2 * delta_codec.BLOCK_BYTES + 6) // 2
    base = random.integers(0, 256, 2 * elements, dtype=np.uint8)
    new = base.copy()
    new.view("<u2")[[0, elements // 2, elements - 1]] ^= 1  # the second is the only one of its block
    assert round_trip(base, new, 2).blocks == 3
    assert round_trip(base, new, 2).nbytes < 200


@pytest.mark.parametrize(("density", "entropy"), [(0.01, 0.0808), (0.03, 0.1944), (0.2, 0.7219)])
def test_sizes_near_the_entropy_of_the_positions(density: float, entropy: float) -> None:
    """The lowest bit of a share of the elements: no code takes fewer than `entropy` bits an element."""
    random = np.random.default_rng(1)
    base = random.integers(0, 256, 2 * 2**20, dtype=np.uint8)
    new = base.copy()
    new.view("<u2")[random.random(2**20) < density] ^= 1
    bits = 8 * round_trip(base, new, 2).nbytes / 2**20
    assert 0.98 * entropy < bits < 1.4 * entropy


def test_real_steps_of_fp32_main_weights() -> None:
    """A step of 1e-6 on weights of a usual size: what bf16 keeps of it changes in about the share that rounding has."""
    torch.manual_seed(0)
    weights = 0.04 * torch.randn(2**21)
    base = as_bytes(weights.bfloat16())
    new = as_bytes((weights + 1e-6 * torch.randn(2**21).sign()).bfloat16())
    encoded = round_trip(base, new, 2)
    assert encoded.whole == 0 and encoded.nbytes < 0.03 * new.size


def test_what_does_not_pay_goes_whole() -> None:
    random = np.random.default_rng(2)
    base, new = (random.integers(0, 256, 2**16, dtype=np.uint8) for _ in range(2))
    everything = round_trip(base, new, 4)
    assert (everything.blocks, everything.whole) == (1, 1), "noise does not compress"
    assert new.size < everything.nbytes < new.size + 16
    new = base.copy()
    new.view("<u4")[::10] ^= 1
    # a tenth of the elements, 7 bytes of distance and change each, is 0.175 of the bytes
    assert round_trip(base, new, 4, worth=0.18).whole == 0
    assert round_trip(base, new, 4, worth=0.17).whole == 1


def test_every_damage_is_found() -> None:
    """A flipped bit anywhere in the compressed bytes, and bytes too few or too many."""
    random = np.random.default_rng(3)
    base = random.integers(0, 256, 4096, dtype=np.uint8)
    new = base.copy()
    new.view("<u2")[::37] ^= 3
    sent = b"".join(encode(base, new, 2).parts)
    for at in range(len(sent)):
        damaged = bytearray(sent)
        damaged[at] ^= 1 << at % 8
        target = base.copy()
        try:
            decode(bytes(damaged), target, 2)
        except DamagedDelta:
            continue
        # Zstandard has bits without a meaning in the heads of its frames
        assert target.tobytes() == new.tobytes(), f"a flipped bit in byte {at} was taken"
    for wrong in (sent[:-1], sent + b"\0", sent + sent, b""):
        with pytest.raises(DamagedDelta):
            decode(wrong, base.copy(), 2)


def test_a_change_behind_the_end_is_refused() -> None:
    base = np.zeros(64, np.uint8)
    new = base.copy()
    new[-1] = 1
    sent = b"".join(encode(base, new, 1).parts)
    with pytest.raises(DamagedDelta, match="element 63 of 32"):
        decode(sent, base[:32].copy(), 1)
    with pytest.raises(DamagedDelta, match="can need"):
        decode(b"".join(encode(base, base + np.uint8(1), 1).parts), base[:32].copy(), 1)


def test_a_wrong_kind_of_block_is_refused() -> None:
    with pytest.raises(DamagedDelta, match="no block that is known"):
        decode(struct.pack("<BI", 7, 0), np.zeros(8, np.uint8), 1)
    with pytest.raises(DamagedDelta, match="came with 4"):
        decode(struct.pack("<BI", 1, 4) + bytes(4), np.zeros(8, np.uint8), 1)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="8 bytes against 4"):
        encode(np.zeros(4, np.uint8), np.zeros(8, np.uint8), 4)
    with pytest.raises(ValueError, match="elements of 4"):
        encode(np.zeros(6, np.uint8), np.zeros(6, np.uint8), 4)


def test_coding_takes_time() -> None:
    assert 1e-11 < coding_seconds() < 1e-4
