"""`stubs/` says of the installed libraries what is so: names, kinds of parameters, defaults."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support import te_install
from tests.support.stubs import PACKAGES, stub_modules

LIMIT_S = 900


@pytest.mark.parametrize("package", PACKAGES)
def test_stubs_are_as_the_library(package: str) -> None:
    """In a process in which the product has replaced nothing of the library."""
    search = [os.environ.get("PYTHONPATH")]
    if package == "transformer_engine":
        search.insert(0, te_install.directory())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    command = [sys.executable, "-m", "tests.support.stubs", package]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"] == []
    assert {name for name, _ in stub_modules(package)} <= set(found["checked"])
