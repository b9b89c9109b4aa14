"""The set-up says what to do where Python 3.12 is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

FIND_PYTHON = Path(__file__).parents[2] / "tools" / "find_python.sh"


def find_python(**environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash
    return subprocess.run([bash, str(FIND_PYTHON)], env=environment, capture_output=True, text=True, check=False)


def test_missing_python_is_explained(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # a pyenv shim whose version is not selected does this
    old.chmod(0o755)
    done = find_python(PATH=f"{tmp_path}:/nowhere")
    assert done.returncode != 0
    assert not done.stdout
    assert "Python 3.12" in done.stderr and "make PYTHON=" in done.stderr


def test_a_named_python_is_taken(tmp_path: Path) -> None:
    done = find_python(PATH="/nowhere", PYTHON=sys.executable)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable)
