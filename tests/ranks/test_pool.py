"""The ranks that all other tests run on: nothing of a function reaches the next, and nothing outlives the tests."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys

import psutil
import pytest

from tests.support.launch import run_ranks
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

LIMIT_S = 300.0


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def process() -> tuple[int, str, int]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([dist.get_rank() + 1])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return os.getpid(), os.environ["RANK"], int(total)


def fail_on(rank: int) -> None:
    """One rank raises, and the others wait for it in a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ArithmeticError("the one to report")
    dist.barrier()


def die_on(rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_for_a_signal() -> None:
    signal.pause()


def change_much() -> None:
    import torch

    os.environ["DRPO_LEFT"] = "1"
    os.environ.pop("PATH", None)
    os.chdir("/")
    sys.path.insert(0, "/nowhere")
    random.seed(7)
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)


def seen() -> tuple[object, ...]:
    import torch

    return (
        os.environ.get("DRPO_LEFT"),
        "PATH" in os.environ,
        os.getcwd() == "/",
        "/nowhere" in sys.path,
        random.random(),
        float(torch.rand(())),
        torch.are_deterministic_algorithms_enabled(),
    )


def leave_groups() -> None:
    from drpo_megatron.platform import distributed
    from drpo_megatron.platform.layout import ParallelLayout

    distributed.initialize(ParallelLayout(data=2), timeout_s=LIMIT_S)


def test_ranks_are_the_same_processes_in_every_world() -> None:
    two, four, one = (run_ranks(world, process) for world in (2, 4, 1))
    assert [[rank for _, rank, _ in answers] for answers in (one, two, four)] == [["0"], ["0", "1"], [*"0123"]]
    assert [{total for *_, total in answers} for answers in (one, two, four)] == [{1}, {3}, {10}]
    pids = [pid for pid, *_ in four]
    assert [pid for pid, *_ in two] == pids[:2] and [pid for pid, *_ in one] == pids[:1]
    assert len({os.getpid(), *pids}) == 5


def test_ranks_of_its_own() -> None:
    shared = run_ranks(1, process)
    own = run_ranks(1, process, fresh=True)
    assert own[0][0] != shared[0][0] == run_ranks(1, process)[0][0]
    assert is_gone(own[0][0])


@pytest.mark.parametrize(("function", "says"), [(fail_on, "the one to report"), (die_on, "exit code -9")])
def test_a_failure_on_one_rank_ends_all(function: object, says: str) -> None:
    """The others hang in a collective. The next function has new ranks."""
    with Pool("forkserver") as pool:
        before = [pid for pid, *_ in pool.run(2, process, ())]
        with pytest.raises(AssertionError, match="rank 1 of 2 failed") as failure:
            pool.run(2, function, (1,))  # type: ignore[arg-type]
        assert says in str(failure.value)
        assert all(is_gone(pid) for pid in before)
        after = [pid for pid, *_ in pool.run(2, process, ())]
        assert len({*before, *after}) == 4
    assert all(is_gone(pid) for pid in after)


def test_ranks_that_do_not_answer_say_where_they_are() -> None:
    with Pool("forkserver") as pool:
        pids = [pid for pid, *_ in pool.run(2, process, ())]
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not answer") as failure:
            pool.run(2, wait_for_a_signal, (), timeout_s=2.0)
        assert str(failure.value).count("in wait_for_a_signal") == 2
        assert all(is_gone(pid) for pid in pids)


def test_what_every_function_may_change_is_put_back() -> None:
    before = run_ranks(1, seen)
    run_ranks(1, change_much)
    assert run_ranks(1, seen) == before
    assert before[0][:4] == (None, True, False, False) and before[0][-1] is False


def test_groups_may_not_be_left() -> None:
    with pytest.raises(AssertionError, match=r"LeftBehind[\s\S]*torch's process groups[\s\S]*Megatron-Core's"):
        run_ranks(2, leave_groups)
    assert len(run_ranks(2, process)) == 2


def change_too_much() -> None:
    import torch

    from drpo_megatron.training import packing

    packing.TrainSequence = str  # type: ignore[misc, assignment]
    logging.getLogger("drpo_megatron").addHandler(logging.NullHandler())
    torch.set_default_dtype(torch.float64)
    subprocess.Popen(["sleep", "600"])


def test_what_may_not_be_left_is_named() -> None:
    """A replaced class, a mode of torch, a handler of a log, a process. Its rank is ended, and its process with it."""
    with Pool("forkserver") as pool, pytest.raises(AssertionError, match="LeftBehind") as left:
        pool.run(1, change_too_much, ())
    for says in (
        "drpo_megatron.training.packing.TrainSequence is another one",
        "torch's default dtype: torch.float64",
        "the handlers of the log drpo_megatron",
        ": sleep 600",
    ):
        assert says in str(left.value)
    (pid,) = re.findall(r"the process (\d+): sleep", str(left.value))
    assert is_gone(int(pid))
