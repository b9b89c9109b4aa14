"""Bitwise repeatable training: the same weights, sequences and layout give the same weights and metrics.

Kernels of Transformer Engine, cuBLAS and NCCL read their choice from the environment when they are first used, so the
launcher sets it before a rank starts; torch is told in the process. With NCCL it has not been run: see
docs/gpu-checklist.md. On CPU the kernels and gloo are repeatable anyway, and torch's switch refuses operations that are
not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

ENVIRONMENT = {
    # Transformer Engine's attention backward with atomics is left out.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # One order of the sum over ranks: NCCL would choose by size and topology, and the switches' own sum has none.
    "NCCL_ALGO": "Ring",
    # cuBLAS keeps one workspace a stream instead of choosing by what is free.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
_ALSO_DETERMINISTIC = {
    # What Megatron-LM accepts for its own deterministic mode.
    "NCCL_ALGO": ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
}


def contradictions() -> Iterator[tuple[str, str, str]]:
    """(name, value, values that would do) of each variable that is set here to something not deterministic."""
    for name, value in ENVIRONMENT.items():
        allowed = _ALSO_DETERMINISTIC.get(name, (value,))
        found = os.environ.get(name)
        if found is not None and found not in allowed:
            yield name, found, " or ".join(allowed)


def environment() -> dict[str, str]:
    """The variables that a rank needs. What the caller has set to another deterministic value stays."""
    return {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}


def enable() -> None:
    """Switch this process to deterministic kernels. Call it before the first CUDA operation.

    Raises RuntimeError naming the variables of `ENVIRONMENT` that are missing or contradict it.
    """
    import torch

    missing = [name for name in ENVIRONMENT if name not in os.environ] + [name for name, _, _ in contradictions()]
    if missing:
        wanted = " ".join(f"{name}={ENVIRONMENT[name]}" for name in missing)
        raise RuntimeError(f"training.deterministic needs {wanted} in the environment before the ranks start")
    torch.use_deterministic_algorithms(True)
    # Filling every empty tensor with NaN is for finding reads of uninitialised memory, not for repeatability.
    # A property of the class that torch gives this module.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
