"""Run one function on several ranks, each a process of its own, and report the first failure. One launch, several
checks.
"""

from __future__ import annotations

import os
import pickle
import queue
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from drpo_megatron.platform import has_cuda
from drpo_megatron.platform.ports import free_port


def _entry(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    # Ended by `run_ranks` in any case; only without the mark may it have a process of its own, as a checkpoint does.
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    try:
        # As bytes: torch's own pickling would hand over file descriptors that end with this process.
        results.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:  # noqa: BLE001 - a rank's failure, whatever it is, is the test's result
        results.put((rank, None, traceback.format_exc()))


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 240, spawn: bool = False
) -> list[Any]:
    """Run `function(*args)` on `world` ranks with torchrun's environment variables set; return the results by rank.

    Without a GPU they are forks of a process that has imported the product; `spawn` starts them with nothing imported.
    `function` and `args` must pickle (a module-level function). Raises AssertionError with the failing rank's
    traceback, TimeoutError when a rank does not answer in time. No process is left behind.
    """
    context = mp.get_context("spawn" if spawn or has_cuda() else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["tests.support.preloaded"])
    results = context.Queue()
    port = free_port("127.0.0.1")
    processes = [
        context.Process(target=_entry, args=(r, world, port, function, args, results), daemon=True)
        for r in range(world)
    ]
    for p in processes:
        p.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world:
            try:
                rank, value, error = results.get(timeout=timeout_s)
            except queue.Empty as error:
                raise TimeoutError(f"ranks {sorted(set(range(world)) - set(answers))} did not answer") from error
            assert error is None, f"rank {rank} of {world} failed:\n{error}"
            answers[rank] = pickle.loads(value)
        for p in processes:
            p.join(timeout=20)
    finally:
        for p in processes:
            if p.is_alive():
                p.kill()
                p.join()
    return [answers[r] for r in range(world)]
