"""Where tests import Transformer Engine from: a directory of its own.

An environment that trains on CPU must not have it, because Megatron-Core would take its CUDA kernels.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

WHEELS = Path(__file__).parents[3] / "shared" / "wheels"
"""Beside the checkout: a `transformer_engine_torch` wheel that imports without a GPU. DRPO_TE_WHEELS names another
place."""
# The rest are wheels of the package registry. Without their own dependencies: torch and pydantic are installed.
_PACKAGES = ["transformer-engine=={version}", "transformer-engine-cu13=={version}"]
_PACKAGES += ["onnx", "onnxscript", "onnx_ir", "ml_dtypes", "nvdlfw-inspect", "einops", "importlib_metadata"]
_INSTALL_TIMEOUT_S = 180


@contextlib.contextmanager
def directory() -> Iterator[str | None]:
    """A directory to put on sys.path; None where the environment has Transformer Engine itself.

    It is the one that the variable DRPO_TE_PATH names, or a temporary one made from the wheel in WHEELS, half a
    gigabyte. Skips the test when neither can be had, and says why.
    """
    path = os.environ.get("DRPO_TE_PATH")
    reason = _import_error(path)
    if reason is None:
        yield path
        return
    if path is not None:
        pytest.fail(f"DRPO_TE_PATH is {path}, and Transformer Engine cannot be imported from there: {reason}")
    if "DRPO_LAYOUTS" not in os.environ:
        pytest.skip("no Transformer Engine: DRPO_TE_PATH is not set, and only `make layouts` installs one to test with")
    wheels = Path(os.environ.get("DRPO_TE_WHEELS", WHEELS))
    wheel = next(wheels.glob("transformer_engine_torch-*.whl"), None)
    if wheel is None:
        pytest.skip(f"no Transformer Engine: DRPO_TE_PATH is not set, and {wheels} has no wheel of it")
    with tempfile.TemporaryDirectory() as target:
        _install(wheel, target)
        reason = _import_error(target)
        assert reason is None, f"{wheel.name} was installed and cannot be imported: {reason}"
        yield target


def _install(wheel: Path, target: str) -> None:
    version = wheel.name.split("-")[1]
    packages = [package.format(version=version) for package in _PACKAGES]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        target,
        str(wheel),
        *packages,
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"no Transformer Engine: pip did not install {', '.join(packages)} in {_INSTALL_TIMEOUT_S} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no Transformer Engine: pip cannot install its packages: {error.stderr.strip().splitlines()[-1]}")


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
