"""Flattened buckets against SGLang's own reader."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drpo_megatron.sync.buckets import Bucket, FlatBuffers, make_buckets

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tensor_bucket() -> ModuleType:
    """SGLang's bucket module, from its file: importing the package takes seconds."""
    package = importlib.util.find_spec("sglang")
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent / "srt" / "weight_sync" / "tensor_bucket.py"
    spec = importlib.util.spec_from_file_location("sglang_tensor_bucket", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stream() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("a", torch.randn(7, 3)),
        ("b", torch.randn(5).bfloat16()),
        ("c", torch.randn(3, 4).bfloat16()),
        ("transposed", torch.randn(6, 4).t()),
        ("scalar", torch.randn(())),
        ("bytes", torch.arange(9, dtype=torch.uint8)),
        ("d", torch.randn(1000)),
        ("e", torch.randn(2, 2)),
    ]


@pytest.mark.parametrize("max_bytes", [1, 64, 100, 4096, 10**9])
def test_sglang_reconstructs_what_was_flattened(tensor_bucket: ModuleType, max_bytes: int) -> None:
    sent = stream()
    received = []
    for bucket in make_buckets(sent, max_bytes):
        reader = tensor_bucket.FlattenedTensorBucket.empty(bucket.names, bucket.dtypes, bucket.shapes, CPU)
        flat = bucket.flatten(CPU)
        assert flat.dtype == torch.uint8 and flat.numel() == reader.get_flattened_tensor().numel() == bucket.nbytes
        reader.get_flattened_tensor().copy_(flat)
        received.extend(reader.reconstruct_tensors())
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (_, mine), (_, theirs) in zip(sent, received, strict=True):
        assert theirs.dtype == mine.dtype and theirs.shape == mine.shape
        assert torch.equal(theirs, mine)


def test_the_bytes_are_those_of_sglangs_writer(tensor_bucket: ModuleType) -> None:
    named = [("a", torch.randn(7, 3)), ("b", torch.randn(2))]
    (bucket,) = make_buckets(named, 10**6)
    theirs = tensor_bucket.FlattenedTensorBucket(named_tensors=named).get_flattened_tensor()
    assert torch.equal(bucket.flatten(CPU), theirs)


def test_buckets_respect_the_limit_and_hold_one_dtype() -> None:
    buckets = list(make_buckets(stream(), 100))
    assert len(buckets) > 3
    for bucket in buckets:
        assert bucket.nbytes <= 100 or len(bucket.tensors) == 1
        assert len(set(bucket.dtypes)) == 1
    assert [bucket.names for bucket in buckets if bucket.nbytes > 100] == [["d"]]


def test_a_bucket_is_free_of_the_tensors_it_came_from() -> None:
    source = torch.ones(4)
    (bucket,) = make_buckets([("a", source)], 100)
    flat = bucket.flatten(CPU)
    source.zero_()
    assert torch.equal(flat.view(torch.float32), torch.ones(4))


def test_the_stream_is_not_read_ahead_of_the_bucket() -> None:
    taken = []

    def produce():
        for i in range(6):
            taken.append(i)
            yield str(i), torch.zeros(10)

    buckets = make_buckets(produce(), 80)
    next(buckets)
    assert taken == [0, 1, 2]


@pytest.mark.parametrize(
    ("named", "max_bytes", "message"),
    [
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], 100, "comes twice"),
        ([("a", torch.zeros(0))], 100, "no elements"),
        ([("a", torch.zeros(1))], 0, "bucket_mb"),
    ],
)
def test_refusals(named: list[tuple[str, torch.Tensor]], max_bytes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(make_buckets(named, max_bytes))


def test_two_buffers_in_turn() -> None:
    """A bucket's bytes stand until the next but one is written; memory is taken only for a larger one."""
    made: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    flats = FlatBuffers(allocate)
    buckets = [Bucket([f"w{n}"], [torch.full((n,), float(n))]) for n in (3, 4, 2, 5)]
    written = [flats.fill(bucket) for bucket in buckets[:2]]
    assert [torch.equal(f, b.flatten(CPU)) for f, b in zip(written, buckets, strict=False)] == [True, True]
    third = flats.fill(buckets[2])
    assert torch.equal(written[1], buckets[1].flatten(CPU)) and torch.equal(third, buckets[2].flatten(CPU))
    assert third.data_ptr() == written[0].data_ptr() and made == [12, 16]
    assert torch.equal(flats.fill(buckets[3]), buckets[3].flatten(CPU)) and made == [12, 16, 20]
