"""Two ranks under torchrun, one in a collective that the other does not join: both show where they stand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from drpo_megatron.observability.watchdog import EXIT_STALLED, stalls
from tests.support.servers import wait_until_gone

pytestmark = pytest.mark.distributed

RANK = """
    import ctypes, logging, os, sys, time
    from pathlib import Path
    import torch.distributed as dist
    from drpo_megatron.observability import VerbTimer, Watchdog

    def waits_in_python():
        time.sleep(600)

    def waits_in_c():
        # A read that never ends. PyDLL keeps the interpreter: no Python code runs meanwhile.
        reading, _ = os.pipe()
        ctypes.PyDLL(None).read(reading, ctypes.create_string_buffer(1), 1)

    dist.init_process_group("gloo")
    with Watchdog(3.0, dist.get_rank(), Path(sys.argv[1])) as watchdog:
        timer = VerbTimer(watchdog.watch)
        dist.barrier()
        with timer("train"):
            if dist.get_rank() == 1:
                globals()[sys.argv[2]]()
            dist.barrier()
"""


@pytest.mark.parametrize("where", ["waits_in_python", "waits_in_c"])
def test_a_rank_that_does_not_join(tmp_path: Path, where: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    with subprocess.Popen(
        [
            sys.executable,
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(tmp_path), where),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as torchrun:
        _, errors = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 1, "torchrun does not pass the code on"
    stacks = [(tmp_path / f"stacks_rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert "train: not done after 3 s" in stacks[0] and "in barrier" in stacks[0], errors
    assert f"in {where}" in stacks[1], errors
    rank, message = stalls(tmp_path)[0]
    assert rank == 0 and message.endswith(f"exit code {EXIT_STALLED}: a scheduler may start the job again")
    assert wait_until_gone(torchrun.pid, timeout_s=60) == []
