"""One optimizer update: Megatron's forward-backward schedule over packed micro-batches, with the loss on the last
stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from drpo_megatron.algorithms import TokenStats
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.fp8.health import UpdateHealth, cosine, gradients_of, merged, unquantized, watched
from drpo_megatron.fp8.recipes import layer_backend, token_multiple
from drpo_megatron.models.builder import build_model, forward_packed, output_weight
from drpo_megatron.models.flops import SequenceCost, training_flops
from drpo_megatron.models.hf_config import HFModelConfig
from drpo_megatron.platform import device
from drpo_megatron.records import TrainBatch
from drpo_megatron.training.context import pack_multiple, sequence_multiple, split_context
from drpo_megatron.training.objective import MicroBatchReport, Objective
from drpo_megatron.training.optimizer import UpdateGuard, apply_update, build_optimizer, wrap_data_parallel
from drpo_megatron.training.packing import TrainSequence, token_places
from drpo_megatron.training.prefix import pack_update, sharing_mode
from drpo_megatron.training.routing import RoutingStats, UpdateRouting, expert_biases, router_training
from drpo_megatron.weights.importer import load_hf

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


@dataclass(frozen=True)
class UpdateResult:
    """What one update leaves behind.

    stats: this rank's tokens, on the CPU; None except on tensor rank 0 of the last pipeline stage. Data and context
    parallel ranks have different tokens. places_2N: int32, of these tokens the row of the sequence and the index in it;
    None where no rollouts are dumped. tail_bound: the largest relative bound on the gradient error of this rank's
    sparse backward, 0 when exact. flops and positions: of the forward and backward on all ranks together.
    tokens_saved_frac: share of its positions that a rank saved by shared prefixes. routing: of this rank's layers, None
    for a dense model. fp8: where the update was examined.
    """

    stats: TokenStats | None
    places_2N: torch.Tensor | None
    grad_norm: float
    applied: bool
    learning_rate: float
    tail_bound: float
    flops: float
    positions: int
    tokens_saved_frac: float
    routing: RoutingStats | None = None
    fp8: UpdateHealth | None = None


class Policy:
    """The trained model on this rank: its chunks, optimizer and schedule. `update` is the only thing that changes
    weights.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.layout = config.layout
        backend = layer_backend(config.fp8)
        self.sharing = sharing_mode(config.training.shared_prefix, self.layout.context, backend)
        self.hf = HFModelConfig.load(config.model.path)
        modules = build_model(
            self.hf,
            self.layout,
            params_dtype=getattr(torch, config.model.dtype),
            recompute=config.model.recompute,
            spec_backend=backend,
            deterministic=config.training.deterministic,
            accumulate_gradients=True,
            router=router_training(config.model),
            fp8=config.fp8,
        )
        load_hf(modules, config.model.path, self.hf)
        self.chunks = wrap_data_parallel(
            modules,
            config.optimizer.distributed,
            overlap_grad_reduce=config.optimizer.overlap_grad_reduce,
            overlap_param_gather=config.optimizer.overlap_param_gather,
            bucket_parameters=config.optimizer.bucket_parameters,
            fp8_parameters=config.fp8.parameters,
        )
        self._weights_are_whole = True
        self.optimizer, self.scheduler = build_optimizer(config, self.chunks)
        self.guard = UpdateGuard(limit=config.training.max_skipped_updates)
        self.cost = SequenceCost.of(self.hf)
        self.objective = Objective(config, self.hf.vocab_size)
        self.forward_backward = get_forward_backward_func()

    @property
    def modules(self) -> list[MegatronModule]:
        """The model's chunks with whole weights, to be read. Collective after an update with `overlap_param_gather`."""
        if not self._weights_are_whole:
            for chunk in self.chunks:
                with torch.no_grad():
                    chunk.start_param_sync(force_sync=True)
            self._weights_are_whole = True
        return [chunk.module for chunk in self.chunks]

    def update(self, sequences: list[TrainSequence], version: int, *, examine: bool = False) -> UpdateResult:
        """Train once on `sequences`, the global batch of this update (the same list on every rank).

        version: the weight version before the update. examine: look at what FP8 does to it, which takes the gradient
        twice and leaves the update as it is. Raises FloatingPointError after too many skipped updates in a row.
        """
        packed = pack_update(
            sequences,
            self.sharing,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=self.layout.data,
            token_budget=self.config.training.tokens_per_micro_batch,
            pad_multiple=pack_multiple(self.layout, token_multiple(self.config.fp8)),
            sequence_multiple=sequence_multiple(self.layout),
            cost=self.cost,
            count_multiple=self.layout.pipeline if self.layout.virtual_pipeline else 1,
            version=version,
        )
        packed_length = len(packed.micro_batches[0].tokens_T)  # the schedule divides it by the context and SP sizes
        rank, size = parallel_state.get_context_parallel_rank(), self.layout.context
        micro_batches = [split_context(b, rank, size).to(device()) for b in packed.micro_batches]
        routed = all(s.routed_experts_PLK is not None for s in sequences)
        # The schedule moves them when it finalizes the gradients, before anything can look at those.
        biases = [(bias, bias.clone()) for chunk in self.chunks for bias in expert_biases([chunk.module])]
        exact = None
        if examine:
            with unquantized(self.chunks):
                self._compute_gradients(micro_batches, packed_length, routed)
            exact = gradients_of(self.optimizer)
            for bias, before in biases:
                bias.copy_(before)
        with contextlib.ExitStack() as looking:
            seen = looking.enter_context(watched(self.chunks)) if examine else []
            reports, routing = self._compute_gradients(micro_batches, packed_length, routed)
        health = UpdateHealth(merged(seen), cosine(exact, gradients_of(self.optimizer))) if exact else None
        grad_norm, applied = apply_update(self.optimizer, self.config.optimizer.clip_grad)
        self._weights_are_whole = not self.config.optimizer.overlap_param_gather
        if not applied:
            for bias, before in biases:
                bias.copy_(before)
        self.guard.record(applied)
        learning_rate = self.scheduler.get_lr(self.optimizer.param_groups[0])
        self.scheduler.step(increment=1)
        stats = places_2N = None
        if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
            # One copy off the device: the record travels to rank 0 as a Python object.
            stats = TokenStats.from_matrix(TokenStats.cat([r.stats for r in reports]).matrix().cpu())
            if self.config.tracking.dump_rollouts:
                places_2N = torch.cat([token_places(batch) for batch in micro_batches], dim=1)
        tail_bound = max((r.tail_bound for r in reports), default=0.0)
        sampled = sum(int(s.sampled_L[1:].sum()) for s in sequences)
        flops = training_flops(self.hf, packed.lengths, sampled, packed.prefix_lengths)
        return UpdateResult(
            stats,
            places_2N,
            grad_norm,
            applied,
            learning_rate,
            tail_bound,
            flops=flops,
            positions=sum(packed.lengths),
            tokens_saved_frac=packed.tokens_saved_frac,
            routing=routing.stats() if routing else None,
            fp8=health,
        )

    def _compute_gradients(
        self, micro_batches: list[TrainBatch], packed_length: int, routed: bool
    ) -> tuple[list[MicroBatchReport], UpdateRouting | None]:
        """Forward and backward of all micro-batches into cleared gradient buffers, reduced over the ranks.

        routed: every sequence carries the experts that the rollout engine sent its tokens to.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        routing, replay = None, self.config.model.routing_replay is not False
        if self.hf.moe and (replay or routed):
            routing = UpdateRouting(self.hf, self.layout, replay=replay)
        reports: list[MicroBatchReport] = self.forward_backward(
            forward_step_func=partial(self._forward_step, routing),
            data_iterator=[iter(micro_batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=packed_length,
            micro_batch_size=1,
            forward_only=False,
        )
        return reports, routing

    def _forward_step(
        self, routing: UpdateRouting | None, batches: Iterator[TrainBatch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, object]:
        batch = next(batches)
        hidden = forward_packed(
            model,
            batch.tokens_T,
            batch.position_ids_T,
            batch.cu_seqlens,
            batch.max_seqlen,
            batch.prefixes,
            routing.micro_batch(batch) if routing else None,
        )
        return hidden, partial(self._loss, batch, model)

    def _loss(
        self, batch: TrainBatch, model: torch.nn.Module, hidden_1TH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, MicroBatchReport]:
        """(loss, number of trained tokens, diagnostics) of one micro-batch: the 3-tuple of Megatron's schedule."""
        weight_VH = output_weight(model)
        assert weight_VH is not None, "the schedule asks for the loss on the last stage"
        loss, report = self.objective(batch, hidden_1TH.squeeze(0), weight_VH)
        return loss, batch.mask_T.sum().int(), report
