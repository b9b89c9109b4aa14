"""What tests/unit/conftest.py refuses: a test of each kind is run by pytest within pytest and fails with the reason."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

GUARD = (Path(__file__).parent / "conftest.py").read_text()
REFUSED = {
    "a Python process": ("import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])", "starts */python"),
    "one whose error is hidden": (
        "import subprocess, sys\ntry:\n    subprocess.Popen([sys.executable])\nexcept Exception:\n    pass",
        "starts */python",
    ),
    "a fork": ("import os\nos.fork()", "starts a process"),
    "posix_spawn": ("import os, sys\nos.posix_spawn(sys.executable, [sys.executable], {})", "starts a process"),
    "multiprocessing": (
        "import multiprocessing\nmultiprocessing.get_context('spawn').Process(target=print).start()",
        "starts a process",
    ),
    "an address of the network": (
        "import socket\nwith socket.socket() as s:\n    s.bind(('0.0.0.0', 0))",
        "binds to '0.0.0.0'",
    ),
    "SGLang": ("import sglang", "imports SGLang"),
}


@pytest.fixture
def guarded(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    (pytester.path / "sglang.py").write_text("")
    monkeypatch.syspath_prepend(pytester.path)
    pytester.makeconftest(GUARD)
    return pytester


def outcome(pytester: pytest.Pytester, code: str) -> pytest.RunResult:
    body = "\n".join("    " + line for line in code.splitlines())
    pytester.makepyfile(test_one=f"def test_it():\n{body}\n")
    return pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", "-p", "no:randomly")


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(guarded: pytest.Pytester, what: str) -> None:
    code, reason = REFUSED[what]
    result = outcome(guarded, code)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines([f"*a unit test {reason}*tests/slow: see CONTRIBUTING.md*"])


def test_what_is_allowed(guarded: pytest.Pytester) -> None:
    code = """import socket, subprocess
subprocess.run(["bash", "-c", "exit 0"], check=True)
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    s.listen()"""
    result = outcome(guarded, code)
    result.assert_outcomes(passed=1)


def test_sglang_that_was_there_before_is_not_this_tests(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sglang", types.ModuleType("sglang"))
    outcome(guarded, "pass").assert_outcomes(passed=1)
