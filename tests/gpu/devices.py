"""What a test of this directory needs."""

from __future__ import annotations

import pytest
import torch


def needs_devices(ranks: int) -> None:
    """Skip the calling test where there is no CUDA device for each rank."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices: one a rank")
