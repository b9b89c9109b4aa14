"""The devices a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from drpo_megatron.platform import PEAK_FLOPS_PER_S


@dataclass(frozen=True)
class Device:
    """One GPU in a node of eight, from NVIDIA's data sheets.

    memory: bytes by its name; the driver shows a few percent more, of which it keeps a part. memory_bytes_per_s: of
    HBM. nvlink_bytes_per_s: one direction, to the other GPUs of the node. network_bytes_per_s: one direction, one
    network adapter a GPU, as DGX systems have it. node: GPUs of one.
    """

    name: str
    memory: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    node: int = 8

    @property
    def flops_per_s(self) -> float:
        """Dense bf16 matrix products."""
        return PEAK_FLOPS_PER_S[self.name.upper()]


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 80e9, 2.04e12, 300e9, 25e9),
        Device("h100", 80e9, 3.35e12, 450e9, 50e9),
        Device("h200", 141e9, 4.8e12, 450e9, 50e9),
        Device("b200", 192e9, 8.0e12, 900e9, 50e9),
    )
}
