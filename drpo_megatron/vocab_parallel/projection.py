"""The loop over a projection's chunks: logits and statistics forward, both gradients backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from drpo_megatron.vocab_parallel.chunks import Shard, WeightGradient, chunk_tokens, statistics_dtype
from drpo_megatron.vocab_parallel.kernels import Kernels, kernels_for
from drpo_megatron.vocab_parallel.tail import ChunkGradient, SparseBackward, TailReport


@dataclass
class Chunk:
    """Tokens `rows`, their logits on this rank, and the statistics of this and of all ranks, which may still travel."""

    rows: slice
    logits_CV: Tensor
    local_C4: Tensor
    gathered_RC4: Tensor
    travelling: dist.Work | None


class ChunkedProjection:
    """The chunks of N tokens, and per token what the statistics of all ranks say.

    valid_VH: the weight without padding.
    """

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, shard: Shard, budget: int) -> None:
        self.hidden_NH, self.weight_VH, self.shard = hidden_NH, weight_VH, shard
        self.valid_VH = weight_VH[: shard.valid]
        self.columns_N = targets_N - shard.first
        self.kernels: Kernels = kernels_for(hidden_NH)
        self.dtype = statistics_dtype(hidden_NH)
        num_tokens = len(hidden_NH)
        self.logp_N = torch.empty(num_tokens, dtype=self.dtype, device=hidden_NH.device)
        self.entropy_N = torch.empty_like(self.logp_N)
        self.log_normalizer_N = torch.empty_like(self.logp_N)
        self._size = chunk_tokens(num_tokens, weight_VH.shape[0], weight_VH.element_size(), shard.ranks, budget)
        starts = range(0, num_tokens, self._size)
        self.slices = [slice(start, min(start + self._size, num_tokens)) for start in starts]

    def with_statistics(self, *, exponentiate: bool) -> Iterator[Chunk]:
        """Chunks whose log-probs, entropies and normalizers are known. A chunk's logits are valid until the next."""
        lookahead = self.shard.ranks > 1
        buffers = [self._buffer() for _ in range(2 if lookahead else 1)]
        started = self._start(0, buffers[0], exponentiate) if self.slices else None
        for index in range(1, len(self.slices) + 1):
            current, started = started, None
            if lookahead and index < len(self.slices):
                started = self._start(index, buffers[index % 2], exponentiate)
            assert current is not None
            self._merge(current)
            yield current
            if not lookahead and index < len(self.slices):
                started = self._start(index, buffers[0], exponentiate)

    def again(self) -> Iterator[Chunk]:
        """Chunks of logits, computed anew."""
        buffer_CV = self._buffer()
        for rows in self.slices:
            nothing = self.logp_N.new_empty(0)
            hidden_CH = self.hidden_NH[rows]
            logits_CV = torch.mm(hidden_CH, self.valid_VH.t(), out=buffer_CV[: len(hidden_CH)])
            yield Chunk(rows, logits_CV, nothing, nothing, None)

    def check(self, trained_N: Tensor) -> None:
        """Raises when a log-prob is not finite: FloatingPointError for the network's numbers, ValueError for a target
        outside the vocabulary.
        """
        bad_N = ~torch.isfinite(self.logp_N)
        if not bool(bad_N.any()):
            return
        first = int(bad_N.nonzero()[0])
        token = int(trained_N[first])
        rank = dist.get_rank() if dist.is_initialized() else 0
        where = f"rank {rank}, token {token} of the micro-batch ({int(bad_N.sum())} of {len(bad_N)} trained tokens)"
        if not bool(torch.isfinite(self.hidden_NH[first]).all()):
            raise FloatingPointError(f"{where}: the hidden state is not finite; look at the layers before the output")
        if bool(torch.isfinite(self.log_normalizer_N[first])):
            target = int(self.columns_N[first]) + self.shard.first
            raise ValueError(f"{where}: target {target} is outside the vocabulary; tokenizer and model do not match")
        raise FloatingPointError(f"{where}: the logits are not finite; look at the output weight")

    def _buffer(self) -> Tensor:
        size = min(self._size, len(self.hidden_NH))
        return self.hidden_NH.new_empty(size, self.shard.valid)

    def _start(self, index: int, buffer_CV: Tensor, exponentiate: bool) -> Chunk:
        rows = self.slices[index]
        hidden_CH, logits_CV = self.hidden_NH[rows], buffer_CV[: rows.stop - rows.start]
        local_C4 = self.kernels.project(
            hidden_CH,
            self.valid_VH,
            self.columns_N[rows],
            self.shard.temperature,
            logits_CV,
            exponentiate=exponentiate,
        )
        if self.shard.ranks == 1:
            return Chunk(rows, logits_CV, local_C4, local_C4[None], None)
        gathered_RC4 = local_C4.new_empty(self.shard.ranks, *local_C4.shape)
        travelling = dist.all_gather_single(gathered_RC4.flatten(0, 1), local_C4, group=self.shard.group, async_op=True)
        return Chunk(rows, logits_CV, local_C4, gathered_RC4, travelling)

    def _merge(self, chunk: Chunk) -> None:
        if chunk.travelling is not None:
            chunk.travelling.wait()
        rows = chunk.rows
        self.kernels.merge(chunk.gathered_RC4, self.logp_N[rows], self.entropy_N[rows], self.log_normalizer_N[rows])


