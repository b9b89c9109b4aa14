"""One problem, and the ways to its loss and both gradients that `bench loss` times against each other."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from drpo_megatron.algorithms import LossFunction, LossInputs, make_loss
from drpo_megatron.platform import device, has_cuda
from drpo_megatron.vocab_parallel import DEFAULT_MEMORY_BUDGET, FusedLoss, fused_policy_loss, project_logprobs
from drpo_megatron.vocab_parallel.chunks import WeightGradient, chunk_tokens


def synchronize() -> None:
    """All ranks have come here, and their devices have done what was asked."""
    torch.cuda.synchronize()
    if dist.get_world_size() > 1:
        dist.barrier()


def seconds(way: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    way()
    synchronize()
    return time.perf_counter() - start


class Ways:
    """A problem on this rank's shard. Each way leaves ∂hidden in `hidden_TH.grad` and adds ∂weight to `main_grad_VH`.

    hidden_TH, weight_VH: leaves, float32 on a CPU and bfloat16 on a GPU. advantages_T and logmu_T as in `LossInputs`.
    """

    memory_budget = DEFAULT_MEMORY_BUDGET

    def __init__(
        self, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, logmu_T: Tensor, advantages_T: Tensor
    ) -> None:
        tokens = len(hidden_TH)
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.hidden_TH, self.weight_VH, self.targets_T = hidden_TH, weight_VH, targets_T
        self.logmu_T, self.advantages_T = logmu_T, advantages_T
        self.weights_T = torch.full((tokens,), 1.0 / tokens, device=device())
        self.everywhere_T = torch.ones(tokens, dtype=torch.bool, device=device())
        self.main_grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        # The fused way adds its weight gradient to Megatron's buffer; for the others see `_backward`.
        self.weight_VH.main_grad = self.main_grad_VH  # type: ignore[attr-defined]  # Megatron-Core adds the attribute
        self.loss_function = make_loss("drpo", {"delta": 0.2})

    @classmethod
    def random(cls, tokens: int, hidden: int, vocabulary: int) -> Ways:
        """Logits about 1.6 nats wide; built without temporaries, which would hide in the peak of the memory."""
        shared = torch.Generator().manual_seed(0)
        columns = vocabulary // parallel_state.get_tensor_model_parallel_group().size()
        dtype = torch.bfloat16 if has_cuda() else torch.float32
        return cls(
            torch.randn(tokens, hidden, generator=shared).mul_(0.5).to(device(), dtype).requires_grad_(),
            torch.randn(columns, hidden).mul_(0.1 * (1024 / hidden) ** 0.5).to(device(), dtype).requires_grad_(),
            torch.randint(0, vocabulary, (tokens,), generator=shared).to(device()),
            torch.randn(tokens, generator=shared).sub_(12).to(device()),
            torch.randn(tokens, generator=shared).to(device()),
        )

    @classmethod
    def of_rollouts(cls, path: Path) -> Ways:
        """The problem that `loss_rollouts` wrote, with an advantage drawn for each sequence."""
        saved = torch.load(path)
        sequence_ids_T = saved["sequence_ids_T"]
        advantages_S = torch.randn(int(sequence_ids_T.max()) + 1, generator=torch.Generator().manual_seed(0))
        names = ("hidden_TH", "weight_VH", "targets_T", "logmu_T")
        hidden_TH, weight_VH, targets_T, logmu_T = (saved[name].to(device()) for name in names)
        dtype = torch.bfloat16 if has_cuda() else hidden_TH.dtype
        return cls(
            hidden_TH.to(dtype).requires_grad_(),
            weight_VH.to(dtype).requires_grad_(),
            targets_T,
            logmu_T,
            advantages_S[sequence_ids_T].to(device()),
        )

    @property
    def vocab_size(self) -> int:
        return self.weight_VH.shape[0] * self.group.size()

    @property
    def chunk(self) -> int:
        """Tokens of a chunk of the fused way."""
        columns = self.weight_VH.shape[0]
        itemsize = self.weight_VH.element_size()
        return chunk_tokens(len(self.hidden_TH), columns, itemsize, self.group.size(), self.memory_budget)

    def fused_loss(
        self,
        mask_T: Tensor | None = None,
        loss_function: LossFunction | None = None,
        tail_tolerance: float = 0.0,
    ) -> FusedLoss:
        """Without the backward pass, which only hands the gradients over."""
        return fused_policy_loss(
            self.hidden_TH,
            self.weight_VH,
            self.targets_T,
            mask_T=self.everywhere_T if mask_T is None else mask_T,
            loss_function=loss_function or self.loss_function,
            logmu_T=self.logmu_T,
            advantages_T=self.advantages_T,
            weights_T=self.weights_T,
            group=self.group,
            vocab_size=self.vocab_size,
            memory_budget=self.memory_budget,
            tail_tolerance=tail_tolerance,
        )

    def fused(self, **options: Any) -> FusedLoss:
        """Options: see `fused_loss`."""
        result = self.fused_loss(**options)
        result.loss.backward()
        self.weight_VH.grad = None  # the placeholder, which Megatron's hook drops
        return result

    def masked(self) -> None:
        """Every second token."""
        self.fused(mask_T=torch.arange(len(self.hidden_TH), device=device()) % 2 == 0)

    def warm_up(self) -> None:
        """Threads and libraries are ready after it, and kernels are tuned."""
        _BareProducts(self).next_chunk()
        if has_cuda():
            self.fused()
            self.hidden_TH.grad = None
            self.main_grad_VH.zero_()

    def dense(self) -> None:
        """The product's own dense backend: whole logits, and one operation for log-prob and entropy."""
        logp_T, _ = project_logprobs(
            self.hidden_TH,
            self.weight_VH,
            self.targets_T,
            mask_T=self.everywhere_T,
            group=self.group,
            vocab_size=self.vocab_size,
        )
        self._backward(logp_T)

    def plain(self) -> None:
        """torch's own operations on whole logits, and an entropy."""
        logp_TV = F.log_softmax(F.linear(self.hidden_TH, self.weight_VH), -1)
        with torch.no_grad():
            (logp_TV.exp() * logp_TV).sum(-1).neg_()
        self._backward(logp_TV.gather(1, self.targets_T[:, None]).squeeze(1))

    def mcore(self) -> None:
        """Megatron-Core's cross entropy, and an entropy."""
        logits_TV = F.linear(self.hidden_TH, self.weight_VH)
        with torch.no_grad():
            p_TV = torch.softmax(logits_TV, -1)
            torch.xlogy(p_TV, p_TV).sum(-1).neg_()
            del p_TV
        self._backward(-vocab_parallel_cross_entropy(logits_TV, self.targets_T))

    def trl(self) -> None:
        """TRL's log-prob and entropy from logits, as its GRPO trainer calls them."""
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        logits_TV = F.linear(self.hidden_TH, self.weight_VH)
        logp_1T = selective_log_softmax(logits_TV[None], self.targets_T[None])
        with torch.no_grad():
            entropy_from_logits(logits_TV[None])
        self._backward(logp_1T[0])

    def verl(self) -> None:
        """verl's vocabulary-parallel log-prob and entropy, as its Megatron actor calls them."""
        from verl.utils.megatron.tensor_parallel import (
            vocab_parallel_entropy,
            vocab_parallel_log_probs_from_logits,
        )

        logits_TV = F.linear(self.hidden_TH, self.weight_VH)
        with torch.no_grad():
            vocab_parallel_entropy(logits_TV)
        self._backward(vocab_parallel_log_probs_from_logits(logits_TV, self.targets_T))

    def ratio_to_bare(self, **options: Any) -> tuple[float, FusedLoss]:
        """Seconds of the fused way over seconds of its bare products; its result. Options: see `fused_loss`.

        On a CPU the two alternate chunk by chunk: the fused way calls the loss function once a chunk, and there its
        clock stops and a chunk of bare products runs, into a buffer of its own. So both meet the same neighbours on a
        shared machine. A GPU is not shared, and to wait for it after each chunk would be what is measured: one after
        the other.
        """
        bare, results = _BareProducts(self), list[FusedLoss]()
        if has_cuda():
            total = seconds(lambda: results.append(self.fused(**options)))
            return total / seconds(bare.all_chunks), results[0]
        bare_seconds = 0.0

        def pausing(inputs: LossInputs) -> Tensor:
            nonlocal bare_seconds
            bare_seconds += seconds(bare.next_chunk)
            return self.loss_function(inputs)

        total = seconds(lambda: results.append(self.fused(loss_function=pausing, **options)))
        if bare.more:
            raise RuntimeError("the fused way called the loss function fewer times than it has chunks")
        return (total - bare_seconds) / bare_seconds, results[0]

    def _backward(self, logp_T: Tensor) -> None:
        inputs = LossInputs(
            logp_T=logp_T,
            logmu_T=self.logmu_T,
            advantages_T=self.advantages_T,
            mask_T=self.everywhere_T,
            sequence_ids_T=torch.zeros_like(self.targets_T),
            num_sequences=1,
        )
        # Into the same memory where autograd can add to it, and else as Megatron's DDP does.
        same_dtype = self.weight_VH.dtype == self.main_grad_VH.dtype
        self.weight_VH.grad = self.main_grad_VH if same_dtype else None
        (self.weights_T * self.loss_function(inputs)).sum().backward()
        if not same_dtype:
            gradient_VH = self.weight_VH.grad
            assert gradient_VH is not None, "the backward made it"
            self.main_grad_VH.add_(gradient_VH)
        self.weight_VH.grad = None


