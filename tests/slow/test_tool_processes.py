"""What tools see of processes: their memory, threads and handles."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.test_compare_trl import compare_trl
from tests.unit.test_long_run import long_run

ROOT = Path(__file__).parents[2]


def test_memory_is_that_of_the_process_and_of_what_it_started() -> None:
    hold = "import time; held = bytearray(b'x') * (100 << 20); print('held', flush=True); time.sleep(600)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    process = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        with compare_trl.memory_looks(process.pid) as looks:
            deadline = time.monotonic() + 300
            while len(looks) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
        children = compare_trl.family(process.pid)[1:]
    finally:
        process.kill()
        process.wait()
        for child in children:
            os.kill(child, 9)
    assert looks and all(100 < used / 2**20 < 200 for _, used in looks)


def test_a_look_at_a_process() -> None:
    code = "import threading, sys; threading.Thread(target=sys.stdin.read).start(); print(1, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        seen = long_run.look_at(process.pid)
        assert process.pid in long_run.family(os.getpid())
        process.stdin.close()
    assert (
        seen["threads"] == 2 and seen["handles"] >= 3 and 2**20 < seen["rss"] < 2**30 and "threading" in seen["command"]
    )


@pytest.mark.parametrize("script", ["recipes_page", "scaling_page"])
def test_a_script_says_whether_its_page_is_current(script: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{script}.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"python tools/{script}.py"
