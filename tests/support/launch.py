"""Run a function on several ranks, each a process, and report the first failure.

Starting ranks costs more than most of what they are asked, so the ranks of `run_ranks` are started once and serve the
whole test run (`tests/support/pool.py`). A test that kills a rank, or that changes a process for good, asks for ranks
of its own.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

from drpo_megatron.platform import has_cuda
from tests.support.pool import LIMIT_S, Pool

_shared: Pool | None = None


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = LIMIT_S,
    fresh: bool = False,
    spawn: bool = False,
) -> list[Any]:
    """Run `function(*args)` on `world` ranks with torchrun's environment variables set; return the results by rank.

    Args:
        function, args: must pickle, so a function of a module. It may create the process groups once, and destroys
            them before it returns; `change_layout` replaces them in between.
        timeout_s: how long all ranks together may take, in seconds.
        fresh: ranks of its own, which end with the call: forks of a process that has imported the product.
        spawn: ranks of its own with nothing imported. With a GPU all ranks are started so, as CUDA does not survive a
            fork.

    Raises AssertionError with the traceback of the rank that failed, also where it left something behind, and
    TimeoutError with the stacks of the ranks that did not answer. Neither leaves a process behind.
    """
    if fresh or spawn or has_cuda():
        with Pool("spawn" if spawn or has_cuda() else "forkserver", may_leave=True) as own:
            return own.run(world, function, args, timeout_s=timeout_s)
    return _pool().run(world, function, args, timeout_s=timeout_s)


def _pool() -> Pool:
    global _shared
    if _shared is None:
        _shared = Pool("forkserver")
        atexit.register(_shared.close)
    return _shared
