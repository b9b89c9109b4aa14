"""What the machine is. Only this package knows whether there is a GPU; everything else asks here or takes a device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = [
    "activate",
    "as_seen_on",
    "backend",
    "compute_capability",
    "device",
    "device_count",
    "has_cuda",
    "peak_flops_per_s",
    "peak_memory_bytes",
    "spec_backend",
]


_ELSEWHERE: list[tuple[int, int] | None] = []


@contextlib.contextmanager
def as_seen_on(capability: tuple[int, int] | None) -> Iterator[None]:
    """For checks of a configuration that runs on other machines: with a GPU of this compute capability, None: without
    one. Nothing may be computed meanwhile.
    """
    _ELSEWHERE.append(capability)
    try:
        yield
    finally:
        _ELSEWHERE.pop()


def has_cuda() -> bool:
    import torch

    return _ELSEWHERE[-1] is not None if _ELSEWHERE else torch.cuda.is_available()


def activate() -> None:
    """Make Megatron-Core run on this machine. Call it before the first tensor; repeated calls do nothing.

    With a CUDA device it does nothing. Without one it installs the CPU redirect (see `platform.cpu`).
    Raises RuntimeError when Megatron-Core was imported with Transformer Engine on a machine without CUDA.
    """
    if not has_cuda():
        from drpo_megatron.platform import cpu

        cpu.activate()


def device() -> torch.device:
    """The device of this process: `cuda:LOCAL_RANK`, or `cpu`."""
    import torch

    if has_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def device_count() -> int:
    """CUDA devices that this process may use."""
    import torch

    return torch.cuda.device_count()


def backend() -> Literal["nccl", "gloo"]:
    """The torch.distributed backend of the model-parallel groups."""
    return "nccl" if has_cuda() else "gloo"


def compute_capability() -> tuple[int, int] | None:
    """Of this process's device, as (9, 0) for an H100; None without a CUDA device."""
    import torch

    if _ELSEWHERE:
        return _ELSEWHERE[-1]
    return torch.cuda.get_device_capability() if has_cuda() else None


def spec_backend() -> Literal["transformer_engine", "local"]:
    """Which layer specs to build: Transformer Engine's where it is importable and there is a CUDA device, else ours."""
    if has_cuda() and importlib.util.find_spec("transformer_engine") is not None:
        return "transformer_engine"
    return "local"


def peak_memory_bytes() -> int:
    """Highest memory use of this process so far, bytes: allocated device memory, or resident memory on CPU."""
    import torch

    if has_cuda():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Dense bf16 matrix products without sparsity, FLOP/s, from NVIDIA's data sheets. Longer names first: H200 before H20.
PEAK_FLOPS_PER_S = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12}


def peak_flops_per_s() -> float | None:
    """Highest bf16 rate of this process's device, FLOP/s; None where it is not known, as on a CPU."""
    import torch

    if not has_cuda():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for model, rate in PEAK_FLOPS_PER_S.items() if model in name), None)
