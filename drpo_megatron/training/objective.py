"""The training objective on one micro-batch: from hidden states to the loss, and what it leaves for the metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from drpo_megatron.algorithms import SEQUENCE_LEVEL_LOSSES, LossInputs, TokenStats, evaluate, make_loss
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.records import TrainBatch
from drpo_megatron.training.context import evaluate_whole_sequences
from drpo_megatron.vocab_parallel import fused_logprobs, fused_policy_loss, project_logprobs, trained_tokens


@dataclass(frozen=True)
class MicroBatchReport:
    """What a micro-batch leaves for the metrics, without a graph: it is kept until the update ends.

    stats: its trained tokens. tail_bound: bound on the relative gradient error of the sparse backward, 0 when exact.
    """

    stats: TokenStats
    tail_bound: float


class Objective:
    """Σ weight·L(logπ) − entropy_coefficient·Σ weight·H over the sampled tokens of a micro-batch.

    The fused operation takes both gradients while it has the logits, for a token-level loss; a sequence-level loss
    needs all log-probs of a sequence first, and the logits are computed again in the backward. Under context
    parallelism a rank's micro-batch is its part of the sequences, and the sum over the ranks is the loss.
    """

    def __init__(self, config: RunConfig, vocab_size: int) -> None:
        self.algorithm = config.algorithm
        self.loss_function = make_loss(config.algorithm.loss, config.algorithm.loss_args)
        self.context_group = parallel_state.get_context_parallel_group() if config.layout.context > 1 else None
        self.vocabulary: dict[str, Any] = {
            "group": parallel_state.get_tensor_model_parallel_group(),
            "sequence_parallel": config.layout.sequence_parallel,
            "temperature": config.rollout.sampling.temperature,
            "vocab_size": vocab_size,
        }

    def __call__(
        self, batch: TrainBatch, hidden_TH: torch.Tensor, weight_VH: torch.Tensor
    ) -> tuple[torch.Tensor, MicroBatchReport]:
        """The differentiable scalar, this micro-batch's share of the global batch's loss, and its report.

        hidden_TH: of the last stage ([T/tp, H] under sequence parallelism). weight_VH: this rank's output rows.

        N is the number of positions whose label the policy sampled; only those are projected to the vocabulary.
        """
        projection, mask_T = self.algorithm.projection, batch.mask_T
        projected = (hidden_TH, weight_VH, batch.labels_T)
        if projection.backend == "fused" and self.algorithm.loss not in SEQUENCE_LEVEL_LOSSES:
            fused = fused_policy_loss(
                *projected,
                mask_T=mask_T,
                loss_function=self.loss_function,
                logmu_T=batch.logmu_T,
                advantages_T=batch.advantages_T,
                weights_T=batch.weights_T,
                entropy_coefficient=self.algorithm.entropy_coefficient,
                memory_budget=projection.memory_budget,
                tail_tolerance=projection.tail_tolerance,
                **self.vocabulary,
            )
            _, stats = self._aggregate(batch, fused.logp_N, fused.entropy_N)
            return fused.loss, MicroBatchReport(stats, fused.tail.bound)
        if projection.backend == "fused":
            logp_N, entropy_N = fused_logprobs(
                *projected, mask_T=mask_T, memory_budget=projection.memory_budget, **self.vocabulary
            )
        else:
            logp_N, entropy_N = project_logprobs(*projected, mask_T=mask_T, **self.vocabulary)
        loss, stats = self._aggregate(batch, logp_N, entropy_N)
        return loss, MicroBatchReport(stats, tail_bound=0.0)

    def _aggregate(
        self, batch: TrainBatch, logp_N: torch.Tensor, entropy_N: torch.Tensor
    ) -> tuple[torch.Tensor, TokenStats]:
        """The loss from log-probs, and the statistics of its tokens."""
        mask_T = batch.mask_T
        trained_N = trained_tokens(batch.labels_T, mask_T)
        inputs = LossInputs(
            logp_T=logp_N,
            logmu_T=batch.logmu_T[trained_N],
            advantages_T=batch.advantages_T[trained_N],
            mask_T=torch.ones_like(logp_N, dtype=torch.bool),
            sequence_ids_T=batch.sequence_ids_T[trained_N],
            num_sequences=batch.num_sequences,
        )
        weights_N = batch.weights_T[trained_N]
        if self.context_group is not None and self.algorithm.loss in SEQUENCE_LEVEL_LOSSES:
            loss, outputs = evaluate_whole_sequences(self.loss_function, inputs, weights_N, mask_T, self.context_group)
        else:
            outputs = evaluate(self.loss_function, inputs)
            loss = (weights_N * outputs.loss_T).sum()
        if self.algorithm.entropy_coefficient:
            loss = loss - self.algorithm.entropy_coefficient * (weights_N * entropy_N).sum()
        return loss, TokenStats.of(inputs, outputs, entropy_N, weights_N, batch.staleness_T[trained_N])
