"""The receiver's base: it follows its own mark only, and a base that is of no use is not followed."""

from __future__ import annotations

import base64
import json
import pickle
import pickletools
from pathlib import Path

import megatron.core
import pytest
import torch

from drpo_megatron.sync.delta import _payload
from drpo_megatron.sync.delta_codec import encode
from drpo_megatron.sync.delta_loader import Base, DamagedDelta, Header, Layout, Mark, Refused

LAYOUT = Layout(("a", "b"), ((3, 5), ()), "bfloat16")
OTHER = Layout(("c",), ((7,),), "float8_e4m3fn")


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator).bfloat16(),
        "b": torch.randn((), generator=generator).bfloat16(),
        "c": torch.randn(7, generator=generator).to(torch.float8_e4m3fn),
    }


def flat(tensors: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1).view(torch.uint8) for name in layout.names])


def whole(path: Path, mark: Mark, after: Mark | None, layout: Layout, tensors: dict[str, torch.Tensor]) -> Path:
    data = flat(tensors, layout)
    path.write_bytes(Header(mark, after, layout).to_bytes() + data.numpy().tobytes())
    return path


def delta(
    path: Path, mark: Mark, after: Mark, layout: Layout, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]
) -> Path:
    encoded = encode(flat(old, layout).numpy(), flat(new, layout).numpy(), layout.item_bytes)
    path.write_bytes(Header(mark, after).to_bytes() + b"".join(encoded.parts))
    return path


def assert_taken(base: Base, path: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors, seconds = base.take(path)
    assert seconds > 0
    for name, tensor in tensors:
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))


def first_push(base: Base, path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert_taken(base, whole(path / "1", Mark("p", 1), None, LAYOUT, tensors), tensors)
    assert_taken(base, whole(path / "2", Mark("p", 2), Mark("p", 1), OTHER, tensors), tensors)


def test_whole_and_then_deltas(tmp_path: Path) -> None:
    base, versions = Base(), [weights(seed) for seed in range(3)]
    first_push(base, tmp_path, versions[0])
    after = Mark("p", 2)
    for push, old, new in zip("qr", versions, versions[1:], strict=False):
        for index, layout in enumerate((LAYOUT, OTHER), start=1):
            mark = Mark(push, index)
            assert_taken(base, delta(tmp_path / f"{push}{index}", mark, after, layout, old, new), new)
            after = mark
        assert base.mark == after


def test_what_does_not_follow_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    base, old, new = Base(), weights(0), weights(1)
    first = delta(tmp_path / "q1", Mark("q", 1), Mark("p", 2), LAYOUT, old, new)
    second = delta(tmp_path / "q2", Mark("q", 2), Mark("q", 1), OTHER, old, new)
    with pytest.raises(Refused, match="this rank has None"):
        base.take(first)
    first_push(base, tmp_path, old)
    with pytest.raises(Refused):
        base.take(second)
    with pytest.raises(Refused):
        base.take(tmp_path / "2")
    assert base.mark == Mark("p", 2)
    assert_taken(base, first, new)
    with pytest.raises(Refused):
        base.take(first)
    assert_taken(base, second, new)


def test_a_damaged_file_leaves_no_base(tmp_path: Path) -> None:
    base, old, new = Base(), weights(0), weights(1)
    first_push(base, tmp_path, old)
    path = delta(tmp_path / "q1", Mark("q", 1), Mark("p", 2), LAYOUT, old, new)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(DamagedDelta):
        base.take(path)
    assert base.mark is None
    path.write_bytes(good)
    with pytest.raises(Refused):
        base.take(path)
    short = whole(tmp_path / "short", Mark("s", 1), None, LAYOUT, old)
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(DamagedDelta, match="does not have the 32 bytes"):
        base.take(short)
    assert base.mark is None
    first_push(base, tmp_path, new)


def test_what_is_no_bucket_is_refused(tmp_path: Path) -> None:
    nonsense = Header(Mark("s", 1), None, Layout(("a",), ((3, 5),), "nonsense")).to_bytes()
    for content in (b"", bytes(8), (2).to_bytes(8, "little") + b"{}", b"\xff" * 16, nonsense):
        (tmp_path / "no").write_bytes(content)
        with pytest.raises(DamagedDelta):
            Base().take(tmp_path / "no")


def test_a_request_names_nothing_that_sglang_refuses_to_unpickle() -> None:
    """In a process that imported Megatron-Core, which changes how the storage of a tensor is pickled."""
    megatron.core  # noqa: B018
    pickled = base64.b64decode(_payload(Path("bucket"), Path("answer")))
    names = [str(argument) for opcode, argument, _ in pickletools.genops(pickled) if "UNICODE" in opcode.name]
    ((request, tensor),) = pickle.loads(pickled)
    assert json.loads(request)["bucket"].endswith("bucket") and tensor.numel() == 0
    assert [name for name in names if name != request] == ["torch", "Tensor"]
