"""Which devices a server is started on, and with what, as a machine with GPUs would start it."""

from __future__ import annotations

import pytest

from drpo_megatron import platform
from drpo_megatron.platform.sglang import sglang_launch_command

SAVER = "--enable-memory-saver"


@pytest.mark.parametrize(
    ("colocated", "index", "devices", "visible", "expected"),
    [
        # four trainer ranks: the servers are behind them, or on the first of them
        (False, 0, None, None, "4,5"),
        (False, 1, None, None, "6,7"),
        (True, 0, None, None, "0,1"),
        (True, 1, None, None, "2,3"),
        (False, 0, [6, 7], None, "6,7"),
        (True, 1, [0, 1, 3, 2], None, "3,2"),
        # devices are counted among those that the job may use
        (False, 0, None, "8,9,10,11,12,13", "12,13"),
        (True, 1, None, "8,9,10,11,12,13", "10,11"),
    ],
)
def test_devices(
    colocated: bool,
    index: int,
    devices: list[int] | None,
    visible: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(platform, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    arguments = ["--mem-fraction-static", "0.7"]
    command, environment = sglang_launch_command(
        arguments, tensor_parallel=2, threads=1, devices=devices, index=index, colocated=colocated
    )
    assert environment["CUDA_VISIBLE_DEVICES"] == expected
    assert command[1:5] == ["-m", "sglang.launch_server", *arguments], "the share of memory stays the user's"
    assert command[5:] == ([SAVER] if colocated else [])


def test_a_host_with_too_few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(platform, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="CUDA devices 8, 9 of a host with 8: leave it some"):
        sglang_launch_command([], tensor_parallel=2, threads=1, devices=None)


def test_without_cuda_there_is_no_memory_saver() -> None:
    apart, together = (
        sglang_launch_command([], tensor_parallel=1, threads=1, devices=None, colocated=c) for c in (False, True)
    )
    assert apart == together and SAVER not in apart[0]


def test_the_memory_saver_is_an_argument_of_the_installed_sglang() -> None:
    from drpo_megatron.rollout.server_args import installed_arguments

    assert installed_arguments()["enable_memory_saver"] == SAVER
