"""Groups that are replaced end: torch would keep the threads of each, and ranks of many layouts would drown in them."""

from __future__ import annotations

import os

from tests.support.launch import run_ranks


def threads_of_layouts() -> list[int]:
    from drpo_megatron.platform import distributed
    from drpo_megatron.platform.layout import ParallelLayout

    counts = []
    for index in range(4):
        layout = ParallelLayout(tensor=2) if index % 2 == 0 else ParallelLayout(data=2)
        (distributed.change_layout if index else distributed.initialize)(layout)
        counts.append(len(os.listdir("/proc/self/task")))
    distributed.shutdown()
    return counts


def test_threads_do_not_grow_with_layouts() -> None:
    for counts in run_ranks(2, threads_of_layouts):
        assert max(counts) - counts[0] < 20, f"threads of the groups of earlier layouts: {counts}"
