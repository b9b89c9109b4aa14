"""The fused projection and loss against its three bare matrix products, and against other ways to the same numbers.

Every ratio is measured side by side, on the same tensors in one process (one a rank), and a sample is the quotient of
two neighbours in time; for `ratio_to_gemm` on a CPU the two alternate chunk by chunk. One rank uses all cores, two
ranks half of them each. Memory is the growth of the process's peak over what it holds with inputs and gradients in
place. Figures without a bound are there to be read or drawn (`tools/record_bench.py`).

On GPUs numbers are bfloat16 and main gradients float32; `ratio_to_gemm_budget_*` have another memory budget, in MiB,
than the default; two ranks need two of them. On a CPU numbers are float32, and host memory has torch's default pages,
where a way that allocates whole logits also pays for their pages. The launcher's ranks ask for huge ones: with them the
other ways are compared once more (`huge_pages_vs_*`).

`speedup_vs_*` are of the exact way, whose floor are the three products that the other ways need too;
`sparse_speedup_vs_*` are of the sparse backward, which goes below it, on real rollouts.

TRL and verl are installed beside the product's packages, for this bench only (`make peers`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from drpo_megatron.bench.report import Figure
from drpo_megatron.platform import has_cuda
from drpo_megatron.platform.process import HUGE_PAGES
from drpo_megatron.vocab_parallel.chunks import DEFAULT_MEMORY_BUDGET

VOCABULARY, TOKENS, LONG = 151_936, 4_096, 32_768
HIDDEN = (1_024, 4_096)
REPETITIONS, LARGE_REPETITIONS, GPU_REPETITIONS = 3, 2, 15
RATIO_BOUNDS = {1: "<= 1.05", 2: "<= 1.10"}
GPU_BUDGETS_MIB = (1_024, 4_096)
SERIES_TOKENS = (512, 1_024, 2_048, 4_096)
SERIES_COLUMNS = (37_984, 75_968, 113_952, 151_936)
COMPARED = ("dense", "plain", "mcore", "trl", "verl")
TAIL_TOLERANCE = 0.014
PEERS = Path(sys.prefix) / "peers"


Samples = dict[str, list[float]]
NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Job:
    """What `loss_worker` does on every rank: a task of its `TASKS` on a problem of these sizes, or the saved `problem`.

    memory_budget: bytes. tokens_of_series, columns_of_series: the sizes of `series`.
    """

    task: str
    hidden: int = 0
    vocabulary: int = VOCABULARY
    tokens: int = TOKENS
    repetitions: int = REPETITIONS
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    compared: Sequence[str] = COMPARED
    tokens_of_series: Sequence[int] = ()
    columns_of_series: Sequence[int] = ()
    problem: str | None = None
    tail_tolerance: float = 0.0


def measure() -> dict[str, Figure]:
    """Raises FileNotFoundError when the peers are not installed, CalledProcessError when a worker fails; its message is
    on stderr.
    """
    check_peers()
    with tempfile.TemporaryDirectory() as directory:
        sparse = _sparse(Path(directory), os.cpu_count() or 1)
    return {
        **measure_exact(),
        "ratio_to_gemm_sparse": Figure.of(sparse["ratio"], "<= 0.60"),
        "sparse_gradient_error": Figure.of([max(sparse["error"])], "<= 2e-3"),
        "sparse_bound_over_error": Figure.of(sparse["bound_over_error"], ">= 1"),
        "sparse_kept_share": Figure.of(sparse["kept_share"]),
        "sparse_entropy": Figure.of(sparse["entropy"]),
        **{f"sparse_speedup_vs_{name}": Figure.of(sparse[name], ">= 1.8") for name in COMPARED},
    }


def measure_exact() -> dict[str, Figure]:
    """All but the sparse backward, which needs rollouts."""
    small, large = HIDDEN
    on_gpus = has_cuda()
    # A pass at the larger hidden size on a CPU is ten pairs of chunks of many seconds each.
    ratios = {f"h{small}": Job("ratio", small), f"h{large}": Job("ratio", large, repetitions=LARGE_REPETITIONS)}
    others = {
        "ways": Job("ways", small),
        "fused": Job("memory-fused", small),
        "dense": Job("memory-dense", small),
        "long": Job("memory-fused", small, tokens=LONG),
        "tokens": Job("series", small, tokens=max(SERIES_TOKENS), tokens_of_series=SERIES_TOKENS),
        "columns": Job("series", small, tokens=1_024, columns_of_series=SERIES_COLUMNS),
    }
    budgets = {f"budget_{mib}": Job("ratio", small, memory_budget=mib * 2**20) for mib in GPU_BUDGETS_MIB}
    found = run_jobs(1, ratios | others | (budgets if on_gpus else {}))
    by_ranks = {1: found}
    if not on_gpus or torch.cuda.device_count() >= 2:
        by_ranks[2] = run_jobs(2, ratios | {"traffic": Job("traffic", hidden=64)})

    figures: dict[str, Figure] = {}
    for ranks, samples in by_ranks.items():
        at = {name: Figure.of(samples[name]["ratio"], RATIO_BOUNDS[ranks]) for name in ratios}
        figures[f"ratio_to_gemm_tp{ranks}"] = max(at.values(), key=lambda figure: figure.value)
        figures |= {f"ratio_to_gemm_tp{ranks}_{name}": replace(figure, must=None) for name, figure in at.items()}
    if on_gpus:
        figures |= {f"ratio_to_gemm_{name}": Figure.of(found[name]["ratio"]) for name in budgets}
    figures |= {f"speedup_vs_{name}": Figure.of(found["ways"][name], ">= 1.8") for name in COMPARED}
    if not on_gpus:
        (on_huge_pages,) = run_worker(1, [others["ways"]], HUGE_PAGES)
        figures |= {f"huge_pages_vs_{name}": Figure.of(on_huge_pages[name]) for name in COMPARED}
    figures["masked_half_time"] = Figure.of(found["ways"]["masked"], "<= 0.55")
    fused, dense, long = (found[name]["bytes"][0] for name in ("fused", "dense", "long"))
    figures["memory_vs_dense"] = Figure.of([fused / dense], "<= 0.1")
    figures["memory_growth_4k_32k"] = Figure.of([long / fused], "<= 1.1")
    figures |= {"memory_fused_mib": Figure.of([fused / 2**20]), "memory_dense_mib": Figure.of([dense / 2**20])}
    if 2 in by_ranks:
        traffic = by_ranks[2]["traffic"]
        figures["collectives_per_chunk"] = Figure.of(traffic["collectives_per_chunk"], "<= 1")
        figures["bytes_per_token"] = Figure.of(traffic["bytes_per_token"], "<= 16")
    return figures | _growth("tokens", found["tokens"]) | _growth("columns", found["columns"])


def check_peers() -> None:
    """Raises FileNotFoundError when TRL or verl is not there."""
    for name in ("trl", "verl"):
        if not (PEERS / name).is_dir() and importlib.util.find_spec(name) is None:
            raise FileNotFoundError(f"the bench compares with {name}, which is not installed: run `make peers`")


def run_jobs(ranks: int, jobs: Mapping[str, Job]) -> dict[str, Samples]:
    """The samples of each job. On a CPU each has a process of its own, whose peak of memory only grows."""
    if has_cuda():
        repeated = [replace(job, repetitions=GPU_REPETITIONS) for job in jobs.values()]
        return dict(zip(jobs, run_worker(ranks, repeated), strict=True))
    return {name: run_worker(ranks, [job])[0] for name, job in jobs.items()}


def run_worker(ranks: int, jobs: Sequence[Job], environment: Mapping[str, str] = NOTHING) -> list[Samples]:
    """Run `loss_worker` under torchrun; return the samples of each job, by name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "drpo_megatron.bench.loss_worker", json.dumps([asdict(job) for job in jobs])]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    done = subprocess.run(
        command,
        env={**os.environ, **environment, "OMP_NUM_THREADS": str(threads), "DRPO_PEERS": str(PEERS)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    samples: list[Samples] = json.loads(done.stdout.splitlines()[-1])
    for job, found in zip(jobs, samples, strict=True):
        print(f"{job.task} H={job.hidden} TP={ranks} T={job.tokens}: {found}", file=sys.stderr, flush=True)
    return samples


def fit_line(samples: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """Least squares through the medians, each point weighted by 1/size²: (seconds at size 0, seconds a unit)."""
    sizes = list(samples)
    seconds = [statistics.median(samples[size]) for size in sizes]
    weights = [1 / size**2 for size in sizes]
    total = sum(weights)
    mean_x = sum(w * x for w, x in zip(weights, sizes, strict=True)) / total
    mean_y = sum(w * y for w, y in zip(weights, seconds, strict=True)) / total
    slope = sum(w * (x - mean_x) * (y - mean_y) for w, x, y in zip(weights, sizes, seconds, strict=True)) / sum(
        w * (x - mean_x) ** 2 for w, x in zip(weights, sizes, strict=True)
    )
    return mean_y - slope * mean_x, slope


def growth_exponent(samples: Mapping[int, Sequence[float]]) -> float:
    """b of seconds ∝ size^b: the slope of log(median seconds) over log(size)."""
    xs = [math.log(size) for size in samples]
    ys = [math.log(statistics.median(seconds)) for seconds in samples.values()]
    return statistics.linear_regression(xs, ys).slope


def _growth(what: str, result: Mapping[str, list[float]]) -> dict[str, Figure]:
    samples = {int(size): seconds for size, seconds in result.items()}
    offset, slope = fit_line(samples)
    largest = max(samples)
    print(f"time over {what}: {offset:.3g} s + {slope:.3g} s × {what}", file=sys.stderr, flush=True)
    whole = statistics.median(samples[largest])
    return {
        f"growth_exponent_{what}": Figure.of([growth_exponent(samples)], "<= 1.05"),
        f"fit_offset_share_{what}": Figure.of([offset / whole]),
        **{f"time_share_{what}_{size}": Figure.of([s / whole for s in seconds]) for size, seconds in samples.items()},
    }


def _sparse(directory: Path, threads: int) -> Samples:
    """Rollouts of SmolLM2 by the real server, then the sparse backward on their hidden states."""
    problem = directory / "problem.pt"
    subprocess.run(
        [sys.executable, "-m", "drpo_megatron.bench.loss_rollouts", str(problem)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
        stdout=sys.stderr,
    )
    job = Job("sparse", problem=str(problem), tail_tolerance=TAIL_TOLERANCE)
    return run_worker(1, [job])[0]
