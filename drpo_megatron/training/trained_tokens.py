"""What the trainer made of each token, brought back to the rollout that it is of, for the dump."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from drpo_megatron.records import RolloutGroup
from drpo_megatron.training.packing import groups_of_updates
from drpo_megatron.training.step import UpdateResult


def note_trained_tokens(groups: Sequence[RolloutGroup], results_by_rank: Sequence[Sequence[UpdateResult]]) -> None:
    """Set `logp` and `loss_weight` of every rollout. `results_by_rank[rank][update]`; ranks without tokens have no
    stats.
    """
    updates = list(zip(*results_by_rank, strict=True))
    for part, results in zip(groups_of_updates(groups, len(updates)), updates, strict=True):
        rollouts = [rollout for group in part for rollout in group.rollouts]
        starts_S = np.cumsum([0, *(len(r.response_ids) for r in rollouts)])
        prompts_S = np.array([len(r.prompt.token_ids) for r in rollouts])
        noted_2T = np.zeros((2, starts_S[-1]))
        for result in results:
            if result.stats is not None and result.places_2N is not None:
                rows_N, positions_N = result.places_2N.numpy()
                at_N = starts_S[rows_N] + positions_N - prompts_S[rows_N]
                noted_2T[:, at_N] = torch.stack([result.stats.logp_N, result.stats.weight_N]).numpy()
        for rollout, start, end in zip(rollouts, starts_S, starts_S[1:], strict=False):
            rollout.logp, rollout.loss_weight = noted_2T[:, start:end].tolist()
