"""The ranks of the tests end with the process that started them, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.ranks.test_pool import LIMIT_S, is_gone

pytestmark = pytest.mark.distributed

OWNER = """
    import os, sys, threading, time
    from tests.support.launch import run_ranks
    from tests.ranks.test_pool import process, wait_for_a_signal

    def tell():
        print(*(pid for pid, *_ in run_ranks(2, process)), flush=True)
        run_ranks(2, wait_for_a_signal)

    if __name__ == "__main__":
        tell()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_owner(tmp_path: Path, how: signal.Signals) -> None:
    """Killed or interrupted while the ranks wait for something else: no process stays."""
    script = tmp_path / "owner.py"
    script.write_text(textwrap.dedent(OWNER))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2 and not any(is_gone(pid) for pid in pids)
        family = [p.pid for p in psutil.Process(owner.pid).children(recursive=True)]
        owner.send_signal(how)
        owner.communicate(timeout=LIMIT_S)
    assert owner.returncode != 0
    deadline = time.monotonic() + LIMIT_S
    while not all(map(is_gone, family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(is_gone, family))