class _BareProducts:
    """logits = h·Wᵀ, ∂hidden = logits·W and ∂weight += logitsᵀ·h, a chunk a call."""

    def __init__(self, ways: Ways) -> None:
        self._ways, self._size, self._start = ways, ways.chunk, 0
        self._buffer_CV = ways.hidden_TH.new_empty(self._size, ways.weight_VH.shape[0])
        self._grad_TH = torch.empty_like(ways.hidden_TH)
        self._gradient = WeightGradient(ways.weight_VH, torch.zeros_like(ways.main_grad_VH))

    @property
    def more(self) -> bool:
        return self._start < len(self._ways.hidden_TH)

    @torch.no_grad()
    def next_chunk(self) -> None:
        rows = slice(self._start, self._start + self._size)
        hidden_CH, weight_VH = self._ways.hidden_TH[rows], self._ways.weight_VH
        logits_CV = torch.mm(hidden_CH, weight_VH.t(), out=self._buffer_CV[: len(hidden_CH)])
        torch.mm(logits_CV, weight_VH, out=self._grad_TH[rows])
        self._gradient.add_product(logits_CV, hidden_CH)
        self._start += self._size

    def all_chunks(self) -> None:
        while self.more:
            self.next_chunk()


def use_peers() -> None:
    """Let `trl` and `verl` be imported from where `make peers` put them, behind everything that is installed."""
    sys.path.append(os.environ["DRPO_PEERS"])
