"""kill -9 at random moments of saving: what is left is good, and no older than the last that was complete."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from drpo_megatron.config.schema import RunConfig
from tests.support import tiny_models
from tests.support.updates import run_config

pytestmark = pytest.mark.distributed

KILLS = 20


def test_twenty_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_models.write("qwen3", tmp_path / "model")
    raw = run_config(tmp_path / "model", {}, steps=1000).model_dump()
    raw["tracking"]["directory"] = tmp_path
    raw["save"]["every"] = 1
    config = RunConfig.model_validate(raw)
    checkpoints = config.checkpoint_directory
    # Torch and Megatron-Core are imported once; a run is a fork of that process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.saving"])
    from tests.support.saving import train

    moments = random.Random(0)
    complete, killed_in_a_save = 0, 0
    for kill in range(KILLS):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=train, args=(config, kill % 2 == 0, send))
        process.start()
        send.close()
        assert process.pid is not None
        assert receive.poll(120), "the run did not begin"
        what, step = receive.recv()
        assert what == "resumed" and complete <= step <= complete + 1, (kill, complete, step)
        complete = step
        end = time.monotonic() + moments.uniform(0.1, 1.5)
        while (left := end - time.monotonic()) > 0:
            if receive.poll(left):
                _, complete = receive.recv()
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while receive.poll():  # said before the kill
            try:
                _, complete = receive.recv()
            except EOFError:
                break
        assert psutil.wait_procs(family, timeout=20)[1] == []
        killed_in_a_save += any(path.name.endswith(".partial") for path in checkpoints.iterdir())
        assert len([path for path in checkpoints.iterdir() if path.name.startswith("step_")]) <= config.save.keep + 1
    with capsys.disabled():
        print(f"\n{KILLS} kills, {killed_in_a_save} of them in a save; {complete} steps")
    assert killed_in_a_save >= KILLS // 4
    assert complete >= KILLS // 2
