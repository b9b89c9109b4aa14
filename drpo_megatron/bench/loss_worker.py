"""One process a rank of `bench loss`: does the jobs that its argument lists as JSON, and prints a JSON list of their
samples on rank 0. Started by torchrun.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from drpo_megatron.bench.loss import Job, Samples
from drpo_megatron.bench.loss_ways import Ways, seconds, use_peers
from drpo_megatron.platform import distributed, has_cuda, peak_memory_bytes
from drpo_megatron.platform.layout import ParallelLayout


def ratio(ways: Ways, job: Job) -> Samples:
    """Fused over bare."""
    ways.warm_up()
    return {"ratio": [ways.ratio_to_bare()[0] for _ in range(job.repetitions)]}


def compare(ways: Ways, job: Job) -> Samples:
    """Every other way over the fused one of the same round; every second token over all."""
    _import_peers(job)
    ways.warm_up()
    samples: Samples = {name: [] for name in ("masked", *job.compared)}
    if has_cuda():  # libraries choose and load their kernels at the first call
        for name in samples:
            getattr(ways, name)()
    for _ in range(job.repetitions):
        fused = seconds(ways.fused)
        for name in samples:
            samples[name].append(seconds(getattr(ways, name)) / fused)
    return samples


def _import_peers(job: Job) -> None:
    """So that no import is timed."""
    use_peers()
    small = Ways.random(64, 64, 512)
    for name in job.compared:
        getattr(small, name)()


def memory(ways: Ways, job: Job) -> Samples:
    """Bytes above inputs and gradients."""
    way = getattr(ways, job.task.removeprefix("memory-"))
    if has_cuda():  # to tune kernels takes copies
        way()
        ways.hidden_TH.grad = None
        torch.cuda.reset_peak_memory_stats()
    before = peak_memory_bytes()
    way()
    return {"bytes": [float(peak_memory_bytes() - before - ways.hidden_TH.nbytes)]}


def traffic(ways: Ways, job: Job) -> Samples:
    """What the ranks exchange before the backward pass, whose all-reduce of ∂hidden belongs to the layer below."""
    with _Collectives() as forward:
        ways.fused_loss()
    chunks = -(-len(ways.hidden_TH) // ways.chunk)
    return {
        "collectives_per_chunk": [forward.calls.total() / chunks],
        "bytes_per_token": [forward.bytes / len(ways.hidden_TH)],
    }


def series(ways: Ways, job: Job) -> Samples:
    """Seconds of the fused way by number of tokens or of columns; sizes alternate."""
    problems: dict[int, Ways] = {}
    by_tokens = [(size, size, job.vocabulary) for size in job.tokens_of_series]
    by_columns = [(size, job.tokens, size) for size in job.columns_of_series]
    for size, tokens, vocabulary in by_tokens or by_columns:
        columns = vocabulary // ways.group.size()
        problems[size] = Ways(
            ways.hidden_TH.detach()[:tokens].requires_grad_(),
            ways.weight_VH.detach()[:columns].requires_grad_(),
            ways.targets_T[:tokens] % vocabulary,
            ways.logmu_T[:tokens],
            ways.advantages_T[:tokens],
        )
    samples: Samples = {str(size): [] for size in problems}
    for problem in problems.values() if has_cuda() else [ways]:
        problem.warm_up()
    for _ in range(job.repetitions):
        for size, problem in problems.items():
            samples[str(size)].append(seconds(problem.fused))
    return samples


def sparse(ways: Ways, job: Job) -> Samples:
    """The sparse backward on real hidden states: time over the bare products, its error beside its bound, and the time
    of every other way over its own.
    """
    _import_peers(job)
    ways.main_grad_VH.zero_()
    ways.warm_up()
    entropy_T = ways.fused().entropy_N
    exact = _gradients(ways)
    samples: Samples = {"ratio": [], "error": [], "bound_over_error": [], "kept_share": []}
    samples["entropy"] = [float(entropy_T.mean())]
    for _ in range(max(5, job.repetitions)):
        ways.main_grad_VH.zero_()
        ratio, result = ways.ratio_to_bare(tail_tolerance=job.tail_tolerance)
        tail = result.tail
        for found, expected, bound in zip(_gradients(ways), exact, (tail.hidden_bound, tail.weight_bound), strict=True):
            error = float((found - expected).norm())
            samples["error"].append(error / float(expected.norm()))
            samples["bound_over_error"].append(bound / error)
        samples["kept_share"].append(tail.kept_share)
        samples["ratio"].append(ratio)
    samples |= {name: [] for name in job.compared}
    for _ in range(job.repetitions):
        fused = seconds(lambda: ways.fused(tail_tolerance=job.tail_tolerance))
        for name in job.compared:
            samples[name].append(seconds(getattr(ways, name)) / fused)
    return samples


def _gradients(ways: Ways) -> tuple[torch.Tensor, torch.Tensor]:
    assert ways.hidden_TH.grad is not None
    gradients = ways.hidden_TH.grad.clone(), ways.main_grad_VH.clone()
    ways.hidden_TH.grad = None
    return gradients


class _Collectives(TorchDispatchMode):
    """Counts the collectives called inside, and the bytes that this rank hands to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
            # (output, input, …) for an all-gather
            self.bytes += args[1].nbytes
        return func(*args, **(kwargs or {}))


TASKS: dict[str, Callable[[Ways, Job], Samples]] = {
    "ratio": ratio,
    "ways": compare,
    "memory-fused": memory,
    "memory-dense": memory,
    "traffic": traffic,
    "series": series,
    "sparse": sparse,
}


def run(job: Job) -> Samples:
    if job.problem is None:
        ways = Ways.random(job.tokens, job.hidden, job.vocabulary)
    else:
        ways = Ways.of_rollouts(Path(job.problem))
    ways.memory_budget = job.memory_budget
    return TASKS[job.task](ways, job)


def main() -> None:
    jobs = [Job(**values) for values in json.loads(sys.argv[1])]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    distributed.initialize(ParallelLayout(tensor=int(os.environ["WORLD_SIZE"])))
    samples = []
    for job in jobs:
        samples.append(run(job))
        gc.collect()
    if dist.get_rank() == 0:
        print(json.dumps(samples), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    main()
