"""Where tests import Transformer Engine from: a directory of its own, which `make te` makes.

An environment that trains on CPU must not have it, because Megatron-Core would take its CUDA kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def directory() -> str | None:
    """A directory to put on sys.path: DRPO_TE_PATH. None where the environment has Transformer Engine itself.

    Skips the test where there is neither, and fails it where DRPO_TE_PATH names a directory that has none.
    """
    path = os.environ.get("DRPO_TE_PATH")
    reason = _import_error(path)
    if reason is None:
        return path
    if path is not None:
        pytest.fail(f"DRPO_TE_PATH is {path}, and Transformer Engine cannot be imported from there: {reason}")
    pytest.skip("no Transformer Engine: `make te` makes .venv/te for DRPO_TE_PATH, and `make slow` sets it")


def _import_error(path: str | None) -> str | None:
    """The last line of what `import transformer_engine.pytorch` says with `path` on sys.path; None when it works."""
    # torch first: it loads the CUDA libraries that Transformer Engine links to.
    code = "import torch, transformer_engine.pytorch"
    search = os.pathsep.join(p for p in (path, os.environ.get("PYTHONPATH")) if p)
    tried = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True
    )
    if tried.returncode == 0:
        return None
    return (tried.stderr.strip().splitlines() or [f"exit status {tried.returncode}"])[-1]