class ChunkedGradients:
    """Both gradients, a chunk at a time."""

    def __init__(
        self,
        work: ChunkedProjection,
        *,
        grad_hidden: bool,
        grad_weight: bool,
        main_grad_VH: Tensor | None,
        tail_tolerance: float = 0.0,
    ) -> None:
        self.needed = grad_hidden or grad_weight
        self.work = work
        self.grad_hidden_NH = torch.zeros_like(work.hidden_NH) if grad_hidden else None
        self.weight = WeightGradient(work.weight_VH, main_grad_VH) if grad_weight else None
        self._sparse = None
        if tail_tolerance > 0 and grad_hidden and grad_weight:
            self._sparse = SparseBackward(work.valid_VH, tail_tolerance)

    @property
    def tail(self) -> TailReport:
        return TailReport() if self._sparse is None else self._sparse.report

    def chunk_(self, chunk: Chunk, grad_logp_C: Tensor, grad_entropy_C: Tensor | None, *, exponentiated: bool) -> None:
        """Add one chunk's gradients; its logits are overwritten."""
        work, rows = self.work, chunk.rows
        logp_C = work.logp_N[rows]
        factor_C = work.kernels.gradient_(
            chunk.logits_CV,
            work.columns_N[rows],
            maximum_C=chunk.local_C4[:, 0] if exponentiated else None,
            logp_C=logp_C,
            log_normalizer_C=work.log_normalizer_N[rows],
            entropy_C=work.entropy_N[rows],
            grad_logp_C=grad_logp_C,
            grad_entropy_C=grad_entropy_C,
            temperature=work.shard.temperature,
        )
        if work.shard.valid == 0:
            return
        hidden_CH = work.hidden_NH[rows]
        scaled_CH = work.kernels.scale_rows(hidden_CH, factor_C, torch.empty_like(hidden_CH))
        if self._sparse is not None and self.weight is not None and self.grad_hidden_NH is not None:
            gradient = ChunkGradient(
                operand_CV=chunk.logits_CV,
                factor_C=factor_C,
                hidden_CH=hidden_CH,
                scaled_CH=scaled_CH,
                columns_C=work.columns_N[rows],
                size_C=(grad_logp_C * torch.expm1(logp_C) / work.shard.temperature).abs(),
                softness_C=torch.where(factor_C == 0, -1.0, work.entropy_N[rows]),
                signed=grad_entropy_C is not None,
            )
            self.grad_hidden_NH[rows] = self._sparse.products(gradient, self.weight) * factor_C[:, None]
            return
        if self.weight is not None:
            self.weight.add_product(chunk.logits_CV, scaled_CH)
        if self.grad_hidden_NH is not None:
            product_CH = torch.mm(chunk.logits_CV, work.valid_VH)
            work.kernels.scale_rows(product_CH, factor_C, self.grad_hidden_NH[rows])
