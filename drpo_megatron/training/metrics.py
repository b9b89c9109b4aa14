"""One step's metrics: everything is reduced here, once, on rank 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from drpo_megatron.algorithms import TokenStats, fraction_without_signal, summarize
from drpo_megatron.config.schema import RunConfig
from drpo_megatron.records import Metrics, RolloutGroup
from drpo_megatron.training.routing import routing_metrics
from drpo_megatron.training.step import UpdateResult

# Compared on the first update of a step, whose weights are the ones that the server sampled with: what is left is the
# mismatch between the two engines. Over later updates the same numbers measure the policy's own movement.
FIRST_UPDATE = ("mismatch/", "ratio/", "policy/entropy")


def step_metrics(
    config: RunConfig,
    groups: Sequence[RolloutGroup],
    results_by_rank: Sequence[Sequence[UpdateResult]],
    *,
    verb_seconds: Mapping[str, float],
    of_source: Metrics,
    skipped_updates: int,
    peak_memory_bytes: int,
    peak_flops_per_s: float | None,
) -> Metrics:
    """Names as in docs/metrics.md. `results_by_rank[rank][update]`; token statistics come from the ranks that have
    them.
    """
    updates = [
        TokenStats.cat([result.stats for result in results if result.stats is not None])
        for results in zip(*results_by_rank, strict=True)
    ]
    delta = config.algorithm.loss_args.get("delta")
    metrics = summarize(TokenStats.cat(updates), delta)
    # The loss of one update is a sum with that update's denominators; the step reports their mean.
    metrics["loss/mean"] /= len(updates)
    first = summarize(updates[0], delta)
    metrics |= {name: value for name, value in first.items() if name.startswith(FIRST_UPDATE)}
    routing = [[r.routing for r in results if r.routing] for results in zip(*results_by_rank, strict=True)]
    if routing[0]:
        metrics |= routing_metrics(routing, config.model)
    last = results_by_rank[0][-1]
    metrics |= {"grad_norm": last.grad_norm, "lr": last.learning_rate, "train/skipped_updates": float(skipped_updates)}
    performance = _performance(config, groups, results_by_rank[0], verb_seconds)
    if config.rollout.from_dump is not None:
        del performance["perf/generate_tokens_per_s"]  # nothing is sampled
    performance["perf/mfu"] = performance["perf/tflops_per_gpu"] * 1e12 / (peak_flops_per_s or math.nan)
    metrics["loss/tail_bound"] = max(result.tail_bound for results in results_by_rank for result in results)
    return metrics | rollout_metrics(groups) | performance | {"memory/peak_gb": peak_memory_bytes / 1e9} | of_source


def rollout_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    """What does not depend on the trainer."""
    rollouts = [r for g in groups for r in g.rollouts]
    rewards = [r.reward for r in rollouts]
    lengths = [len(r.response_ids) for r in rollouts]
    return {
        "reward/mean": sum(rewards) / len(rewards),
        "reward/max": max(rewards),
        "reward/min": min(rewards),
        "reward/pass@1": sum(r >= 1.0 for r in rewards) / len(rewards),
        "reward/errors": float(sum(r.reward_error is not None for r in rollouts)),
        "reward/groups_without_signal": fraction_without_signal([g.rewards for g in groups]),
        "response/len_mean": sum(lengths) / len(lengths),
        "response/len_max": float(max(lengths)),
        "response/truncated_frac": sum(r.truncated for r in rollouts) / len(rollouts),
    }


def _performance(
    config: RunConfig,
    groups: Sequence[RolloutGroup],
    updates: Sequence[UpdateResult],
    verb_seconds: Mapping[str, float],
) -> Metrics:
    """Rates are per second of the verb they belong to; `perf/tokens_per_s` counts positions over the whole step. They
    count a prompt once a sample; FLOPs are those that are computed, with a shared prompt counted once a pack.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    sampled = sum(len(r.response_ids) for r in rollouts)
    lengths = [len(r.prompt.token_ids) + len(r.response_ids) - 1 for r in rollouts]
    step_s = sum(verb_seconds.values())
    # The verb waits for what is not there yet: ahead of training, tokens are sampled during the whole step.
    generate_s = verb_seconds["generate"] if config.rollout.schedule == "synchronous" else step_s
    flops_per_s_rank = sum(update.flops for update in updates) / verb_seconds["train"] / config.layout.world_size
    return {f"perf/{verb}_s": seconds for verb, seconds in verb_seconds.items()} | {
        "train/tokens": float(sum(lengths)),
        "perf/step_s": step_s,
        "perf/tokens_per_s": sum(lengths) / step_s,
        "perf/samples_per_s": len(rollouts) / step_s,
        "perf/generate_tokens_per_s": sampled / generate_s,
        "perf/train_tokens_per_s": sum(lengths) / verb_seconds["train"],
        "perf/tflops_per_gpu": flops_per_s_rank / 1e12,
        "pack/tokens_saved_frac": sum(update.tokens_saved_frac for update in updates) / len(updates),
    }
