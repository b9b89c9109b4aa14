"""The fused projection and loss against its three bare matrix products, and against other ways to the same numbers.

Every ratio is measured side by side, on the same tensors in one process (one a rank), and a sample is the quotient of
two neighbours in time; for `ratio_to_gemm` the two alternate chunk by chunk. One rank uses all cores, two ranks half of
them each. Memory is the growth of the process's peak over what it holds with inputs and gradients in place, each way in
a process of its own. Figures without a bound are there to be read or drawn (`tools/record_bench.py`).

Host memory has torch's default pages, where a way that allocates whole logits also pays for their pages. The launcher's
ranks ask for huge ones: with them the other ways are compared once more (`huge_pages_vs_*`).

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
from pathlib import Path

from drpo_megatron.bench.report import Figure
from drpo_megatron.platform.process import HUGE_PAGES

VOCABULARY, TOKENS, LONG = 151_936, 4_096, 32_768
HIDDEN = (1_024, 4_096)
REPETITIONS, LARGE_REPETITIONS = 3, 2
SERIES_TOKENS = (512, 1_024, 2_048, 4_096)
SERIES_COLUMNS = (37_984, 75_968, 113_952, 151_936)
COMPARED = ("dense", "plain", "mcore", "trl", "verl")
TAIL_TOLERANCE = 0.014
PEERS = Path(sys.prefix) / "peers"


def measure() -> dict[str, Figure]:
    """Raises FileNotFoundError when the peers are not installed, CalledProcessError when a worker fails; its message is
    on stderr.
    """
    check_peers()
    small, threads = HIDDEN[0], os.cpu_count() or 1
    # A pass at the larger hidden size is ten pairs of chunks of many seconds each.
    counts = dict(zip(HIDDEN, (REPETITIONS, LARGE_REPETITIONS), strict=True))
    tp1, tp2 = (
        [run_worker(ranks, "ratio", hidden=hidden, repetitions=count)["ratio"] for hidden, count in counts.items()]
        for ranks in (1, 2)
    )
    ways = run_worker(1, "ways", hidden=small)
    on_huge_pages = run_worker(1, "ways", hidden=small, huge_pages=True)
    memory = {name: run_worker(1, f"memory-{name}", hidden=small)["bytes"][0] for name in ("fused", "dense")}
    long = run_worker(1, "memory-fused", hidden=small, tokens=LONG)["bytes"][0]
    traffic = run_worker(2, "traffic", hidden=64)
    by_tokens = run_worker(1, "series", hidden=small, tokens=max(SERIES_TOKENS), series="tokens")
    by_columns = run_worker(1, "series", hidden=small, tokens=1_024, series="columns")
    with tempfile.TemporaryDirectory() as directory:
        sparse = _sparse(Path(directory), threads)
    return {
        "ratio_to_gemm_tp1": _worst(tp1, "<= 1.05"),
        "ratio_to_gemm_tp2": _worst(tp2, "<= 1.10"),
        **{f"ratio_to_gemm_tp1_h{hidden}": Figure.of(s) for hidden, s in zip(HIDDEN, tp1, strict=True)},
        **{f"ratio_to_gemm_tp2_h{hidden}": Figure.of(s) for hidden, s in zip(HIDDEN, tp2, strict=True)},
        **{f"speedup_vs_{name}": Figure.of(ways[name], ">= 1.8") for name in COMPARED},
        **{f"huge_pages_vs_{name}": Figure.of(on_huge_pages[name]) for name in COMPARED},
        "masked_half_time": Figure.of(ways["masked"], "<= 0.55"),
        "memory_vs_dense": Figure.of([memory["fused"] / memory["dense"]], "<= 0.1"),
        "memory_growth_4k_32k": Figure.of([long / memory["fused"]], "<= 1.1"),
        "memory_fused_mib": Figure.of([memory["fused"] / 2**20]),
        "memory_dense_mib": Figure.of([memory["dense"] / 2**20]),
        "collectives_per_chunk": Figure.of(traffic["collectives_per_chunk"], "<= 1"),
        "bytes_per_token": Figure.of(traffic["bytes_per_token"], "<= 16"),
        **_growth("tokens", by_tokens),
        **_growth("columns", by_columns),
        "ratio_to_gemm_sparse": Figure.of(sparse["ratio"], "<= 0.60"),
        "sparse_gradient_error": Figure.of([max(sparse["error"])], "<= 2e-3"),
        "sparse_bound_over_error": Figure.of(sparse["bound_over_error"], ">= 1"),
        "sparse_kept_share": Figure.of(sparse["kept_share"]),
        "sparse_entropy": Figure.of(sparse["entropy"]),
    }


def check_peers() -> None:
    """Raises FileNotFoundError when TRL or verl is not there."""
    for name in ("trl", "verl"):
        if not (PEERS / name).is_dir() and importlib.util.find_spec(name) is None:
            raise FileNotFoundError(f"the bench compares with {name}, which is not installed: run `make peers`")


def run_worker(
    ranks: int,
    task: str,
    *,
    hidden: int,
    vocabulary: int = VOCABULARY,
    tokens: int = TOKENS,
    repetitions: int | None = None,
    series: str = "",
    problem: Path | None = None,
    huge_pages: bool = False,
) -> dict[str, list[float]]:
    """Run `loss_worker` under torchrun; return the samples that rank 0 prints, by name."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "drpo_megatron.bench.loss_worker", f"--task={task}", f"--hidden={hidden}"]
    command += [f"--vocabulary={vocabulary}", f"--tokens={tokens}", f"--repetitions={repetitions or REPETITIONS}"]
    command += ["--compared", *COMPARED]
    if series:
        sizes = SERIES_TOKENS if series == "tokens" else SERIES_COLUMNS
        command += [f"--series={series}", "--sizes", *map(str, sizes)]
    if problem is not None:
        command += [f"--problem={problem}", f"--tail-tolerance={TAIL_TOLERANCE}"]
    done = subprocess.run(
        command,
        env={
            **os.environ,
            **(HUGE_PAGES if huge_pages else {}),
            "OMP_NUM_THREADS": str(threads),
            "DRPO_PEERS": str(PEERS),
        },
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    samples: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    print(f"{task} {series} H={hidden} TP={ranks} T={tokens}: {samples}", file=sys.stderr, flush=True)
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


def _sparse(directory: Path, threads: int) -> dict[str, list[float]]:
    """Rollouts of SmolLM2 by the real server, then the sparse backward on their hidden states."""
    problem = directory / "problem.pt"
    subprocess.run(
        [sys.executable, "-m", "drpo_megatron.bench.loss_rollouts", str(problem)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
        stdout=sys.stderr,
    )
    return run_worker(1, "sparse", hidden=0, problem=problem)


def _worst(samples_by_shape: Sequence[Sequence[float]], must: str) -> Figure:
    return max((Figure.of(samples, must) for samples in samples_by_shape), key=lambda figure: figure.value)
