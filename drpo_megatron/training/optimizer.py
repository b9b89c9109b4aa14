"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, and the one update that never applies a bad
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from drpo_megatron.config.schema import RunConfig
from drpo_megatron.fp8.recipes import uses_transformer_engine

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def wrap_data_parallel(
    chunks: Sequence[MegatronModule],
    distributed_optimizer: bool,
    *,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    bucket_parameters: int | None = None,
    fp8_parameters: bool = False,
) -> list[DistributedDataParallel]:
    """Megatron DDP around each model chunk. Gradients are summed in fp32 and never averaged.

    The loss already carries its global denominator (`TrainBatch.weights_T`), so finalizing must not divide by a token
    count: the count that Megatron's schedule hands over is dropped here. The keywords are the settings of that name in
    the optimizer section. With `overlap_param_gather`, parameters of other ranks' shards are those before the last
    update until a forward or `start_param_sync` has gathered them. `fp8_parameters`: they are gathered in FP8.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        bucket_size=bucket_parameters,
        fp8_param_gather=fp8_parameters,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(get_model_config(chunk), ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()

    def finalize(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(model, None, **kwargs)

    model_config = get_model_config(wrapped[0])
    model_config.finalize_model_grads_func = finalize
    if overlap_grad_reduce:
        # The schedule opens the reduction in the last micro-batch's backward only.
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    config: RunConfig, chunks: Sequence[torch.nn.Module]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Adam with fp32 main weights, and its schedule counted in optimizer updates."""
    settings = config.optimizer
    dtype, moments_dtype = getattr(torch, config.model.dtype), getattr(torch, settings.moments_dtype)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=settings.distributed,
            overlap_param_gather=settings.overlap_param_gather,
            fp8_recipe=config.fp8.recipe if uses_transformer_engine(config.fp8) else None,
            use_precision_aware_optimizer=moments_dtype is not torch.float32,
            exp_avg_dtype=moments_dtype,
            exp_avg_sq_dtype=moments_dtype,
        ),
        chunks,
    )
    _fuse(optimizer)
    get_model_config(chunks[0]).grad_scale_func = optimizer.scale_loss
    updates = config.training.steps * config.training.updates_per_batch
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0 if settings.warmup_steps else settings.lr,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(updates, settings.warmup_steps + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # After a resume too, the settings are the configuration's; a checkpoint only has the number of updates.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW, which Megatron takes where there is neither Transformer Engine nor Apex, pass over memory once
    instead of once an operation. Megatron has no setting for it.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


@dataclass
class UpdateGuard:
    """Counts updates that were skipped for a non-finite gradient norm and stops the run after `limit` in a row."""

    limit: int
    skipped_total: int = 0
    skipped_in_a_row: int = 0

    def record(self, applied: bool) -> None:
        """Raises FloatingPointError when the limit is reached."""
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.skipped_total += not applied
        if self.skipped_in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.skipped_in_a_row} updates in a row had a non-finite gradient norm "
                f"({self.skipped_total} in all): lower optimizer.lr, raise the model's precision, or look at the last "
                "step in metrics.jsonl and rollouts/"
            )


@torch.no_grad()
def apply_update(optimizer: MegatronOptimizer, clip_grad: float) -> tuple[float, bool]:
    """One optimizer update from the reduced gradients. Returns (gradient norm before clipping, was it applied).

    Megatron's own `step` compares the norm with a threshold, which NaN passes, and would clip every weight to NaN. Here
    the norm, which is the same on every rank, decides first.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm, False
    if clip_grad > 0:
        for part in parts:
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=clip_grad,
                    total_norm=grad_norm,
                    # Where Transformer Engine's Adam keeps the main weights, gradients of another dtype than `grad`.
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
    optimizer.step_with_ready_grads()
    return grad_norm, True
