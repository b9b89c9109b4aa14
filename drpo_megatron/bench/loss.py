"""The fused projection and loss against its three bare matrix products, and against other ways to the same numbers.

Every ratio is measured side by side: both ways run alternately in one process (one a rank), on the same tensors, and a
sample is the quotient of two neighbours. One rank uses all cores, two ranks half of them each. Memory is the growth of
the process's peak over what it holds with inputs and gradients in place, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from drpo_megatron.bench.report import Figure

VOCABULARY, TOKENS, LONG = 151_936, 4_096, 32_768
HIDDEN = (1_024, 4_096)
REPETITIONS = 3


def measure() -> dict[str, Figure]:
    """Raises CalledProcessError when a worker fails; its message is on stderr."""
    single = [_worker(1, hidden, "bare") for hidden in HIDDEN]
    double = [_worker(2, hidden, "bare") for hidden in HIDDEN]
    small = HIDDEN[0]
    memory = {name: _worker(1, small, f"memory-{name}")[0] for name in ("fused", "dense")}
    long = _worker(1, small, "memory-fused", tokens=LONG)[0]
    return {
        "ratio_to_gemm_tp1": _worst(single, "<= 1.05"),
        "ratio_to_gemm_tp2": _worst(double, "<= 1.10"),
        "speedup_vs_dense": Figure.of(_worker(1, small, "dense"), ">= 1.8"),
        "speedup_vs_mcore": Figure.of(_worker(1, small, "mcore"), ">= 1.8"),
        "memory_vs_dense": Figure.of([memory["fused"] / memory["dense"]], "<= 0.1"),
        "memory_growth_4k_32k": Figure.of([long / memory["fused"]], "<= 1.1"),
        "masked_half_time": Figure.of(_worker(1, small, "masked"), "<= 0.55"),
    }


def _worst(samples_by_shape: list[list[float]], must: str) -> Figure:
    return max((Figure.of(samples, must) for samples in samples_by_shape), key=lambda figure: figure.value)


def _worker(ranks: int, hidden: int, task: str, *, vocabulary: int = VOCABULARY, tokens: int = TOKENS) -> list[float]:
    """Run this module under torchrun; return the samples that rank 0 prints."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "drpo_megatron.bench.loss", f"--hidden={hidden}", f"--task={task}"]
    command += [f"--vocabulary={vocabulary}", f"--tokens={tokens}"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True, stdout=subprocess.PIPE, text=True
    )
    samples: list[float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{task} H={hidden} TP={ranks} T={tokens}: {samples}", file=sys.stderr, flush=True)
    return samples


def _ways(hidden: int, vocabulary: int, tokens: int) -> dict[str, Callable[[], None]]:
    """The same loss and gradients, in several ways, on this rank's shard of one problem."""
    import torch
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from drpo_megatron.algorithms import LossInputs, evaluate, make_loss
    from drpo_megatron.platform import device
    from drpo_megatron.vocab_parallel import DEFAULT_MEMORY_BUDGET, fused_policy_loss, project_logprobs
    from drpo_megatron.vocab_parallel.chunks import chunk_tokens

    group = parallel_state.get_tensor_model_parallel_group()
    columns = vocabulary // group.size()
    shared = torch.Generator().manual_seed(0)
    hidden_TH = (torch.randn(tokens, hidden, generator=shared) * 0.5).to(device()).requires_grad_()
    weight_VH = (torch.randn(columns, hidden) * 0.05).to(device()).requires_grad_()
    main_grad_VH = torch.zeros_like(weight_VH)
    weight_VH.main_grad = main_grad_VH
    hidden_TH.grad = torch.zeros_like(hidden_TH)
    targets_T = torch.randint(0, vocabulary, (tokens,), generator=shared).to(device())
    logmu_T = -12 + torch.randn(tokens, generator=shared).to(device())
    advantages_T = torch.randn(tokens, generator=shared).to(device())
    weights_T = torch.full((tokens,), 1.0 / tokens, device=device())
    everywhere_T = torch.ones(tokens, dtype=torch.bool, device=device())
    loss_function = make_loss("drpo", {"delta": 0.2})
    vocabulary_of: dict[str, Any] = {"group": group, "vocab_size": vocabulary}

    def objective(logp_T: torch.Tensor) -> torch.Tensor:
        inputs = LossInputs(
            logp_T=logp_T,
            logmu_T=logmu_T,
            advantages_T=advantages_T,
            mask_T=everywhere_T,
            sequence_ids_T=torch.zeros_like(targets_T),
            num_sequences=1,
        )
        return (weights_T * evaluate(loss_function, inputs).loss_T).sum()

    def fused(mask_T: torch.Tensor = everywhere_T) -> None:
        result = fused_policy_loss(
            hidden_TH,
            weight_VH,
            targets_T,
            mask_T=mask_T,
            loss_function=loss_function,
            logmu_T=logmu_T,
            advantages_T=advantages_T,
            weights_T=weights_T,
            **vocabulary_of,
        )
        result.loss.backward()
        weight_VH.grad = None  # the placeholder, which Megatron's hook drops

    def bare() -> None:
        size = chunk_tokens(tokens, columns, 4, group.size(), DEFAULT_MEMORY_BUDGET)
        with torch.no_grad():
            buffer_CV = hidden_TH.new_empty(size, columns)
            grad_TH = torch.empty_like(hidden_TH)
            for start in range(0, tokens, size):
                hidden_CH = hidden_TH[start : start + size]
                logits_CV = torch.mm(hidden_CH, weight_VH.t(), out=buffer_CV[: len(hidden_CH)])
                torch.mm(logits_CV, weight_VH, out=grad_TH[start : start + size])
                main_grad_VH.addmm_(logits_CV.t(), hidden_CH)

    def dense() -> None:
        logp_T, _ = project_logprobs(hidden_TH, weight_VH, targets_T, mask_T=everywhere_T, **vocabulary_of)
        weight_VH.grad = main_grad_VH
        objective(logp_T).backward()
        weight_VH.grad = None

    def mcore() -> None:
        logits_TV = F.linear(hidden_TH, weight_VH)
        with torch.no_grad():
            p_TV = torch.softmax(logits_TV, -1)
            torch.xlogy(p_TV, p_TV).sum(-1).neg_()
        weight_VH.grad = main_grad_VH
        objective(-vocab_parallel_cross_entropy(logits_TV, targets_T)).backward()
        weight_VH.grad = None

    def masked() -> None:
        fused(torch.arange(tokens, device=everywhere_T.device) % 2 == 0)

    # The fused way adds its weight gradient to Megatron's buffer; autograd, of the others, to the same memory as
    # `grad`.
    return {"fused": fused, "bare": bare, "dense": dense, "mcore": mcore, "masked": masked}


def _main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("hidden", "vocabulary", "tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--task", required=True)
    parsed = parser.parse_args()

    import torch
    import torch.distributed as dist

    from drpo_megatron.platform import distributed, peak_memory_bytes
    from drpo_megatron.platform.layout import ParallelLayout

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    distributed.initialize(ParallelLayout(tensor=int(os.environ["WORLD_SIZE"])))
    ways = _ways(parsed.hidden, parsed.vocabulary, parsed.tokens)

    def seconds(name: str) -> float:
        dist.barrier()
        start = time.perf_counter()
        ways[name]()
        dist.barrier()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    if parsed.task.startswith("memory-"):
        before = peak_memory_bytes()
        seconds(parsed.task.removeprefix("memory-"))
        samples = [float(peak_memory_bytes() - before)]
    else:
        # fused over bare products and masked over whole are costs; the others are what the fused way saves
        numerator, denominator = {
            "bare": ("fused", "bare"),
            "masked": ("masked", "fused"),
            "dense": ("dense", "fused"),
            "mcore": ("mcore", "fused"),
        }[parsed.task]
        seconds(numerator), seconds(denominator)
        samples = [seconds(numerator) / seconds(denominator) for _ in range(REPETITIONS)]
    if dist.get_rank() == 0:
        print(json.dumps(samples), flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    _main()
